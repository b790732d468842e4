"""Readers on small hand-made files: forms of which no real record is at hand, and what the rules say about them."""

from __future__ import annotations

import gzip
import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from pipelines.examples import Choice, Example, Label, SoftAnswers
from pipelines.readers import (
    captions,
    conceptual_captions,
    gqa,
    guesswhat,
    nlvr2,
    refer,
    snli_ve,
    visual7w,
    visual_genome,
    vqa,
)


def write(path: Path, content: object) -> Path:
    """JSON, or JSON lines for a list under a `.jsonl` name, or a pickle."""
    if path.suffix == ".pkl":
        path.write_bytes(pickle.dumps(content, protocol=3))
    elif path.suffix == ".jsonl" and isinstance(content, list):
        path.write_text("".join(json.dumps(item) + "\n" for item in content))
    else:
        path.write_text(json.dumps(content))
    return path


QUESTIONS = {
    "questions": [
        {"question_id": 7, "image_id": 131486, "question": "What is it?"},
        {"question_id": 5, "image_id": 131486, "question": "Is it red?"},
    ]
}


def test_vqa_with_the_authors_target_cache(tmp_path: Path) -> None:
    questions = write(tmp_path / "questions.json", QUESTIONS)
    cache = [
        {"question_id": 5, "image_id": 131486, "labels": [3, 9], "scores": [1, 0.3]},
        {"question_id": 7, "image_id": 131486, "labels": [], "scores": []},
    ]
    targets = write(tmp_path / "train_target.pkl", cache)
    assert list(vqa.read(questions=[questions], targets=[targets])) == [
        Example("5", "Is it red?", ("131486",), SoftAnswers((3, 9), (1.0, 0.3))),
        Example("7", "What is it?", ("131486",), SoftAnswers((), ())),
    ]


def test_vqa_in_processed_form_packed_under_any_name(tmp_path: Path) -> None:
    rows = [{"img_id": "COCO_val2014_000000131486", "question_id": 1, "sent": "Red?", "label": {"yes": 1, "red": 0.3}}]
    path = tmp_path / "minival.gzip"
    path.write_bytes(gzip.compress(json.dumps(rows).encode()))
    expected = Example("1", "Red?", ("131486",), SoftAnswers(("yes", "red"), (1.0, 0.3)))
    assert list(vqa.read(questions=[path])) == [expected]


@pytest.mark.parametrize("reader", [visual_genome.read, gqa.read])
def test_caches_that_carry_their_questions(tmp_path: Path, reader: Any) -> None:
    rows = [
        {"question_id": number, "image_id": 12, "question": f"Q{number}?", "labels": [number], "scores": [1.0]}
        for number in (30, 4, 200)
    ]
    path = write(tmp_path / "trainval_target.pkl", rows)
    assert [example.id for example in reader(questions=[path], part="head", last=1)] == ["4", "30"]
    tail = list(reader(questions=[path], part="tail", last=1))
    assert tail == [Example("200", "Q200?", ("12",), SoftAnswers((200,), (1.0,)))]


def test_a_gqa_folder_counts_as_one_file(tmp_path: Path) -> None:
    for number in (2, 1):
        question = {f"0{number}": {"imageId": "n16", "question": "Who?", "answer": "man"}}
        write(tmp_path / f"train_all_questions_{number}.json", question)
    tail = list(gqa.read(questions=[tmp_path], part="tail", last=1))
    assert tail == [Example("02", "Who?", ("n16",), SoftAnswers(("man",), (1.0,)))]


def test_captions_go_by_file_name_not_by_row_number(tmp_path: Path) -> None:
    path = write(
        tmp_path / "all_data_final.jsonline", {"id": 3, "img_path": "1018148011.jpg", "sentences": ["A.", "B."]}
    )
    assert [(e.id, e.images) for e in captions.read(captions=[path])] == [
        ("1018148011/0", ("1018148011",)),
        ("1018148011/1", ("1018148011",)),
    ]


def test_conceptual_captions_are_numbered_by_line(tmp_path: Path) -> None:
    path = tmp_path / "train.tsv"
    path.write_text('a dog\thttp://x/1\nquote " here\thttp://x/2\n')
    assert [(e.id, e.text, e.images) for e in conceptual_captions.read(captions=path)] == [
        ("0", "a dog", ("0",)),
        ("1", 'quote " here', ("1",)),
    ]


def test_refs_as_json_with_testa_and_testb(tmp_path: Path) -> None:
    def ref(number: int, split: str) -> dict[str, object]:
        sentences = [{"raw": f"man {number}", "sent": "x", "sent_id": number}]
        return {"ref_id": number, "ann_id": 9, "image_id": 5, "split": split, "sentences": sentences}

    refs = write(tmp_path / "refs(unc).json", [ref(1, "testA"), ref(2, "val"), ref(3, "testB")])
    instances = write(tmp_path / "instances.json", {"annotations": [{"id": 9, "bbox": [1, 2, 3.5, 4]}]})
    examples = list(refer.read(refs=refs, instances=instances, split="test"))
    assert [(e.id, e.text, e.group) for e in examples] == [("1/1", "man 1", "testA"), ("3/3", "man 3", "testB")]
    assert [e.id for e in refer.read(refs=refs, instances=instances, split="testB")] == ["3/3"]
    assert examples[0].target.boxes == ((1.0, 2.0, 4.5, 6.0),)  # type: ignore[union-attr]


def visual7w_file(path: Path) -> Path:
    boxes = [
        {"box_id": number, "image_id": image, "x": number, "y": 0, "width": 10, "height": 20, "name": "cup"}
        for number, image in ((40, 1), (10, 1), (30, 1), (20, 1), (50, 1), (60, 2))
    ]
    pair = {"qa_id": 8, "question": "Which cup?", "type": "which", "answer": 30, "multiple_choices": [50, 10, 40]}
    images = [
        {"image_id": 1, "filename": "v7w_1.jpg", "split": "train", "qa_pairs": [pair]},
        {"image_id": 2, "filename": "v7w_2.jpg", "split": "val", "qa_pairs": []},
    ]
    return write(path, {"dataset": "visual7w-pointing", "boxes": boxes, "images": images})


def test_visual7w_options_stand_in_box_id_order(tmp_path: Path) -> None:
    examples = list(visual7w.read(questions=visual7w_file(tmp_path / "v7w.json"), split="train"))
    candidates = tuple((float(x), 0.0, float(x + 10), 20.0) for x in (10, 20, 30, 40, 50))
    assert examples == [Example("8", "Which cup?", ("1",), Choice(candidates, choices=(0, 2, 3, 4), answer=1))]


GAME = {
    "id": 1,
    "image": {"id": 77},
    "object_id": 5,
    "objects": [{"id": 9, "bbox": [0, 0, 2, 2]}, {"id": 5, "bbox": [1, 1, 4, 4]}],
    "qas": [{"question": "is it big?", "answer": "N/A"}],
    "status": "failure",
}


def test_guesswhat_candidates_are_the_objects_of_all_games_on_the_image(tmp_path: Path) -> None:
    other = {**GAME, "id": 2, "object_id": 7, "objects": [{"id": 7, "bbox": [3, 3, 1, 1]}], "status": "success"}
    path = write(tmp_path / "games.jsonl", [GAME, other])
    first, second = guesswhat.read(games=[path])
    assert first.target == Choice(((1, 1, 5, 5), (3, 3, 4, 4), (0, 0, 2, 2)), choices=(0, 2), answer=0)
    assert second.target == Choice(((1, 1, 5, 5), (3, 3, 4, 4), (0, 0, 2, 2)), choices=(1,), answer=0)
    assert first.text == "start is it big? answer N/A stop "
    assert [game.id for game in guesswhat.read(games=[path], successful_only=True)] == ["2"]


@pytest.mark.parametrize("image", [{"picture": {"id": 77}}, {"picture_id": 77}, {"image_id": "77"}])
def test_guesswhat_older_spellings(tmp_path: Path, image: dict[str, object]) -> None:
    game = {key: value for key, value in GAME.items() if key not in ("id", "image")}
    path = write(tmp_path / "games.jsonl", [{**game, **image, "dialogue_id": 12}])
    example = next(guesswhat.read(games=[path]))
    assert (example.id, example.images) == ("12", ("77",))


def test_guesswhat_with_the_authors_caches(tmp_path: Path) -> None:
    games = write(tmp_path / "games.jsonl", [GAME])
    objects = write(tmp_path / "image_bbox_list.pkl", {77: {"bboxes": [9, 5, 6]}, 78: {"bboxes": []}})
    boxes = write(tmp_path / "bboxes_dict.pkl", {9: [0, 0, 2, 2], 5: [1, 1, 4, 4], 6: [7.5, 8, 9, 9]})
    example = next(guesswhat.read(games=[games], image_objects=objects, object_boxes=boxes))
    assert example.target == Choice(((1, 1, 4, 4), (7.5, 8, 9, 9), (0, 0, 2, 2)), choices=(0, 2), answer=0)


def test_nlvr2_without_labels_is_a_test_split(tmp_path: Path) -> None:
    path = write(tmp_path / "test2.jsonl", [{"identifier": "test2-0-1-2", "sentence": "Two dogs."}])
    assert list(nlvr2.read(statements=[path])) == [
        Example("test2-0-1-2", "Two dogs.", ("test2-0-1-img0", "test2-0-1-img1"), None, "test2-0-2")
    ]


def test_snli_ve_without_agreement_has_no_class(tmp_path: Path) -> None:
    row = {"pairID": "5.jpg#1r1n", "Flikr30kID": "5.jpg", "sentence2": "A man.", "gold_label": "-"}
    path = write(tmp_path / "snli_ve_dev.jsonl", [row])
    assert list(snli_ve.read(pairs=[path])) == [Example("5.jpg#1r1n", "A man.", ("5",), Label(-1))]
