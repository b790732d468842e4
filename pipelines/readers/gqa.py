"""GQA: the official question files, a folder of their parts, LXMERT's processed JSON, the authors' caches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from pipelines.errors import BadInput
from pipelines.examples import Example, SoftAnswers
from pipelines.files import open_json
from pipelines.identity import image_key
from pipelines.readers.records import Record, record_of, records_of
from pipelines.readers.soft_answers import cached_example, cached_records, is_pickle, processed_example
from pipelines.readers.splits import part_of


def read(*, questions: Sequence[Path], part: str = "all", last: int = 3000) -> Iterator[Example]:
    """One example per question; `group` is the structural type (verify, query, …) where it is published.

    `questions`: official JSON {question id: {imageId, question, answer, …}}, folders holding its parts
    (`train_all_questions/*.json`), a list of {img_id, question_id, sent, label}, or a pickled list of
    {question_id, image_id, question, labels, scores}. The one answer scores 1; without `answer` the target is None.
    `part`, `last`: `splits.part_of` (published: head, tail, 3000). Raises `BadInput` naming file, record and key.
    """
    yield from part_of([list(_source(path)) for path in questions], part, last)


def _source(path: Path) -> Iterator[Example]:
    """The examples of a file, or of all question files of a folder, which count as one."""
    if not path.is_dir():
        yield from _file(path)
        return
    parts = sorted(path.glob("*.json")) + sorted(path.glob("*.json.gz"))
    if not parts:
        raise BadInput(path, "a folder without .json files", "name the folder of the question files")
    for part in parts:
        yield from _file(part)


def _file(path: Path) -> Iterator[Example]:
    if is_pickle(path):
        yield from map(cached_example, cached_records(path))
        return
    content = open_json(path)
    if isinstance(content, list):
        yield from map(processed_example, records_of(content, path))
        return
    for question_id, values in record_of(content, path).values.items():
        yield _official(question_id, record_of(values, path, f"question {question_id}"))


def _official(question_id: str, record: Record) -> Example:
    target = SoftAnswers((record.text("answer"),), (1.0,)) if record.has("answer") else None
    kind = record.values.get("types")
    group = kind.get("structural") if isinstance(kind, dict) else None
    image = image_key(record.name("imageId"))
    return Example(question_id, record.text("question"), (image,), target, group or "")
