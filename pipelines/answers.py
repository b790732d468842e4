"""Answers in words: the published normalisation, soft scores from ten human answers, and the answer vocabulary."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipelines.errors import BadInput
from pipelines.examples import Example, SoftAnswers
from pipelines.files import kind_name, open_json, write_atomic
from pipelines.pickles import load_pickle

SCORES = (0.0, 0.3, 0.6, 0.9, 1.0)
"""Score of an answer that n of ten people gave, n = 0 … 4 and more."""

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGITS_AROUND_COMMA = re.compile(r"\d,\d")
_PERIOD_BEFORE_NO_DIGIT = re.compile(r"\.(?!\d)")
_ARTICLES = frozenset(("a", "an", "the"))
_NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5",
    "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't
    not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll
    somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd
    there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll
    what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's
    won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()  # noqa: SIM905 - ninety quoted words would be harder to read


def _without_an_apostrophe(contraction: str) -> set[str]:
    """The contraction with one apostrophe missing, and with all."""
    places = [place for place, letter in enumerate(contraction) if letter == "'"]
    return {contraction[:place] + contraction[place + 1 :] for place in places} | {contraction.replace("'", "")}


_MENDED = {miswritten: right for right in _CONTRACTIONS for miswritten in _without_an_apostrophe(right)}


@lru_cache(maxsize=1 << 17)  # ten people give mostly the same few thousand answers
def normalise_answer(answer: str) -> str:
    """An answer as the official VQA evaluation compares it, and as the published vocabularies are written.

    A punctuation mark disappears if a space stands beside one of its kind or the answer has a comma between digits,
    else it becomes a space; a full stop disappears unless a digit follows. Then, in lower case: number words become
    digits, articles go, contractions get their apostrophes back, and single spaces separate the words.
    """
    words = []
    for word in _without_punctuation(" ".join(answer.split())).lower().split():
        word = _NUMBERS.get(word, word)
        if word not in _ARTICLES:
            words.append(_MENDED.get(word, word))
    return " ".join(words)


def _without_punctuation(answer: str) -> str:
    comma_between_digits = _DIGITS_AROUND_COMMA.search(answer) is not None
    text = answer
    for mark in _PUNCTUATION:
        drop = comma_between_digits or f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if drop else " ")
    return _PERIOD_BEFORE_NO_DIGIT.sub("", text)


def soft_scores(answers: Sequence[str]) -> dict[str, float]:
    """Normalised answer -> score in (0, 1], in order of first appearance.

    The rule of the published training targets (spec section 8, row 18): counted once, 1 of ten people scores 0.3,
    2 score 0.6, 3 score 0.9, 4 and more 1. (The evaluation's min(n/3, 1), averaged over subsets of nine, is the same
    for these counts.) The published vocabulary has "" (an answer of articles only) among its 3,129, so it may be here.
    """
    counts = Counter(normalise_answer(answer) for answer in answers)
    return {answer: SCORES[min(count, 4)] for answer, count in counts.items()}


def official_accuracy(answer: str, given: Sequence[str]) -> float:
    """The official VQA accuracy of an answer against what people `given`, usually ten, as they typed it; in [0, 1].

    For each person: a third for every one of the others who gave this answer, 1 at most; then the mean over all persons.
    Answers are compared normalised, except where all people typed the same: then as typed, white space aside.
    """
    typed = [" ".join(other.split()) for other in given]
    if len(set(typed)) > 1:
        answer, typed = normalise_answer(answer), [normalise_answer(other) for other in typed]
    same = typed.count(answer)
    return sum(min((same - (other == answer)) / 3, 1.0) for other in typed) / len(typed)


def count_answers(examples: Iterable[Example]) -> Counter[str]:
    """How many examples have each answer as their best one (the first of equals); class numbers are not counted."""
    counts: Counter[str] = Counter()
    for example in examples:
        target = example.target
        if isinstance(target, SoftAnswers) and target.answers:
            best = target.answers[max(range(len(target.scores)), key=target.scores.__getitem__)]
            if isinstance(best, str):
                counts[best] += 1
    return counts


class Answers:
    """An answer vocabulary: class number <-> answer, numbers 0 … len - 1."""

    def __init__(self, answers: Sequence[str], where: object = "answers") -> None:
        """`where` names the source in errors. Raises `BadInput` for a repeated answer and an empty vocabulary."""
        self._answers = tuple(answers)
        self._labels = {answer: label for label, answer in enumerate(self._answers)}
        self._where = where
        if not self._answers:
            raise BadInput(where, "an answer vocabulary without answers")
        if len(self._labels) < len(self._answers):
            repeated = Counter(self._answers).most_common(1)[0][0]
            raise BadInput(where, f"answer {repeated!r} stands twice in the vocabulary")

    @classmethod
    def load(cls, path: Path) -> Answers:
        """From `trainval_label2ans` (a list) or `trainval_ans2label` (answer -> number), JSON or pickle by suffix.

        Raises `BadInput` where the numbers are not 0 … n - 1, each once.
        """
        content = load_pickle(path) if path.suffix in (".pkl", ".p") else open_json(path)
        return cls(_in_order(content, path), path)

    @classmethod
    def build(cls, counts: Mapping[str, int], *, min_count: int = 1, size: int | None = None) -> Answers:
        """The answers with at least `min_count` occurrences, most frequent first, at most `size` of them.

        Published: 3,129 answers of VQA with at least 9 occurrences. Equal counts stand in alphabetical order.
        """
        frequent = [answer for answer, count in counts.items() if count >= min_count]
        frequent.sort(key=lambda answer: (-counts[answer], answer))
        return cls(frequent[:size])

    def __len__(self) -> int:
        return len(self._answers)

    def label(self, answer: str | int) -> int | None:
        """The class number of an answer; None for an unknown one. A number, from the authors' caches, is its own.

        Raises `BadInput` for a number that is no class of this vocabulary.
        """
        if isinstance(answer, str):
            return self._labels.get(answer)
        if not 0 <= answer < len(self):
            what = f"has {len(self)} answers, a target names class {answer}"
            raise BadInput(self._where, what, "targets and vocabulary must come from the same source")
        return answer

    def answer(self, label: int) -> str:
        """The answer of class `label`. Raises IndexError for other numbers."""
        if label < 0:
            raise IndexError(label)
        return self._answers[label]

    def save(self, path: Path) -> None:
        """Write the answers as a JSON list (`label2ans`), atomically."""
        write_atomic(path, json.dumps(self._answers, ensure_ascii=False, indent=0).encode())


def _in_order(content: Any, path: Path) -> list[str]:
    if isinstance(content, dict):
        labels = content.values()
        whole = all(isinstance(label, int) and not isinstance(label, bool) for label in labels)
        if not whole or sorted(labels) != list(range(len(content))):
            raise BadInput(path, f"the {len(content)} class numbers are not 0 … {len(content) - 1}, each once")
        content = sorted(content, key=content.__getitem__)
    if not isinstance(content, list):
        raise BadInput(path, f"an answer vocabulary is a list or an object, not {kind_name(content)}")
    strange = [answer for answer in content if not isinstance(answer, str)]
    if strange:
        raise BadInput(path, f"answer {strange[0]!r} is {kind_name(strange[0])}, not a text")
    return content
