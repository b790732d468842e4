"""The embedded world tells nothing to the blind, and its data sets share pictures as the paper's do."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator

import numpy as np
import pytest

from pipelines.examples import Label, SoftAnswers
from pipelines.world.plan import draw_plan, overlap
from pipelines.world.questions import draw_questions
from tests.pipelines.small_world import SPLITS, examples, world


def test_same_statement_has_every_label_equally_often() -> None:
    for name, classes in (("nlvr2", 2), ("snli_ve", 3)):
        for split in SPLITS:
            labels: dict[str, Counter[int]] = defaultdict(Counter)
            for example in examples(name, split):
                assert isinstance(example.target, Label)
                labels[example.text][example.target.index] += 1
            for text, counts in labels.items():
                assert len(counts) == classes and len(set(counts.values())) == 1, (text, counts)


def test_yes_and_no_are_equally_frequent_for_every_question() -> None:
    for name in ("vqa", "gqa"):
        said: dict[str, Counter[str]] = defaultdict(Counter)
        for example in examples(name, "train"):
            assert isinstance(example.target, SoftAnswers)
            best = str(example.target.answers[int(np.argmax(example.target.scores))])
            if best in ("yes", "no"):
                said[example.text][best] += 1
        assert len(said) > 50
        assert all(counts["yes"] == counts["no"] for counts in said.values())


# --- the default size: drawn, not rendered ----------------------------------------------------------------------------

TABLE_1 = {  # the paper's Table 1 where it is not 0: row's test pictures in column's train and val sets, per cent
    ("coco_retrieval", "vqa"): 100, ("refcoco", "vqa"): 100, ("refcocog", "vqa"): 100, ("visual7w", "vqa"): 50,
    ("guesswhat_pointing", "vqa"): 100, ("coco_retrieval", "visual_genome_qa"): 43,
    ("refcoco", "visual_genome_qa"): 36,
    ("visual7w", "visual_genome_qa"): 100, ("guesswhat_pointing", "visual_genome_qa"): 40, ("visual7w", "gqa"): 79,
    ("refcoco", "coco_retrieval"): 100, ("guesswhat_pointing", "coco_retrieval"): 96,
    ("snli_ve", "flickr30k_retrieval"): 98,
    ("flickr30k_retrieval", "snli_ve"): 94, ("refcocog", "refcoco"): 53, ("guesswhat_pointing", "refcoco"): 20,
    ("refcoco", "refcocog"): 66, ("coco_retrieval", "guesswhat_pointing"): 46, ("refcoco", "guesswhat_pointing"): 62,
    ("refcocog", "guesswhat_pointing"): 63, ("vqa", "gqa"): 0, ("gqa", "visual_genome_qa"): 0, ("nlvr2", "vqa"): 0,
    ("visual_genome_qa", "gqa"): 0, ("coco_retrieval", "refcoco"): 0, ("refcoco", "flickr30k_retrieval"): 0,
}  # fmt: skip


def test_overlap_is_about_that_of_the_paper() -> None:
    built = overlap(draw_plan(0, "default"))
    for (row, column), percent in TABLE_1.items():
        assert built[row][column] == pytest.approx(percent, abs=12), (row, column)
        assert percent or not built[row][column]


def test_recorded_overlap_is_that_of_the_files() -> None:
    """Counted from what the readers give, VG pictures joined to COCO's by the published image data."""
    coco_of_vg = {
        str(r["image_id"]): r["coco_id"] for r in json.loads((world() / "visual_genome/image_data.json").read_text())
    }

    def identity(name: str, image: str) -> str:
        if name in ("visual_genome_qa", "gqa", "visual7w"):
            return f"coco {coco_of_vg[image]}" if coco_of_vg[image] else f"vg {image}"
        if name in ("flickr30k_retrieval", "snli_ve", "nlvr2"):
            return f"{name == 'nlvr2'} {image}"
        return f"coco {image}"

    def of(name: str, *splits: str) -> set[str]:
        return {identity(name, image) for split in splits for e in examples(name, split) for image in e.images}

    recorded = json.loads((world() / "world.json").read_text())["test_images_in_train_or_val_percent"]
    for row in recorded:
        for column in recorded:
            test = of(row, "test")
            # pictures that happen to get no annotation of a set are in the plan only
            counted = 100 * len(test & of(column, "train", "val")) / len(test)
            assert counted == pytest.approx(recorded[row][column], abs=35), (row, column)
            assert (counted == 0) or recorded[row][column] > 0, (row, column)
    assert of("refcocog", "test") & of("vqa", "train")


def text_prior(train: Iterator[tuple[str, str]], test: list[tuple[str, str]]) -> float:
    """Accuracy of the most frequent training answer to the same text, else to texts with the same first words."""
    by_text: dict[str, Counter[str]] = defaultdict(Counter)
    for text, answer in train:
        for key in (text, *(" ".join(text.split()[:n]) for n in (0, 1, 2, 3, 4))):
            by_text[key][answer] += 1

    def guess(text: str) -> str:
        keys = [text, *(" ".join(text.split()[:n]) for n in (4, 3, 2, 1, 0))]
        return next(by_text[key] for key in keys if key in by_text).most_common(1)[0][0]

    return float(np.mean([guess(text) == answer for text, answer in test]))


@pytest.mark.parametrize(("name", "most"), [("vqa", 0.42), ("visual_genome_qa", 0.34), ("gqa", 0.5)])
def test_text_alone_says_little(name: str, most: float) -> None:
    plan = draw_plan(0, "default")
    train, test = (draw_questions(plan, name, split) for split in ("train", "val"))
    assert text_prior(((q.text, q.answer) for q in train), [(q.text, q.answer) for q in test]) < most
    closed = [(q.text, q.answer) for q in test if q.answer in ("yes", "no")]
    if closed:
        assert text_prior(((q.text, q.answer) for q in train), closed) < 0.58
    majority = Counter(q.answer for q in train).most_common(1)[0][1] / len(train)
    assert majority < 0.3
