"""`python -m pipelines.check CONFIG`: load all data of a run without training, and say what there is.

CONFIG is a data sheet or a run configuration. Every problem is reported, one line each, not only the first.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from pipelines import ragged
from pipelines.boxes import Float32
from pipelines.datasets import CHUNK, DataSpec, TaskData, load_task
from pipelines.errors import BadInput
from pipelines.runs import TASK_TABLE, RunData, data_sheet, read_run
from pipelines.sheet import Sheet, inspect_sheet
from pipelines.store.reader import FeatureStore
from pipelines.targets import POSITIVE_IOU, SoftLabels, TrueBoxes
from pipelines.wordpiece import WordPiece

UNCUT = 1 << 20
"""Longer than any text: token lengths are counted before they are cut."""


@dataclass(frozen=True)
class SplitReport:
    """One row of the table: counts and percentiles of one split."""

    task: str
    split: str
    records: int
    images: int
    missing: int
    """Images without features."""
    tokens: tuple[int, ...]
    """50th, 90th, 99th percentile and maximum, before cutting."""
    cut: float
    """Share of texts longer than `max_tokens`."""
    regions: tuple[int, ...]
    """The same of region rows per image, as they enter a batch."""
    answerable: float | None
    """Share of examples that can be answered right: an answer is in the vocabulary, or a region row overlaps a true
    box by more than half (spec section 2). None for tasks that always can."""


def check(run: RunData, sheet_path: Path, records: bool = True) -> tuple[list[SplitReport], list[BadInput]]:
    """Load every split of every task of the run. Returns what was found and every problem, in sheet order.

    With `records`, each record of the stores in use is read once against its checksum.
    """
    sheet, problems = inspect_sheet(sheet_path, [spec.name for spec in run.specs])
    if sheet is None:
        return [], problems
    tokenizer = _tokenizer(sheet, run.vocab_size, problems)
    reports: list[SplitReport] = []
    stores: dict[Path, FeatureStore] = {}
    for spec in run.specs:
        usable = not any(f": sets.{spec.name}." in str(known.where) for known in problems)
        for split in sheet.sets[spec.name].splits() if spec.name in sheet.sets else ():
            found = sheet.reader_arguments(spec.name, split, spec.reader)[1]
            problems.extend(found)
            if tokenizer is None or not usable or found:
                continue
            try:
                data = load_task(replace(spec, max_tokens=UNCUT), sheet, split, tokenizer, allow_missing=True)
                problems.extend(_problems(spec, sheet, data))
                reports.append(report(spec, data))
            except BadInput as problem:
                problems.append(problem)
                continue
            stores |= {store.path: store for store in (data.store, data.candidates) if store is not None}
    for store in stores.values():
        problems.extend(_store_problems(store, run.feature_size, records))
    return reports, _each_once(problems)


def _tokenizer(sheet: Sheet, vocab_size: int | None, problems: list[BadInput]) -> WordPiece | None:
    if not sheet.vocabulary.is_file():
        return None  # said already
    try:
        tokenizer = WordPiece.load(sheet.vocabulary)
    except BadInput as problem:
        problems.append(problem)
        return None
    if vocab_size is not None and len(tokenizer) > vocab_size:
        problems.append(
            BadInput(
                sheet.vocabulary,
                f"{len(tokenizer)} word pieces for a model of {vocab_size}",
                "raise the model's vocab_size or take its own vocabulary",
            )
        )
    return tokenizer


def report(spec: DataSpec, data: TaskData) -> SplitReport:
    """The counts of one split; `data` was tokenised without cutting."""
    lengths = np.diff(data.token_offsets)
    images = np.unique(data.image_rows).astype(np.int64)
    regions = 1 + data.detector_counts(images) + data.candidate_counts(images)
    return SplitReport(
        task=spec.name,
        split=data.split,
        records=len(data) + data.missing_examples,
        images=len(images) + len(data.missing_images),
        missing=len(data.missing_images),
        tokens=_percentiles(lengths),
        cut=float((lengths > spec.max_tokens).mean()),
        regions=_percentiles(regions),
        answerable=_answerable(data),
    )


def _answerable(data: TaskData) -> float | None:
    if isinstance(data.target, SoftLabels):
        return float((np.diff(data.target.offsets) > 0).mean())
    if not isinstance(data.target, TrueBoxes):
        return None
    images, own = np.unique(data.image_rows[:, 0].astype(np.int64), return_inverse=True)
    boxes, cu_images = _pixel_boxes(data, images)
    reachable = 0
    for start in range(0, len(data), CHUNK):
        examples = np.arange(start, min(start + CHUNK, len(data)))
        rows, cu_regions = ragged.take(cu_images, own[examples])
        scores = data.target.pack(examples, cu_regions, boxes[rows], training=False).scores.numpy()
        reachable += int((np.maximum.reduceat(scores, cu_regions[:-1]) > POSITIVE_IOU).sum())
    return reachable / len(data)


def _pixel_boxes(data: TaskData, images: NDArray[np.int64]) -> tuple[Float32, ragged.Offsets]:
    """The boxes of these images' region rows, the whole image first, one image after the other."""
    keys, parts = data.store.keys(), []
    for row, count in zip(images.tolist(), data.detector_counts(images).tolist(), strict=True):
        width, height = data.store.sizes[row].tolist()
        parts += [np.array([[0, 0, width, height]], np.float32), data.store.record(keys[row]).boxes[:count]]
    return np.concatenate(parts), ragged.offsets_of(1 + data.detector_counts(images))


def _percentiles(values: NDArray[np.int64]) -> tuple[int, ...]:
    return tuple(int(value) for value in np.percentile(values, (50, 90, 99, 100), method="higher"))


def _problems(spec: DataSpec, sheet: Sheet, data: TaskData) -> Iterator[BadInput]:
    where = f"{sheet.path}: sets.{spec.name}.{data.split}"
    if data.missing_images:
        yield BadInput(
            where,
            f"{len(data.missing_images)} images have no features in {data.store.path}, such as "
            f"{data.missing_images[0]!r} ({data.missing_examples} examples)",
            "convert or extract the missing images",
        )
    repeated = len(data) - len(np.unique(data.ids))
    if repeated:
        yield BadInput(where, f"{repeated} example ids occur more than once", "the annotations were joined twice")


def _store_problems(store: FeatureStore, feature_size: int | None, records: bool) -> Iterator[BadInput]:
    if feature_size is not None and store.feature_dim != feature_size:
        yield BadInput(
            store.path,
            f"features of {store.feature_dim} values for a model of {feature_size}",
            "set the model's v_feature_size",
        )
    for key in store.keys() if records else ():
        try:
            store.record(key)
        except BadInput as problem:
            yield problem


def _each_once(problems: Sequence[BadInput]) -> list[BadInput]:
    return list({str(problem): problem for problem in problems}.values())


def table(reports: Sequence[SplitReport]) -> Table:
    """The reports as a table for people."""
    grid = Table(title="Data, per task and split", title_justify="left", header_style="bold")
    for heading in ("task", "split"):
        grid.add_column(heading, no_wrap=True)
    for heading in (
        "records",
        "images",
        "no\nfeatures",
        "tokens\n50/90/99/max",
        "texts\ncut",
        "region rows\n50/90/99/max",
        "can be\nanswered",
    ):
        grid.add_column(heading, justify="right", no_wrap=True)
    previous = None
    for row in reports:
        if previous not in (None, row.task):
            grid.add_section()
        grid.add_row(
            "" if row.task == previous else row.task,
            row.split,
            f"{row.records:,}",
            f"{row.images:,}",
            f"[red]{row.missing:,}[/red]" if row.missing else "0",
            "/".join(map(str, row.tokens)),
            f"{row.cut:.1%}",
            "/".join(map(str, row.regions)),
            "–" if row.answerable is None else f"{row.answerable:.1%}",
        )
        previous = row.task
    return grid


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 all is well, 2 something cannot be used (one line each says what)."""
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, metavar="CONFIG", help="a data sheet or a run configuration (YAML)")
    parser.add_argument("--tasks", nargs="+", metavar="NAME", help="only these tasks")
    parser.add_argument("--tasks-table", type=Path, default=TASK_TABLE, help="default: configs/tasks.yaml")
    parser.add_argument("--skip-records", action="store_true", help="do not read every feature record (checksums)")
    arguments = parser.parse_args(argv)
    try:
        run = read_run(arguments.config, arguments.tasks_table, arguments.tasks)
        reports, problems = check(run, data_sheet(run), records=not arguments.skip_records)
    except BadInput as problem:
        reports, problems = [], [problem]
    if reports:
        Console(width=None if sys.stdout.isatty() else 140).print(table(reports))
    for found in problems:
        print(f"error: {found}", file=sys.stderr)
    return 2 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
