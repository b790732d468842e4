"""The two processed forms that question-answering data sets share: LXMERT's JSON and the authors' target caches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pipelines.examples import Example, SoftAnswers
from pipelines.identity import image_key
from pipelines.pickles import load_pickle
from pipelines.readers.records import Record, records_of


def is_pickle(path: Path) -> bool:
    return path.suffix in (".pkl", ".p", ".pickle")


def processed_example(record: Record) -> Example:
    """LXMERT's form: `{img_id, question_id, sent, label: {answer: score}}`; a test split has no `label`."""
    target = None
    if record.has("label"):
        labels = record.record("label")
        scores = tuple(_score(labels, labels.number(answer)) for answer in labels.values)
        target = SoftAnswers(tuple(labels.values), scores)
    image = image_key(record.name("img_id"))
    return Example(record.name("question_id"), record.text("sent"), (image,), target)


def cached_records(path: Path) -> Iterator[Record]:
    """The records of an authors' cache, a pickled list of dictionaries."""
    return records_of(load_pickle(path), path)


def cached_target(record: Record) -> SoftAnswers:
    """`labels` (class numbers) and `scores` of an authors' cache; both may be empty."""
    labels = record.integers("labels")
    scores = record.items("scores")
    if len(labels) != len(scores):
        raise record.bad(f"{len(labels)} labels but {len(scores)} scores")
    if not all(isinstance(score, int | float) for score in scores):
        raise record.bad("key 'scores' must be a list of numbers")
    return SoftAnswers(tuple(labels), tuple(_score(record, float(score)) for score in scores))


def cached_example(record: Record) -> Example:
    """A record that carries its question (Visual Genome QA, GQA): question_id, image_id, question, labels, scores."""
    image = image_key(record.name("image_id"))
    return Example(record.name("question_id"), record.text("question"), (image,), cached_target(record))


def _score(record: Record, score: float) -> float:
    if not 0 <= score <= 1:
        raise record.bad(f"a score of {score:g}", "scores lie between 0 and 1")
    return score
