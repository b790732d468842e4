from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray

from pipelines import datasets
from pipelines.answers import Answers
from pipelines.boxes import xywh_to_xyxy
from pipelines.errors import BadInput
from pipelines.examples import Choice, Label, Matching
from pipelines.negatives import CaptionPool, load_hard_pool
from tests.pipelines import small


@pytest.fixture
def sheet(tmp_path: Path) -> Path:
    return small.build(tmp_path)


def replace(name: str, number: int, **changes: Any) -> None:
    small.EXAMPLES[name][number] = dataclasses.replace(small.EXAMPLES[name][number], **changes)


def test_columns_hold_the_examples(sheet: Path) -> None:
    data = small.load(sheet, "answers")
    examples = small.EXAMPLES["answers"]
    assert len(data) == len(examples)
    assert data.ids.tolist() == [example.id for example in examples]
    assert [data.group_names[code] for code in data.group_codes] == [example.group for example in examples]
    keys = data.store.keys()
    assert [keys[row] for row in data.image_rows[:, 0]] == [example.images[0] for example in examples]
    assert data.token_ids.dtype == np.int32
    assert np.diff(data.token_offsets).max() <= data.spec.max_tokens


def test_chunks_change_nothing(sheet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in small.SPECS:
        whole = small.load(sheet, name)
        monkeypatch.setattr(datasets, "CHUNK", 7)
        parts = small.load(sheet, name)
        monkeypatch.undo()
        for field in ("token_ids", "token_offsets", "image_rows", "group_codes", "candidate_rows", "ids"):
            np.testing.assert_array_equal(getattr(whole, field), getattr(parts, field))
        for column in dataclasses.fields(whole.target) if whole.target else ():
            np.testing.assert_array_equal(getattr(whole.target, column.name), getattr(parts.target, column.name))


def test_missing_features_are_refused_or_counted(sheet: Path) -> None:
    replace("pairs", 3, images=("1", "nowhere"))
    replace("pairs", 5, images=("elsewhere", "nowhere"))
    with pytest.raises(BadInput, match=r"example pairs-3: no features of image 'nowhere'.*2 images, 2 examples in all"):
        small.load(sheet, "pairs")
    data = small.load(sheet, "pairs", allow_missing=True)
    assert (len(data), data.missing_examples, data.missing_images) == (38, 2, ("nowhere", "elsewhere"))


def test_answers_come_from_the_sheet_or_the_caller(sheet: Path) -> None:
    few: Any = small.load(sheet, "answers", answers=Answers(["yes"])).target
    all_four: Any = small.load(sheet, "answers").target
    assert set(few.labels.tolist()) == {0}
    assert len(few.labels) < len(all_four.labels)
    content = yaml.safe_load(sheet.read_text())
    del content["sets"]["answers"]["answers"]
    sheet.write_text(yaml.safe_dump(content))
    with pytest.raises(BadInput, match=r"sets\.answers\.answers: missing"):
        small.load(sheet, "answers")


def test_a_vocabulary_without_any_of_the_answers_is_refused(sheet: Path) -> None:
    with pytest.raises(BadInput, match="no answer of its 40 examples is in the vocabulary"):
        small.load(sheet, "answers", answers=Answers(["maybe"]))


def test_a_target_of_another_kind_is_refused(sheet: Path) -> None:
    replace("answers", 2, target=Label(1))
    with pytest.raises(BadInput, match="gives Label where SoftAnswers is wanted"):
        small.load(sheet, "answers")


def test_answers_for_some_examples_only_are_refused(sheet: Path) -> None:
    replace("answers", 2, target=None)
    with pytest.raises(BadInput, match="only 39 of 40 examples have an answer"):
        small.load(sheet, "answers")


def test_a_wrong_number_of_images_is_refused(sheet: Path) -> None:
    replace("pairs", 2, images=("1",))
    with pytest.raises(BadInput, match="example pairs-2: 1 images where the task row says 2"):
        small.load(sheet, "pairs")


def test_an_empty_split_is_refused(sheet: Path) -> None:
    small.EXAMPLES["answers"] = []
    with pytest.raises(BadInput, match=r"sets\.answers\.train: the annotations hold no example"):
        small.load(sheet, "answers")


def test_a_split_that_the_sheet_does_not_have(sheet: Path) -> None:
    with pytest.raises(BadInput, match=r"sets\.answers\.test: the sheet does not have this split"):
        small.load(sheet, "answers", "test")


def annotated(sheet: Path) -> dict[str, NDArray[np.float32]]:
    store: Any = small.load(sheet, "pointing").candidates
    return {key: store.record(key).boxes.copy() for key in list(store.keys())}


def rewrite(sheet: Path, name: str, boxes: dict[str, NDArray[np.float32]]) -> None:
    small.write_store(sheet.parent / name, boxes)
    sheet.write_text(sheet.read_text().replace("annotated.lmdb", name))


def test_annotated_boxes_must_have_features(sheet: Path) -> None:
    content = yaml.safe_load(sheet.read_text())
    del content["sets"]["pointing"]["candidates"]
    sheet.write_text(yaml.safe_dump(content))
    with pytest.raises(BadInput, match=r"sets\.pointing\.candidates: missing"):
        small.load(sheet, "pointing")


def test_an_image_without_annotated_features(sheet: Path) -> None:
    boxes = annotated(sheet)
    gone = small.EXAMPLES["pointing"][0].images[0]
    rewrite(sheet, "fewer.lmdb", {key: value for key, value in boxes.items() if key != gone})
    with pytest.raises(BadInput, match=f"example pointing-0: no annotated boxes of image '{gone}'"):
        small.load(sheet, "pointing")


def test_other_boxes_in_the_store_are_refused(sheet: Path) -> None:
    rewrite(sheet, "turned.lmdb", {key: value[::-1] for key, value in annotated(sheet).items()})
    with pytest.raises(BadInput, match=r"example pointing-0: its . annotated boxes are not the . of image"):
        small.load(sheet, "pointing")


def test_boxes_that_differ_by_rounding_are_accepted(sheet: Path) -> None:
    rewrite(sheet, "rounded.lmdb", {key: np.round(value) for key, value in annotated(sheet).items()})
    assert len(small.load(sheet, "pointing")) == 40


def test_a_store_of_widths_and_heights_is_named_as_such(tmp_path: Path) -> None:
    """Boxes whose x, y, width, height read as corners too: only the comparison tells."""
    sheet = small.build(tmp_path)
    corners = {image: np.array([[5, 5, 40, 40], [10, 8, 60, 50], [2, 3, 30, 30]], np.float32) for image in small.IMAGES}
    target = Choice(tuple(map(tuple, xywh_to_xyxy(corners["1"]).tolist())), (0, 1, 2), 1)
    small.EXAMPLES["pointing"] = [dataclasses.replace(e, target=target) for e in small.EXAMPLES["pointing"]]
    rewrite(sheet, "xywh.lmdb", corners)
    with pytest.raises(BadInput, match="its boxes are x, y, width, height, not corners"):
        small.load(sheet, "pointing")


def test_an_answer_is_never_cut_off(sheet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(small.SPECS, "pointing", dataclasses.replace(small.SPECS["pointing"], max_regions=3))
    with pytest.raises(BadInput, match="annotated boxes do not fit max_regions 3"):
        small.load(sheet, "pointing")


def test_retrieval_needs_two_images(sheet: Path) -> None:
    small.EXAMPLES["captions"] = [dataclasses.replace(e, images=("1",)) for e in small.EXAMPLES["captions"]]
    with pytest.raises(BadInput, match="captions of one image only"):
        small.load(sheet, "captions")
    assert all(isinstance(e.target, Matching) for e in small.EXAMPLES["captions"])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": np.array(small.IMAGES)}, "not a pool of hard negatives"),
        ({"images": np.array(small.IMAGES), "pool": np.zeros((3, 2), int)}, "do not fit"),
        ({"images": np.array(small.IMAGES), "pool": np.full((12, 2), 12)}, "do not fit"),
        ({"images": np.array(small.IMAGES), "pool": np.arange(12)[:, None]}, "no hard neighbour for"),
        ({"images": np.array(small.IMAGES, object), "pool": np.zeros((12, 2), int)}, "not a pool of hard negatives"),
    ],
)
def test_bad_pools_are_refused(sheet: Path, arrays: dict[str, Any], message: str) -> None:
    data: Any = small.load(sheet, "captions")
    np.savez(sheet.parent / "pool.npz", **arrays)
    with pytest.raises(BadInput, match=message):
        load_hard_pool(sheet.parent / "pool.npz", data.pool, data.store)


def test_the_sheet_names_the_pool_for_training_only(sheet: Path) -> None:
    np.savez(sheet.parent / "pool.npz", images=np.array(small.IMAGES), pool=(np.arange(24).reshape(12, 2) + 1) % 12)
    content = yaml.safe_load(sheet.read_text())
    content["sets"]["captions"]["hard_negatives"] = "pool.npz"
    sheet.write_text(yaml.safe_dump(content))
    pools: list[Any] = [small.load(sheet, "captions", split).pool for split in ("train", "val")]
    assert [pool.hard is None for pool in pools] == [False, True]


def test_caption_pools_know_their_captions() -> None:
    pool = CaptionPool.of(np.array([4, 2, 4, 9], np.int32), "here")
    assert pool.images.tolist() == [2, 4, 9]
    assert pool.position.tolist() == [1, 0, 1, 2]
    captions = np.split(pool.captions, pool.offsets[1:-1])
    assert [of_image.tolist() for of_image in captions] == [[1], [0, 2], [3]]
