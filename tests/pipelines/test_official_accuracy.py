"""VQA's accuracy against the published rule, written here once more, straight from the ten answers."""

from __future__ import annotations

import re
from functools import cache

import pytest

from pipelines.answers import official_accuracy, soft_scores
from pipelines.errors import BadInput
from pipelines.files import open_json
from pipelines.readers.vqa import people
from tests.reference import reference

MARKS = ';/[]"{}()=+\\_-><@`,?!'
WORDS = ["none", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
NUMBERS = dict(zip(WORDS, ["0", "0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "10"], strict=True))


@cache
def normalised(answer: str) -> str:
    """As the published script does it, but for contractions, which the real answers have in the right form already."""
    text = answer
    for mark in MARKS:
        drop = f"{mark} " in answer or f" {mark}" in answer or re.search(r"\d,\d", answer)
        text = text.replace(mark, "" if drop else " ")
    words = re.sub(r"\.(?!\d)", "", text).lower().split()
    return " ".join(NUMBERS.get(word, word) for word in words if word not in ("a", "an", "the"))


def accuracy(answer: str, ten: list[str]) -> float:
    """The mean over the ten subsets of nine of min(how many of them said it / 3, 1)."""
    ten = [other.replace("\n", " ").replace("\t", " ").strip() for other in ten]
    if len(set(ten)) > 1:
        answer, ten = normalised(answer), [normalised(other) for other in ten]
    subsets = [ten[:i] + ten[i + 1 :] for i in range(len(ten))]
    return sum(min(1.0, sum(other == answer for other in nine) / 3) for nine in subsets) / len(subsets)


def test_real_rows() -> None:
    """Every answer that somebody gave to a question, "yes", and one that nobody gave."""
    path = reference("data/vqav2/subset60k/vqa_annotations_valid.json.gz")
    given, compared, differing = people([path]), 0, 0
    rows = {str(row["question_id"]): row for row in open_json(path)["annotations"]}
    assert given.keys() == rows.keys() and len(rows) == 8977
    for question, row in rows.items():
        ten = [answer["answer"] for answer in row["answers"]]
        assert given[question] == tuple(ten) and len(ten) == 10
        soft = soft_scores(ten)
        for candidate in {*soft, "yes", "nobody says so"}:
            expected = accuracy(candidate, ten)
            assert official_accuracy(candidate, ten) == pytest.approx(expected, abs=1e-12), (question, candidate)
            differing += abs(expected - soft.get(candidate, 0.0)) > 1e-9
            compared += 1
    assert compared > 30_000
    assert 0 < differing < 10  # the soft score differs only where all ten typed what the normalisation changes


@pytest.mark.parametrize(
    ("answer", "given", "expected"),
    [
        ("red", ["red"] * 10, 1.0),
        ("red", ["Red", *["blue"] * 9], 0.3),
        ("red", ["the red", "red.", *["blue"] * 8], 0.6),
        ("red", ["red"] * 3 + ["blue"] * 7, 0.9),
        ("red", ["red"] * 4 + ["blue"] * 6, 1.0),
        ("1 way", ["one way"] * 10, 0.0),  # all agree: as typed
        ("1 way", ["one way"] * 9 + ["north"], 1.0),
        ("red", ["blue"], 0.0),
        ("blue", ["blue", "red", "blue"], 4 / 9),  # fewer people: 1/3, 2/3 and 1/3
    ],
)
def test_by_hand(answer: str, given: list[str], expected: float) -> None:
    assert official_accuracy(answer, given) == pytest.approx(expected, abs=1e-12)


def test_a_question_that_nobody_answered_is_named(tmp_path) -> None:
    (tmp_path / "a.json").write_text('{"annotations": [{"question_id": 7, "answers": []}]}')
    with pytest.raises(BadInput, match="question_id 7.*nobody answered"):
        people([tmp_path / "a.json"])
