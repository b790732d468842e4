"""One example type for every data set, and the kinds of target that the published data sets have.

Readers (`pipelines/readers/`) turn annotation files into `Example`s and know nothing of tokens, features or batches.
"""

from __future__ import annotations

from dataclasses import dataclass

BoxXYXY = tuple[float, float, float, float]
"""x1, y1, x2, y2 in pixels of the image that the features were extracted from."""


@dataclass(frozen=True, slots=True)
class SoftAnswers:
    """Answers with soft scores in [0, 1] (VQA, Visual Genome QA, GQA).

    An answer is a string, looked up in the answer vocabulary later (unknown ones are dropped), or, from the authors'
    caches, the class number itself. Both tuples may be empty: no usable answer, an all-zero target (paper 3.2, eq. 1).
    """

    answers: tuple[str | int, ...]
    scores: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Matching:
    """The text describes the image (retrieval). Negatives are drawn by the sampler."""


@dataclass(frozen=True, slots=True)
class Region:
    """The text refers to this region (RefCOCO, RefCOCO+, RefCOCOg, phrase grounding).

    Several boxes may be right (a plural phrase); a proposal counts by its best IoU with any of them.
    """

    boxes: tuple[BoxXYXY, ...]


@dataclass(frozen=True, slots=True)
class Choice:
    """One of a few annotated boxes is meant (Visual7W, GuessWhat).

    `candidates`: all annotated boxes of the image, in ascending box id, which is the row order of the store of
    annotated-box features; `choices`: rows of `candidates` to choose from; `answer`: position within `choices`.
    """

    candidates: tuple[BoxXYXY, ...]
    choices: tuple[int, ...]
    answer: int


@dataclass(frozen=True, slots=True)
class Label:
    """One class of a few (NLVR2: 0 False, 1 True; SNLI-VE: 0 contradiction, 1 neutral, 2 entailment). -1: none."""

    index: int


Target = SoftAnswers | Matching | Region | Choice | Label


@dataclass(frozen=True, slots=True)
class Example:
    """One sample of one data set, as its annotation files state it."""

    id: str
    """Unique within the data set's split: question id, `<ref id>/<sentence id>`, pair id, …"""
    text: str
    """The raw text: question, caption, expression, statement, or the whole dialogue."""
    images: tuple[str, ...]
    """Image keys in the feature store, as `pipelines.identity` writes them. One; NLVR2 has two (left, right)."""
    target: Target | None
    """None where the split publishes no answers (test servers)."""
    group: str = ""
    """What evaluation breaks results down by: answer type, question type, sentence group. May be empty."""
