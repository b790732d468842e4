"""Visual Genome QA: the published `question_answers.json`, or the authors' `trainval_target.pkl`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from pipelines.answers import normalise_answer
from pipelines.examples import Example, SoftAnswers
from pipelines.files import open_json
from pipelines.identity import image_key
from pipelines.readers.records import records_of
from pipelines.readers.soft_answers import cached_example, cached_records, is_pickle
from pipelines.readers.splits import part_of


def read(*, questions: Sequence[Path], part: str = "all", last: int = 5000) -> Iterator[Example]:
    """One example per question. Published answers are sentences ("A clock."): normalised, each scores 1.

    `questions`: `question_answers.json`, a list of {id, qas: [{qa_id, question, answer}]} per image, or a pickled list
    of {question_id, image_id, question, labels, scores}. `part`, `last`: `splits.part_of` (published: head and tail,
    5000).
    Raises `BadInput` naming file, record and key.
    """
    yield from part_of([list(_questions(path)) for path in questions], part, last)


def _questions(path: Path) -> Iterator[Example]:
    if is_pickle(path):
        yield from map(cached_example, cached_records(path))
        return
    for image in records_of(open_json(path), path):
        key = image_key(image.name("id", "image_id"))
        for qa in image.records("qas"):
            answer = normalise_answer(qa.text("answer"))
            yield Example(qa.name("qa_id"), qa.text("question"), (key,), SoftAnswers((answer,), (1.0,)))
