"""VQA v2: the official questions and ten-answer annotations, LXMERT's processed JSON, the authors' target caches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from pipelines.answers import soft_scores
from pipelines.errors import BadInput
from pipelines.examples import Example, SoftAnswers
from pipelines.files import open_json
from pipelines.identity import image_key
from pipelines.readers.records import Record, record_of, records_of
from pipelines.readers.soft_answers import cached_records, cached_target, processed_example
from pipelines.readers.splits import part_of

Answered = dict[int, tuple[SoftAnswers, str]]
"""Question id -> soft answers and answer type."""


def read(
    *,
    questions: Sequence[Path],
    annotations: Sequence[Path] | None = None,
    targets: Sequence[Path] | None = None,
    part: str = "all",
    last: int = 3000,
) -> Iterator[Example]:
    """One example per question; `group` is the answer type where it is published.

    `questions`: `v2_OpenEnded_mscoco_*_questions.json`, or LXMERT's list of {img_id, question_id, sent, label}.
    `annotations`: `v2_mscoco_*_annotations.json`; ten answers become soft scores (`pipelines.answers.soft_scores`).
    `targets`: the authors' `{train,val}_target.pkl` instead, class numbers with scores.
    Neither: a test split, targets are None. `part` and `last`: see `splits.part_of` (published: head and tail, 3000).

    Raises `BadInput` naming file, record and key; a question without an answer record is one.
    """
    if annotations and targets:
        raise BadInput("targets", "given beside annotations", "name one of the two")
    answered: Answered | None = None
    if annotations:
        answered = {key: value for path in annotations for key, value in _annotated(path)}
    elif targets:
        answered = {key: value for path in targets for key, value in _cached(path)}
    yield from part_of([list(_questions(path, answered)) for path in questions], part, last)


def _questions(path: Path, answered: Answered | None) -> Iterator[Example]:
    content = open_json(path)
    if isinstance(content, list):
        yield from map(processed_example, records_of(content, path))
        return
    for record in record_of(content, path).records("questions"):
        target, group = _answer_of(record, answered)
        image = image_key(record.name("image_id"))
        yield Example(record.name("question_id"), record.text("question"), (image,), target, group)


def _answer_of(record: Record, answered: Answered | None) -> tuple[SoftAnswers | None, str]:
    if answered is None:
        return None, ""
    found = answered.get(record.integer("question_id"))
    if found is None:
        raise record.bad("no annotation answers this question", "name the annotation file of the same split")
    return found


def _annotated(path: Path) -> Iterator[tuple[int, tuple[SoftAnswers, str]]]:
    for record in record_of(open_json(path), path).records("annotations"):
        scores = soft_scores(record.texts_under("answers", "answer"))
        group = record.text("answer_type") if record.has("answer_type") else ""
        yield record.integer("question_id"), (SoftAnswers(tuple(scores), tuple(scores.values())), group)


def _cached(path: Path) -> Iterator[tuple[int, tuple[SoftAnswers, str]]]:
    for record in cached_records(path):
        yield record.integer("question_id"), (cached_target(record), "")


def people(annotations: Sequence[Path]) -> dict[str, tuple[str, ...]]:
    """Question id -> the answers that people gave, as they typed them: what the official accuracy asks for.

    `annotations`: as of `read`. Raises `BadInput` naming file, record and key; a question without any answer is one.
    """
    given: dict[str, tuple[str, ...]] = {}
    for path in annotations:
        for record in record_of(open_json(path), path).records("annotations"):
            answers = given[str(record.integer("question_id"))] = tuple(record.texts_under("answers", "answer"))
            if not answers:
                raise record.bad("nobody answered this question")
    return given
