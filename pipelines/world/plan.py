"""Which pictures there are, and which data set uses which of them for what.

Sources are as in the real data sets. COCO pictures serve VQA, COCO retrieval, the three RefCOCOs and GuessWhat; Visual
Genome's, a part of them the same pictures as COCO's, serve VG QA, GQA and Visual7W; Flickr's serve Flickr30k and
SNLI-VE; NLVR2 stands alone. Splits are drawn data set by data set, so one task's test pictures occur in other tasks'
training sets, about as the paper's Table 1 counts them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from random import Random

from pipelines.errors import BadInput
from pipelines.world.scenes import Scene, draw_scene

Splits = dict[str, list[int]]
"""Split name -> image ids."""

SCALES = {"default": 1.0, "small": 0.1}
"""Name of a size -> share of the default's pictures and examples."""

PICTURES = {
    "coco": 1300, "coco_test2015": 90, "vg_linked": 500, "vg_own": 420, "flickr": 480,
    "nlvr2_train": 320, "nlvr2_dev": 70, "nlvr2_test1": 70, "cc_train": 1200, "cc_val": 200,
}  # fmt: skip

EXAMPLES: dict[str, dict[str, int]] = {
    "vqa": {"train": 8000, "val": 400, "test": 300},
    "visual_genome_qa": {"train": 12000, "val": 400, "test": 300},
    "gqa": {"train": 9000, "val": 400, "test": 300},
    "refcoco": {"train": 800, "val": 100, "testA": 60, "testB": 60},
    "refcoco_plus": {"train": 800, "val": 100, "testA": 60, "testB": 60},
    "refcocog": {"train": 300, "val": 120, "test": 120},
    "visual7w": {"train": 2000, "val": 300, "test": 240},
    "guesswhat_pointing": {"train": 2000, "val": 300, "test": 240},
    "nlvr2": {"train": 170, "dev": 20, "test1": 20},
    "snli_ve": {"train": 6000, "val": 399, "test": 300},
}
"""Questions, games and pairs; for the RefCOCOs referents (3, 3 and 2 sentences each), for NLVR2 sets (16 examples
each). Retrieval has 5 captions for every picture."""


@dataclass(frozen=True)
class Plan:
    """Everything that is drawn before annotations are: scenes, image ids, splits."""

    seed: int
    size: str
    scenes: tuple[Scene, ...]
    sources: dict[str, dict[int, int]]
    """coco, vg, flickr, nlvr2, cc_train, cc_val: image id -> scene number. The same number, the same picture."""
    splits: dict[str, Splits]
    """Data set -> split -> image ids of its source (for NLVR2: of its pool of pictures)."""
    coco_of_vg: dict[int, int]

    def random(self, purpose: str) -> Random:
        """A generator of its own for every purpose, so that one does not shift another."""
        return Random(f"stopgo world {self.seed} {self.size} {purpose}")

    def examples(self, data_set: str, split: str) -> int:
        """How many examples to write."""
        return _scaled(EXAMPLES[data_set][split], self.size)

    def scene(self, source: str, image: int) -> Scene:
        return self.scenes[self.sources[source][image]]


def source_of(data_set: str) -> str:
    """The source whose image ids a data set uses."""
    if data_set in ("visual_genome_qa", "gqa", "visual7w"):
        return "vg"
    if data_set in ("flickr30k_retrieval", "snli_ve"):
        return "flickr"
    return "nlvr2" if data_set == "nlvr2" else "coco"


def _scaled(count: int, size: str) -> int:
    return max(round(count * SCALES[size]), 2)


def draw_plan(seed: int, size: str) -> Plan:
    """The plan of a world: a pure function of seed and size. Raises BadInput for an unknown size."""
    if size not in SCALES:
        raise BadInput("world size", f"{size!r} is not known", f"choose one of {', '.join(SCALES)}")
    random = Random(f"stopgo world {seed} {size} plan")
    counts = {name: _scaled(count, size) for name, count in PICTURES.items()}
    numbers = _Numbers()
    coco = dict(zip(_ids(random, counts["coco"], 9, 580_000), numbers, strict=False))
    later = dict(zip(_ids(random, counts["coco_test2015"], 581_000, 590_000), numbers, strict=False))
    linked = random.sample(sorted(coco), counts["vg_linked"])
    vg_ids = _ids(random, counts["vg_linked"] + counts["vg_own"], 2_300_000, 2_420_000)
    coco_of_vg = dict(zip(vg_ids, linked, strict=False))
    own = vg_ids[len(linked) :]
    vg = {image: coco[coco_of_vg[image]] for image in coco_of_vg} | dict(zip(own, numbers, strict=False))
    flickr = dict(zip(_ids(random, counts["flickr"], 1_000_000_000, 7_900_000_000), numbers, strict=False))
    pools = {split: numbers.take(counts[f"nlvr2_{split}"]) for split in ("train", "dev", "test1")}
    captioned = {split: dict(enumerate(numbers.take(counts[f"cc_{split}"]))) for split in ("train", "val")}
    sources = {
        "coco": coco | later, "vg": vg, "flickr": flickr, "nlvr2": {n: n for pool in pools.values() for n in pool},
        "cc_train": captioned["train"], "cc_val": captioned["val"],
    }  # fmt: skip
    splits = {
        **_coco_splits(random, list(coco), list(later), size),
        **_vg_splits(random, vg_ids[: len(linked)], own, size),
        **_flickr_splits(random, list(flickr), size),
        "nlvr2": pools,
    }
    scenes = tuple(draw_scene(random) for _ in range(numbers.used))
    return Plan(seed, size, scenes, sources, splits, coco_of_vg)


class _Numbers:
    """Scene numbers, handed out in order."""

    def __init__(self) -> None:
        self.used = 0

    def __iter__(self) -> _Numbers:
        return self

    def __next__(self) -> int:
        self.used += 1
        return self.used - 1

    def take(self, count: int) -> list[int]:
        return [next(self) for _ in range(count)]


def _ids(random: Random, count: int, low: int, high: int) -> list[int]:
    """Different image ids in random order."""
    return random.sample(range(low, high), count)


def _draw(random: Random, images: Iterable[int], count: int) -> list[int]:
    """Up to `count` of the images, at random. Sorted first: a set's order is not fixed."""
    every = sorted(images)
    return random.sample(every, min(count, len(every)))


def _cut(random: Random, images: Iterable[int], **counts: int) -> Splits:
    """Named parts of the images, in random order; what remains is `train`."""
    rest = _draw(random, images, 1 << 30)
    splits: Splits = {}
    for name, count in counts.items():
        splits[name], rest = rest[:count], rest[count:]
    return {"train": rest, **splits}


def _coco_splits(random: Random, block: list[int], later: list[int], size: str) -> dict[str, Splits]:
    def some(count: int) -> int:
        return _scaled(count, size)

    vqa = _cut(random, block, val=some(90))
    retrieval = _cut(random, block, test=some(80), val=some(80))
    retrieval["train"] = _draw(random, retrieval["train"], round(0.97 * len(retrieval["train"])))
    referred = set(block) - set(retrieval["test"])  # COCO's retrieval test pictures are in no RefCOCO
    refcoco = _cut(random, _draw(random, referred, some(550)), testA=some(40), testB=some(40), val=some(70))
    tests = set(refcoco["testA"] + refcoco["testB"])
    trained = set(refcoco["train"] + refcoco["val"])
    g_test = _draw(random, trained, some(38)) + _draw(random, referred - trained - tests, some(32))
    g_rest = _draw(random, tests, some(53)) + _draw(random, referred - tests - set(g_test), some(277))
    refcocog = {**_cut(random, g_rest, val=some(70)), "test": g_test}
    games_test = _draw(random, trained, some(16)) + _draw(random, referred - trained - tests, some(64))
    games = (
        _draw(random, tests - set(games_test), some(50))
        + _draw(random, set(g_test) - set(games_test), some(44))
        + _draw(random, retrieval["test"], some(37))
        + _draw(random, referred - tests - set(g_test) - set(games_test), some(520))
    )
    return {
        "vqa": {**vqa, "test": later},
        "coco_retrieval": retrieval,
        "refcoco": refcoco,
        "refcoco_plus": refcoco,
        "refcocog": refcocog,
        "guesswhat_pointing": {**_cut(random, set(games), val=some(80)), "test": games_test},
    }


def _vg_splits(random: Random, linked: list[int], own: list[int], size: str) -> dict[str, Splits]:
    def some(count: int) -> int:
        return _scaled(count, size)

    held_back = _cut(random, own, visual_genome_qa=some(70), gqa=some(70))
    shared = linked + held_back["train"]
    asked = _draw(random, shared, round(0.79 * len(shared)))
    pointed_test = _draw(random, linked, some(40)) + _draw(random, held_back["train"], some(40))
    pointed = _draw(random, set(linked) - set(pointed_test), some(150)) + _draw(
        random, set(held_back["train"]) - set(pointed_test), some(200)
    )
    return {
        "visual_genome_qa": {**_cut(random, shared, val=some(90)), "test": held_back["visual_genome_qa"]},
        "gqa": {**_cut(random, asked, val=some(90)), "test": held_back["gqa"]},
        "visual7w": {**_cut(random, pointed, val=some(70)), "test": pointed_test},
    }


def _flickr_splits(random: Random, images: list[int], size: str) -> dict[str, Splits]:
    """Two divisions of the same pictures; the test pictures of one are nearly all trained on by the other."""

    def some(count: int) -> int:
        return _scaled(count, size)

    retrieval = _cut(random, images, test=some(60), val=some(60))
    test = _draw(random, retrieval["test"], some(60) // 25) + _draw(
        random, set(images) - set(retrieval["test"]), some(60) - some(60) // 25
    )
    return {
        "flickr30k_retrieval": retrieval,
        "snli_ve": {**_cut(random, set(images) - set(test), val=some(60)), "test": test},
    }


def overlap(plan: Plan) -> dict[str, dict[str, float]]:
    """Table 1: per cent of the row's test pictures that are in the column's train or val set. The row itself is 0."""
    test, rest = {}, {}
    for name, splits in plan.splits.items():
        number = plan.sources[source_of(name)]
        test[name] = {number[image] for split in splits if "test" in split for image in splits[split]}
        rest[name] = {number[image] for split in splits if "test" not in split for image in splits[split]}
    return {
        row: {column: round(100 * len(test[row] & rest[column]) / len(test[row]), 1) for column in plan.splits}
        for row in plan.splits
    }
