"""Bad annotation files: each ends in `BadInput` that names the file, the record and the key."""

from __future__ import annotations

import gzip
import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipelines.errors import BadInput
from pipelines.examples import Example
from pipelines.readers import (
    captions,
    conceptual_captions,
    entities,
    gqa,
    guesswhat,
    nlvr2,
    refer,
    snli_ve,
    visual7w,
    visual_genome,
    visual_genome_regions,
    vqa,
)

Read = Callable[[Path], Iterator[Example]]

READERS: dict[str, Read] = {
    "vqa": lambda path: vqa.read(questions=[path]),
    "visual_genome": lambda path: visual_genome.read(questions=[path]),
    "visual_genome_regions": lambda path: visual_genome_regions.read(regions=[path]),
    "gqa": lambda path: gqa.read(questions=[path]),
    "captions": lambda path: captions.read(captions=[path]),
    "parallel": lambda path: captions.read_parallel(captions=[path], images=path),
    "conceptual_captions": lambda path: conceptual_captions.read(captions=path),
    "refer": lambda path: refer.read(refs=path, instances=path, split="train"),
    "visual7w": lambda path: visual7w.read(questions=path, split="train"),
    "guesswhat": lambda path: guesswhat.read(games=[path]),
    "nlvr2": lambda path: nlvr2.read(statements=[path]),
    "snli_ve": lambda path: snli_ve.read(pairs=[path]),
    "entities": lambda path: entities.read(sentences=path.parent, annotations=path.parent, images=path),
}


def message(read: Read, path: Path) -> str:
    with pytest.raises(BadInput) as caught:
        list(read(path))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", READERS)
def test_missing_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / "absent.json"
    assert f"{path}: no such file" in message(READERS[name], path)


@pytest.mark.parametrize("name", READERS)
def test_not_text_at_all(tmp_path: Path, name: str) -> None:
    path = tmp_path / "photo.json"
    path.write_bytes(b"\xff\xd8\xff\xe0\x00\x10JFIF\n")
    assert f"{path}: not UTF-8 text" in message(READERS[name], path)


@pytest.mark.parametrize("name", set(READERS) - {"parallel", "conceptual_captions", "entities"})
@pytest.mark.parametrize("content", ["3", '"text"', "[4]", '{"questions": 5, "annotations": 5, "images": []}'])
def test_json_of_another_shape(tmp_path: Path, name: str, content: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)
    assert str(path) in message(READERS[name], path)


@pytest.mark.parametrize("name", set(READERS) - {"parallel", "conceptual_captions", "entities"})
def test_truncated_json_and_gzip(tmp_path: Path, name: str) -> None:
    whole = json.dumps({"questions": [{"question_id": number} for number in range(500)]})
    cut = tmp_path / "cut.json"
    cut.write_text(whole[: len(whole) // 2])
    assert "truncated JSON at line 1" in message(READERS[name], cut)
    packed = tmp_path / "cut.json.gz"
    packed.write_bytes(gzip.compress(whole.encode())[:-30])
    assert f"{packed}: the gzip archive is truncated" in message(READERS[name], packed)


def write(path: Path, content: object) -> Path:
    path.write_bytes(pickle.dumps(content)) if path.suffix == ".pkl" else path.write_text(json.dumps(content))
    return path


RECORDS: list[tuple[str, str, object, str]] = [
    (
        "vqa",
        "q.json",
        {"questions": [{"question_id": 5, "image_id": 1}]},
        "questions[0] (question_id 5): no key 'question'",
    ),
    ("vqa", "q.json", {"info": 1}, "no key 'questions'"),
    ("vqa", "q.json", [{"img_id": "1", "question_id": 5, "sent": "a", "label": {"yes": 1.5}}], "a score of 1.5"),
    ("vqa", "q.json", [{"img_id": "1", "question_id": 5, "sent": 7}], "key 'sent' must be a text, not a number '7'"),
    ("visual_genome", "q.json", [{"id": 1, "qas": [{"qa_id": 3, "question": "Who?"}]}], "(qa_id 3): no key 'answer'"),
    (
        "visual_genome",
        "q.pkl",
        [{"question_id": 3, "image_id": 1, "question": "Who?"}],
        "[0] (question_id 3): no key 'labels'",
    ),
    (
        "visual_genome",
        "q.pkl",
        [{"question_id": 3, "image_id": 1, "question": "Who?", "labels": [1], "scores": []}],
        "1 labels but 0 scores",
    ),
    ("visual_genome_regions", "r.json", [{"id": 1, "regions": [{"x": 1, "y": 1, "width": 2}]}], "no key 'height'"),
    ("gqa", "q.json", {"071": {"question": "Who?"}}, "question 071: no key 'imageId'"),
    ("captions", "c.jsonl", {"id": 1, "sentences": ["a", 2]}, "line 1 (id 1): key 'sentences' must be a list of texts"),
    ("captions", "c.json", {"annotations": [{"id": 1, "image_id": 2}]}, "annotations[0] (id 1): no key 'caption'"),
    ("refer", "r.json", {"annotations": [{"id": 1, "bbox": [1, 2, 3]}]}, "key 'bbox' must be a list of four finite"),
    ("refer", "r.json", {"annotations": [{"id": 1, "bbox": [1, 2, -3, 4]}]}, "a box of width -3"),
    ("visual7w", "v.json", {"boxes": [{"box_id": 1}], "images": []}, "boxes[0]: no key 'x'"),
    ("visual7w", "v.json", {"boxes": [], "images": [{"split": "val"}]}, "no image of split 'train' (it has val)"),
    ("guesswhat", "g.jsonl", {"id": 1, "image": {"id": 2}, "qas": [{"question": "a"}]}, "qas[0]: no key 'answer'"),
    (
        "guesswhat",
        "g.jsonl",
        {"id": 1, "image": {"id": 2}, "qas": [], "object_id": 4, "objects": []},
        "line 1 (id 1): object_id 4 is none of its 0 objects",
    ),
    ("nlvr2", "n.jsonl", {"identifier": "dev-1", "sentence": "a"}, "identifier 'dev-1'"),
    ("nlvr2", "n.jsonl", {"identifier": "dev-1-0-0", "sentence": "a", "label": "maybe"}, "label 'maybe'"),
    ("snli_ve", "s.jsonl", {"pairID": "a", "gold_label": "no"}, "line 1 (pairID a): gold_label 'no'"),
    ("snli_ve", "s.jsonl", {"pairID": "a", "gold_label": "neutral"}, "no key 'Flikr30kID' or 'Flickr30K_ID' or"),
    ("entities", "list.txt", 17, "17.xml: no such file"),
]


@pytest.mark.parametrize(("name", "file", "content", "expected"), RECORDS)
def test_records_name_file_record_and_key(tmp_path: Path, name: str, file: str, content: object, expected: str) -> None:
    path = write(tmp_path / file, content)
    text = message(READERS[name], path)
    assert expected in text
    assert str(tmp_path) in text


def test_an_annotation_without_answers(tmp_path: Path) -> None:
    questions = write(tmp_path / "q.json", {"questions": []})
    for answers, expected in [
        ([{"answer": "a"}, {"text": "b"}], "annotations[0].answers[1]: no key 'answer'"),
        ([{"answer": 4}], "annotations[0].answers[0]: key 'answer' must be a text"),
        (["a"], "annotations[0].answers[0]: an object is expected, not a text"),
    ]:
        annotations = write(tmp_path / "a.json", {"annotations": [{"question_id": 5, "answers": answers}]})
        assert expected in message(lambda path: vqa.read(questions=[questions], annotations=[path]), annotations)


def test_a_question_without_annotation(tmp_path: Path) -> None:
    questions = write(tmp_path / "q.json", {"questions": [{"question_id": 5, "image_id": 1, "question": "a"}]})
    annotations = write(tmp_path / "a.json", {"annotations": []})
    expected = "questions[0] (question_id 5): no annotation answers this question"
    assert expected in message(lambda path: vqa.read(questions=[path], annotations=[annotations]), questions)
    twice = message(lambda path: vqa.read(questions=[path], annotations=[path], targets=[path]), questions)
    assert "name one of the two" in twice


@pytest.mark.parametrize("options", [{"part": "middle"}, {"part": "tail", "last": 2}, {"part": "head", "last": "1"}])
def test_parts_that_cannot_be_cut(tmp_path: Path, options: dict[str, object]) -> None:
    questions = write(tmp_path / "q.json", {"questions": [{"question_id": 5, "image_id": 1, "question": "a"}]})
    message(lambda path: vqa.read(questions=[path], **options), questions)  # type: ignore[arg-type]


def test_refs_of_other_instances_and_absent_splits(tmp_path: Path) -> None:
    sentence = {"raw": "man", "sent_id": 1}
    ref = {"ref_id": 1, "ann_id": 9, "image_id": 5, "split": "train", "sentences": [sentence]}
    refs = write(tmp_path / "refs.json", [ref])
    instances = write(tmp_path / "instances.json", {"annotations": []})
    assert "(ref_id 1): ann_id 9 is not in" in message(
        lambda path: refer.read(refs=path, instances=instances, split="train"), refs
    )
    assert "no expression of split 'test' (it has train)" in message(
        lambda path: refer.read(refs=path, instances=instances, split="test"), refs
    )


def test_a_visual7w_option_that_is_no_box(tmp_path: Path) -> None:
    pair = {"qa_id": 8, "question": "Which?", "answer": 30, "multiple_choices": [1]}
    content = {"boxes": [], "images": [{"image_id": 1, "split": "train", "qa_pairs": [pair]}]}
    assert "(qa_id 8): box 1 is none of the 0 boxes of image 1" in message(
        READERS["visual7w"], write(tmp_path / "v.json", content)
    )


def test_captions_of_listed_images_must_exist(tmp_path: Path) -> None:
    file = write(tmp_path / "c.jsonl", {"id": 1, "sentences": ["a"]})
    listed = tmp_path / "list.txt"
    listed.write_text("1\n2\n")
    expected = f"{listed}: 1 images have no caption, the first is 2"
    assert expected in message(lambda path: captions.read(captions=[path], images=listed), file)


def test_parallel_captions_of_another_length(tmp_path: Path) -> None:
    (tmp_path / "en").write_text("a\nb\n")
    (tmp_path / "images.txt").write_text("1.jpg\n")
    text = message(
        lambda path: captions.read_parallel(captions=[path], images=tmp_path / "images.txt"), tmp_path / "en"
    )
    assert "2 captions for the 1 images" in text


@pytest.mark.parametrize(
    ("sentence", "xml", "expected"),
    [
        ("[/EN#1/people A girl", "<annotation/>", "7.txt:1: a phrase mark"),
        ("", "<annotation>", "7.xml: malformed or truncated XML"),
        ("", '<!DOCTYPE a [<!ENTITY b "c">]><annotation/>', "7.xml: XML with declarations"),
        ("", "<a><object><bndbox><xmin>x</xmin></bndbox></object></a>", "7.xml: xmin 'x' of a bndbox"),
    ],
)
def test_entities(tmp_path: Path, sentence: str, xml: str, expected: str) -> None:
    (tmp_path / "7.txt").write_text(sentence + "\n")
    (tmp_path / "7.xml").write_text(xml)
    (tmp_path / "images.lst").write_text("7\n")
    assert expected in message(READERS["entities"], tmp_path / "images.lst")


def test_malformed_csv(tmp_path: Path) -> None:
    path = tmp_path / "dev.csv"
    path.write_text('pairID,Flickr30kID,hypothesis,gold_label\n1,2.jpg,"a man,neutral\n')
    assert "malformed CSV" in message(READERS["snli_ve"], path)
    path.write_text("pairID,Flickr30kID,hypothesis,gold_label\n1,2.jpg\n")
    assert "line 2 (pairID 1): no key 'gold_label'" in message(READERS["snli_ve"], path)
