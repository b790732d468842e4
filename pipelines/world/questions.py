"""Questions with answers from a vocabulary, for VQA, Visual Genome QA and GQA.

Answers are balanced within every kind of question. Yes/no questions come in pairs: the same words about two pictures,
yes for one and no for the other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from random import Random

from pipelines.world.claims import complementary, draw_claim
from pipelines.world.language import (
    ATTRIBUTES,
    RELATIONS,
    VALUES,
    Description,
    a,
    describe,
    noun_phrase,
    related,
    relation_words,
    tell_apart,
    the,
    word,
)
from pipelines.world.plan import Plan, source_of
from pipelines.world.scenes import PLACES, Scene


@dataclass(frozen=True)
class Question:
    """A question about one image."""

    image: int
    kind: str
    text: str
    answer: str


Drawn = tuple[str, str] | None
"""Text and answer, or None where the scene gives no such question."""

_ATTRIBUTE_WORDING = {
    "colour": ("what color is {}?", "what is the color of {}?", "which color does {} have?"),
    "shape": ("what shape is {}?", "what is the shape of {}?", "which shape does {} have?"),
    "size": ("what size is {}?", "how large is {}?"),
    "pattern": ("what pattern does {} have?", "what pattern is on {}?"),
}


def ask_attribute(random: Random, scene: Scene, attribute: str) -> Drawn:
    """What color is the large star?"""
    thing = random.choice(scene.things)
    others = tuple(name for name in (*ATTRIBUTES, "place") if name != attribute)
    what = tell_apart(random, scene, thing, others)
    if what is None:
        return None
    return random.choice(_ATTRIBUTE_WORDING[attribute]).format(the(random, what)), getattr(thing, attribute)


def ask_place(random: Random, scene: Scene) -> Drawn:
    """Where is the red star? Only of things that lie far out in one direction."""
    thing = random.choice(scene.things)
    right, down = thing.x / scene.width - 0.5, thing.y / scene.height - 0.5
    out, aside = sorted((abs(right), abs(down)), reverse=True)
    what = tell_apart(random, scene, thing, ATTRIBUTES)
    if what is None or out < 0.2 or out - aside < 0.1:
        return None
    answer = PLACES[2 * (abs(down) > abs(right)) + ((down if abs(down) > abs(right) else right) > 0)]
    return random.choice(("where is {}?", "on which side is {}?")).format(the(random, what)), answer


def ask_count(random: Random, scene: Scene) -> Drawn:
    """How many red things are there? 1 to 5."""
    name = random.choice(("colour", "shape", "shape", "size", "pattern"))
    what = describe(random, random.choice(scene.things), (name,))
    count = len(what.matches(scene))
    if count > 5:
        return None
    wording = random.choice(("how many {} are there?", "how many {} do you see?", "what number of {} is there?"))
    return wording.format(noun_phrase(random, what, many=True)), str(count)


def ask_related(random: Random, scene: Scene) -> Drawn:
    """What color is the star to the left of the blue circle?"""
    attribute = random.choice(("colour", "shape", "pattern"))
    anchor, thing = random.sample(scene.things, 2)
    by_anchor = tell_apart(random, scene, anchor, ("colour", "shape"))
    said = random.choice([name for name in ("shape", "colour", "size") if name != attribute])
    relation = random.choice(tuple(RELATIONS))
    if by_anchor is None:
        return None
    what = describe(random, thing, (said,))
    there = [related(other, relation, anchor) for other in what.matches(scene) if other is not anchor]
    if not related(thing, relation, anchor) or len([found for found in there if found is not False]) != 1:
        return None
    subject = f"{the(random, what)} {relation_words(random, relation)} {the(random, by_anchor)}"
    return random.choice(_ATTRIBUTE_WORDING[attribute][:1]).format(subject), getattr(thing, attribute)


def ask_choice(random: Random, scene: Scene) -> Drawn:
    """Is the star red or blue?"""
    thing = random.choice(scene.things)
    attribute = random.choice(ATTRIBUTES)
    what = tell_apart(random, scene, thing, tuple(name for name in ATTRIBUTES if name != attribute))
    if what is None:
        return None
    answer = getattr(thing, attribute)
    options = [answer, random.choice([value for value in VALUES[attribute] if value != answer])]
    random.shuffle(options)
    if attribute == "shape":
        said = [a(random, Description(shape=option)) for option in options]
    else:
        said = [word(random, option) for option in options]
    return f"is {the(random, what)} {said[0]} or {said[1]}?", answer


_OPEN: dict[str, Callable[[Random, Scene], Drawn]] = {
    **{name: partial(ask_attribute, attribute=name) for name in ATTRIBUTES},
    "place": ask_place,
    "number": ask_count,
    "relation": ask_related,
    "choose": ask_choice,
}
ANSWERS: dict[str, tuple[str, ...]] = {**VALUES, "number": tuple("12345")}
"""Kind -> its answers, for those kinds that always have the same."""
_CLAIMS = {"exists": "exists", "verify": "is", "both": "both", "either": "either", "compare": "same",
           "where": "related", "more": "more"}  # fmt: skip
MIX: dict[str, dict[str, float]] = {
    "vqa": {"exists": 0.2, "verify": 0.16, "colour": 0.23, "shape": 0.15, "number": 0.13, "size": 0.06,
            "pattern": 0.07},
    "visual_genome_qa": {"colour": 0.34, "shape": 0.26, "number": 0.12, "place": 0.1, "size": 0.08, "pattern": 0.1},
    "gqa": {"exists": 0.1, "verify": 0.13, "both": 0.04, "either": 0.04, "compare": 0.08, "where": 0.08, "more": 0.03,
            "colour": 0.12, "shape": 0.1, "pattern": 0.04, "size": 0.03, "relation": 0.07, "choose": 0.14},
}  # fmt: skip
"""Which kinds of question a data set asks, in shares."""


def draw_questions(plan: Plan, data_set: str, split: str) -> list[Question]:
    """The questions of one split, in random order."""
    random = plan.random(f"{data_set} {split}")
    source = source_of(data_set)
    images = plan.splits[data_set][split]
    scenes = {image: plan.scene(source, image) for image in images}
    total = plan.examples(data_set, split)
    questions: list[Question] = []
    for kind, share in MIX[data_set].items():
        count = max(round(total * share), 2)
        drawn = _pairs if kind in _CLAIMS else _balanced
        questions += drawn(random, kind, scenes, count)
    random.shuffle(questions)
    return questions


def _pairs(random: Random, kind: str, scenes: dict[int, Scene], count: int) -> list[Question]:
    """The same yes/no question of two images, yes for one, no for the other. No image is asked the same twice."""
    image_of = {id(scene): image for image, scene in scenes.items()}
    every = list(scenes.values())
    asked: set[tuple[int, str]] = set()
    questions: list[Question] = []
    for _ in range(count * 40):
        if len(questions) + 1 >= count:
            break
        one = random.choice(every)
        claim = draw_claim(random, one, _CLAIMS[kind])
        truth = claim.holds(one) if claim else None
        if claim is None or truth is None:
            continue
        other = complementary(random, claim, every, not truth)
        if other is None:
            continue
        text = claim.question(random)
        pair = [(image_of[id(scene)], text) for scene in (one, other)]
        if not asked.isdisjoint(pair):
            continue
        asked.update(pair)
        for (image, _), answer in zip(pair, (truth, not truth), strict=True):
            questions.append(Question(image, kind, text, "yes" if answer else "no"))
    return questions


def _balanced(random: Random, kind: str, scenes: dict[int, Scene], count: int) -> list[Question]:
    """Questions with open answers; no answer gets much more than its share while others can be had."""
    images = list(scenes)
    cap = count if kind not in ANSWERS else -(-count // len(ANSWERS[kind]))
    given: Counter[str] = Counter()
    asked: set[tuple[int, str]] = set()
    questions: list[Question] = []
    for attempt in range(count * 60):
        if len(questions) >= count:
            break
        image = random.choice(images)
        drawn = _OPEN[kind](random, scenes[image])
        # a rare answer (five of a kind) may run out: the cap gives way slowly
        if drawn is None or given[drawn[1]] >= cap * (1 + attempt / (count * 25)) or (image, drawn[0]) in asked:
            continue
        asked.add((image, drawn[0]))
        given[drawn[1]] += 1
        questions.append(Question(image, kind, *drawn))
    return questions
