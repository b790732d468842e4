"""Answers: normalisation, soft scores, vocabularies."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from pipelines.answers import Answers, count_answers, normalise_answer, soft_scores
from pipelines.errors import BadInput
from pipelines.examples import Example, Matching, SoftAnswers
from pipelines.files import open_json
from pipelines.readers import vqa
from tests.reference import reference

FORMS = ("trainval_label2ans.json", "trainval_ans2label.json", "trainval_label2ans.pkl", "trainval_ans2label.pkl")


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("A clock.", "clock"),
        ("the Red  one", "red 1"),
        ("none", "0"),
        ("Ten", "10"),
        ("dont know", "don't know"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("oclock", "o'clock"),
        ("well", "well"),
        ("10,000", "10000"),
        ("black, white", "black white"),
        ("black/white", "black white"),
        ("t-shirt", "t shirt"),
        ("yes!", "yes"),
        ("yes !", "yes"),
        ("3.50", "3.50"),
        ("st. john", "st john"),
        ("a", ""),
        (" tab\tand\nline ", "tab and line"),
    ],
)
def test_normalise(answer: str, expected: str) -> None:
    assert normalise_answer(answer) == expected


@pytest.mark.parametrize("name", ["trainval_label2ans.json", "uniter_ans2label.json"])
def test_published_vocabularies_are_fixed_points(name: str) -> None:
    for answer in open_json(reference(f"data/vqav2/labels/{name}")):
        assert normalise_answer(answer) == answer


def test_soft_scores_by_count() -> None:
    answers = ["red"] * 4 + ["Red."] + ["blue"] * 3 + ["the green", "green"]
    assert soft_scores(answers) == {"red": 1.0, "blue": 0.9, "green": 0.6}
    assert soft_scores(["one"]) == {"1": 0.3}


def test_real_answers_are_in_the_published_vocabulary() -> None:
    folder = reference("data/vqav2/subset60k")
    answers = Answers.load(reference("data/vqav2/labels/trainval_label2ans.json"))
    questions, annotations = (folder / f"vqa_{kind}_valid.json.gz" for kind in ("questions", "annotations"))
    examples = list(vqa.read(questions=[questions], annotations=[annotations]))
    counts = count_answers(examples)
    known = sum(count for answer, count in counts.items() if answers.label(answer) is not None)
    assert known / len(examples) == pytest.approx(0.936, abs=0.01)
    targets = [example.target for example in examples if isinstance(example.target, SoftAnswers)]
    yes = sum(dict(zip(target.answers, target.scores, strict=True)).get("yes", 0.0) for target in targets)
    assert yes / len(examples) == pytest.approx(0.212, abs=0.005)


def in_order(path: Path) -> list[str]:
    answers = Answers.load(path)
    listed = [answers.answer(label) for label in range(len(answers))]
    assert [answers.label(answer) for answer in listed] == list(range(len(answers)))
    return listed


def test_published_gqa_vocabulary_in_all_forms() -> None:
    forms = [in_order(reference(f"data/gqa/{name}")) for name in FORMS]
    assert len(forms[0]) == 1_842
    assert all(form == forms[0] for form in forms)


def test_published_vqa_vocabularies_differ_in_order() -> None:
    """LXMERT's files agree; others number the same 3,129 answers differently: targets belong to one vocabulary."""
    lxmert, inverse = (in_order(reference(f"data/vqav2/labels/{name}")) for name in (FORMS[0], FORMS[1]))
    assert len(lxmert) == 3_129
    assert lxmert == inverse
    for name in ("trainval_ans2label.pkl", "uniter_ans2label.json"):
        other = in_order(reference(f"data/vqav2/labels/{name}"))
        assert set(other) == set(lxmert)
        assert other != lxmert


def test_labels(tmp_path: Path) -> None:
    answers = Answers(["yes", "no"])
    assert answers.label("no") == 1
    assert answers.label("maybe") is None
    assert answers.label(1) == 1
    with pytest.raises(BadInput, match="has 2 answers, a target names class 2"):
        answers.label(2)
    with pytest.raises(IndexError):
        answers.answer(-1)


def test_build_save_load(tmp_path: Path) -> None:
    examples = [
        Example(str(number), "?", ("1",), SoftAnswers((answer, "rare"), (1.0, 0.3)))
        for number, answer in enumerate(["b", "b", "a", "c", "c", "ü"])
    ]
    examples.append(Example("x", "?", ("1",), Matching()))
    examples.append(Example("y", "?", ("1",), SoftAnswers((3,), (1.0,))))
    counts = count_answers(examples)
    assert counts == {"b": 2, "a": 1, "c": 2, "ü": 1}
    built = Answers.build(counts, size=3)
    assert [built.answer(label) for label in range(len(built))] == ["b", "c", "a"]
    assert len(Answers.build(counts, min_count=2)) == 2
    path = tmp_path / "trainval_label2ans.json"
    Answers.build(counts).save(path)
    assert json.loads(path.read_text()) == ["b", "c", "a", "ü"]
    assert Answers.load(path).label("ü") == 3
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([], "without answers"),
        (["a", "b", "a"], "'a' stands twice"),
        (["a", 3], "answer 3 is a number"),
        ({"a": 0, "b": 2}, "class numbers are not 0 … 1"),
        ({"a": 0, "b": 0}, "class numbers are not 0 … 1"),
        ({"a": "0"}, "class numbers are not"),
        (5, "a list or an object, not a number"),
    ],
)
@pytest.mark.parametrize("suffix", [".json", ".pkl"])
def test_bad_vocabularies(tmp_path: Path, content: object, expected: str, suffix: str) -> None:
    path = tmp_path / f"trainval_label2ans{suffix}"
    path.write_bytes(json.dumps(content).encode() if suffix == ".json" else pickle.dumps(content))
    with pytest.raises(BadInput, match=expected) as caught:
        Answers.load(path)
    assert str(path) in str(caught.value)
