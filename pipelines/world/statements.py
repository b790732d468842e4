"""Statements to verify: NLVR2 (about two images) and SNLI-VE (about one), in their published JSON lines.

Every text occurs equally often with every label: NLVR2's sentences hold for two of their four pairs of images, and
SNLI-VE's hypotheses come three times, with an image that entails them, one that contradicts them, and one that lacks
what they speak of (neutral: what is not in the picture, it cannot tell).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from pipelines.world.captions import draw_caption, plain
from pipelines.world.claims import NUMBERS, Is, Related, draw_claim, kind_of
from pipelines.world.files import write_json_lines
from pipelines.world.language import Description, a, describe, noun_phrase
from pipelines.world.plan import Plan
from pipelines.world.scenes import Scene

PAIRS, SENTENCES = 4, 4
"""Of an NLVR2 set: pairs of images, sentences written for all of them."""
Pair = tuple[Scene, Scene]


@dataclass(frozen=True)
class PairClaim:
    """What is stated of a left and a right image."""

    form: str
    """left, right, both, one, either: which images have such a thing; count: how many the right one has; more."""
    what: Description
    number: int = 0

    def holds(self, pair: Pair) -> bool | None:
        """None where "more" meets equal numbers."""
        left, right = (len(self.what.matches(scene)) for scene in pair)
        if self.form == "more":
            return None if left == right else left > right
        if self.form == "count":
            return right == self.number
        return {
            "left": left > 0, "right": right > 0, "both": left > 0 and right > 0,
            "one": (left > 0) != (right > 0), "either": left > 0 or right > 0,
        }[self.form]  # fmt: skip

    def statement(self, random: Random) -> str:
        """One wording."""
        if self.form == "more":
            return f"There are more {noun_phrase(random, self.what, many=True)} in the left image than in the right."
        if self.form == "count":
            said = f"{NUMBERS[self.number]} {noun_phrase(random, self.what, many=self.number != 1)}"
            return f"The right image contains exactly {said}."
        wordings = _SIDE_WORDINGS if self.form in ("left", "right") else _WORDINGS[self.form]
        return random.choice(wordings).format(a(random, self.what), side=self.form)


_SIDE_WORDINGS = (
    "The {side} image contains {}.",
    "There is {} in the {side} image.",
    "The image on the {side} shows {}.",
)
_WORDINGS = {
    "both": ("Both images contain {}.", "There is {} in each image."),
    "one": ("Only one of the images contains {}.", "Exactly one image shows {}."),
    "either": ("At least one of the images contains {}.", "There is {} in at least one image."),
}


_FORMS = ("left", "left", "left", "right", "right", "right", "both", "one", "either", "either", "count", "more")


def draw_pair_claim(random: Random, pair: Pair) -> PairClaim:
    """A claim about things like those of the pair."""
    form = random.choice(_FORMS)
    thing = random.choice(random.choice(pair).things)
    if form in ("both", "count", "more"):
        what = describe(random, thing, (random.choice(("colour", "shape")),))
        return PairClaim(form, what, random.choice((1, 2, 3)))
    return PairClaim(form, kind_of(random, thing))


def draw_set(random: Random, pairs: list[Pair]) -> list[tuple[str, list[bool]]] | None:
    """`SENTENCES` sentences, each with its truth for every pair, true for exactly half; None if they are not found."""
    sentences: dict[str, list[bool]] = {}
    for _ in range(120):
        claim = draw_pair_claim(random, random.choice(pairs))
        truths = [claim.holds(pair) for pair in pairs]
        if truths.count(True) == truths.count(False) == len(pairs) // 2:
            sentences.setdefault(claim.statement(random), [bool(truth) for truth in truths])
        if len(sentences) == SENTENCES:
            return list(sentences.items())
    return None


def nlvr2_images(plan: Plan) -> dict[str, int]:
    """Image name (`train-12-0-img0`) -> scene number: pictures of the pool are used in several sets."""
    return {
        f"{split}-{number}-{pair}-img{side}": scene
        for split in plan.splits["nlvr2"]
        for number, pairs in enumerate(_nlvr2_sets(plan, split))
        for pair, scenes in enumerate(pairs)
        for side, scene in enumerate(scenes)
    }


def _nlvr2_sets(plan: Plan, split: str) -> list[list[tuple[int, int]]]:
    """For every set its pairs of scene numbers."""
    random = plan.random(f"nlvr2 images {split}")
    pool = plan.splits["nlvr2"][split]
    sets = []
    for _ in range(plan.examples("nlvr2", split)):
        if len(pool) >= 2 * PAIRS:
            drawn = random.sample(pool, 2 * PAIRS)
        else:
            drawn = [scene for _ in range(PAIRS) for scene in random.sample(pool, 2)]
        sets.append([(drawn[2 * pair], drawn[2 * pair + 1]) for pair in range(PAIRS)])
    return sets


def write_nlvr2(plan: Plan, folder: Path) -> None:
    """`{train,dev,test1}.json`: a line for every sentence and pair."""
    for split in plan.splits["nlvr2"]:
        random = plan.random(f"nlvr2 {split}")
        records: list[dict[str, Any]] = []
        for number, numbers in enumerate(_nlvr2_sets(plan, split)):
            pairs = [(plan.scenes[left], plan.scenes[right]) for left, right in numbers]
            for sentence, (text, truths) in enumerate(draw_set(random, pairs) or []):
                for pair, truth in enumerate(truths):
                    identifier = f"{split}-{number}-{pair}-{sentence}"
                    records.append({"sentence": text, "label": str(truth), "identifier": identifier})
        write_json_lines(folder / f"{split}.json", records)


LABELS = ("entailment", "contradiction", "neutral")


def relation_to(scene: Scene, claim: Is | Related) -> str | None:
    """The label of a claim as a hypothesis about a scene; None where one would hesitate."""
    truth = claim.holds(scene)
    if truth is not None:
        return "entailment" if truth else "contradiction"
    spoken_of = (claim.one, claim.other) if isinstance(claim, Related) else (claim.what,)
    missing = any(not any(what.may_fit(thing) for thing in scene.things) for what in spoken_of)
    return "neutral" if missing else None


def draw_triple(random: Random, images: dict[int, Scene]) -> tuple[str, dict[str, int]] | None:
    """A hypothesis, and for every label an image."""
    every = list(images)
    claim = draw_claim(random, images[random.choice(every)], random.choice(("is", "is", "is", "related")))
    if not isinstance(claim, Is | Related):
        return None
    found: dict[str, int] = {}
    for _ in range(60):
        image = random.choice(every)
        label = relation_to(images[image], claim)
        if label:
            found.setdefault(label, image)
        if len(found) == len(LABELS):
            text = claim.statement(random)
            return f"{text[0].upper()}{text[1:]}.", found
    return None


def write_snli_ve(plan: Plan, folder: Path) -> None:
    """`snli_ve_{train,dev,test}.jsonl`."""
    for split, name in (("train", "train"), ("val", "dev"), ("test", "test")):
        random = plan.random(f"snli_ve {split}")
        images = {image: plan.scene("flickr", image) for image in plan.splits["snli_ve"][split]}
        records: list[dict[str, Any]] = []
        seen: set[tuple[str, int]] = set()
        for _ in range(60 * plan.examples("snli_ve", split)):
            if len(records) + len(LABELS) > plan.examples("snli_ve", split):
                break
            triple = draw_triple(random, images)
            if triple is None or not seen.isdisjoint((triple[0], image) for image in triple[1].values()):
                continue
            seen.update((triple[0], image) for image in triple[1].values())
            for label in LABELS:
                image = triple[1][label]
                records.append({
                    "Flikr30kID": f"{image}.jpg", "captionID": f"{image}.jpg#0", "gold_label": label,
                    "annotator_labels": [label] * 5, "pairID": f"{image}.jpg#{len(records)}",
                    "sentence1": plain(draw_caption(random, images[image])), "sentence2": triple[0],
                })  # fmt: skip
        random.shuffle(records)
        write_json_lines(folder / f"snli_ve_{name}.jsonl", records)
