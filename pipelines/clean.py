"""`python -m pipelines.clean CONFIG`: find the test images that data sets train on, and list them for removal.

CONFIG is a data sheet or a run configuration; all data sets of the sheet count, whatever the run trains. Prints how much
of each data set's test images every train and val split shows (the paper's Table 1) and what each split loses, and writes
the removal list that training obeys: to `removed` of the sheet, or beside the sheet. Data sets whose files are not there
are left out, and said. Test splits stay as they are.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from pipelines.errors import BadInput
from pipelines.overlap import COCO, TRAINED_ON, Matrix, OnSplit, Survey, survey
from pipelines.overlap_figure import check_name, draw, percent
from pipelines.removal import RemovalList, RemovedPart, list_path, load_list, outdated, removal_list, save_list
from pipelines.runs import TASK_TABLE, RunData, read_run
from pipelines.sheet import LINKED_SOURCE, Sheet, inspect_sheet

PAPER_SHARE = 11
"""Per cent of training data that the paper loses, on average across data sets (section 2.2)."""
_PLAIN_SECONDS = 30.0
_EPILOG = """\
Exit codes: 0 done; with --check 0 if training is clean, 1 if it is not or the list is stale; 2 something cannot be used.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        return _clean(arguments)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.clean",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", type=Path, metavar="CONFIG", help="a data sheet or a run configuration (YAML)")
    parser.add_argument("--check", action="store_true", help="write no list: say whether the one there is holds")
    parser.add_argument("--sets", nargs="+", metavar="NAME", help="only the overlap of these data sets; write no list")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the list here")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the overlap too: .png, .svg or .pdf")
    parser.add_argument("--tasks-table", type=Path, default=TASK_TABLE, help="default: configs/tasks.yaml")
    return parser


def _clean(arguments: argparse.Namespace) -> int:
    if arguments.plot:
        check_name(arguments.plot)
    run = read_run(arguments.config, arguments.tasks_table)
    sheet = read_sheet(run.sheet_path())
    names = _chosen(sheet, run, arguments.sets)
    with _progress([(name, split) for name in names for split in sheet.entry(name).splits()]) as on_split:
        found = survey(sheet, run.readers, names, on_split)
    if not found.tests and not found.splits:
        raise BadInput(sheet.path, "no annotation file of its data sets is there", "see configs/data/README.md")
    _say_what_is_not_known(sheet, run, found)
    matrix = found.matrix()
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    console.print(overlap_table(matrix))
    if arguments.plot:
        draw(matrix, {name: len(test) for name, test in found.tests.items()}, arguments.plot)
    if arguments.sets:
        return 0
    if arguments.check:
        return _check(found, sheet, run, arguments.out or list_path(sheet))
    removed = removal_list(found, sheet, run.readers)
    path = arguments.out or list_path(sheet)
    save_list(removed, path)
    console.print(removal_table(removed))
    print(f"wrote {path}")
    if sheet.removed != Path(os.path.abspath(path)):
        print(f"training obeys it once {sheet.path} says\nremoved: {os.path.relpath(path, sheet.root)}")
    return 0


def read_sheet(path: Path) -> Sheet:
    """The data sheet, without asking for its features. Raises BadInput where it cannot be understood."""
    sheet, problems = inspect_sheet(path, [])
    if sheet is None:
        raise problems[0]
    return sheet


def _chosen(sheet: Sheet, run: RunData, sets: Sequence[str] | None) -> list[str]:
    """The data sets to compare, in the sheet's order."""
    for name in sets or ():
        sheet.entry(name)
        if name not in run.readers:
            raise BadInput(f"--sets {name}", "the task table has no such row, so its reader is not known")
    return [name for name in sheet.sets if name in run.readers and (not sets or name in sets)]


def _say_what_is_not_known(sheet: Sheet, run: RunData, found: Survey) -> None:
    unread = [name for name in sheet.sets if name not in run.readers]
    notes = [
        (found.absent, "files are not there, so their images are not known"),
        (unread, "no row in the task table, so their images are not known (CONFIG may be a run that names task_rows)"),
    ]
    sources = set(found.sources.values())
    if sheet.links is None and {COCO, LINKED_SOURCE} <= sources:
        notes.append(([LINKED_SOURCE], "the sheet has no links, so which of its images are COCO's is not known"))
    for names, what in notes:
        if names:
            print(f"note: {', '.join(names)}: {what}", file=sys.stderr)


def _check(found: Survey, sheet: Sheet, run: RunData, path: Path) -> int:
    """Prints what is wrong, one line each."""
    removed = load_list(path) if path.exists() else None
    left = found.matrix({} if removed is None else removed.keys())
    wrong = [f"{path}: stale: {reason}" for reason in outdated(removed, sheet, run.readers)] if removed else []
    wrong += [
        f"{percent(share)} % of the test images of {row} are in train or val of {column}"
        for row, shares in left.items()
        for column, share in shares.items()
        if share
    ]
    after = "no removal list" if removed is None else f"after removal by {path}"
    for line in wrong:
        print(f"unclean: {line}")
    print(f"{after}: {'unclean' if wrong else 'no test image is in any train or val split'}")
    return 1 if wrong else 0


def overlap_table(matrix: Matrix) -> Table:
    """The paper's Table 1: letters stand for the columns, which are the rows' data sets."""
    letters = [chr(ord("A") + place % 26) * (1 + place // 26) for place in range(len(matrix))]
    title = "Per cent of the row's test images that are in the column's train or val set"
    grid = Table(title=title, title_justify="left", header_style="bold")
    grid.add_column("", no_wrap=True)
    for letter in letters:
        grid.add_column(letter, justify="right", no_wrap=True)
    for letter, (row, shares) in zip(letters, matrix.items(), strict=True):
        cells = (f"[bold]{percent(share)}[/bold]" if share else percent(share) for share in shares.values())
        grid.add_row(f"{letter} {row}", *cells)
    return grid


def removal_table(removed: RemovalList) -> Table:
    """What every data set loses, and all of them together."""
    total, parts = removed.training, removed.sets.values()
    shares = [_share(part["train"].removed_examples, part["train"].examples) for part in parts if "train" in part]
    mean = sum(shares) / len(shares) if shares else 0.0
    caption = (
        f"Training examples removed: {total.removed_examples:,} of {total.examples:,}, "
        f"{_share(total.removed_examples, total.examples):.1f} % of all; mean over data sets {mean:.1f} % "
        f"(the paper: about {PAPER_SHARE} % on average across data sets)"
    )
    grid = Table(title="Removed, since the image is a test image", title_justify="left", header_style="bold",
                 caption=caption, caption_justify="left", caption_style="")  # fmt: skip
    grid.add_column("", no_wrap=True)
    for split in TRAINED_ON:
        for heading in (f"{split}\nimages", "\nremoved", "\nexamples", "\nremoved", "\n%"):
            grid.add_column(heading, justify="right", no_wrap=True)
    for name, of_set in removed.sets.items():
        grid.add_row(name, *(cell for split in TRAINED_ON for cell in _cells(of_set.get(split))))
    return grid


def _cells(part: RemovedPart | None) -> list[str]:
    if part is None:
        return ["–"] * 5
    counts = (part.images, len(part.removed_images), part.examples, part.removed_examples)
    return [*(f"{count:,}" for count in counts), f"{_share(part.removed_examples, part.examples):.1f}"]


def _share(part: int, whole: int) -> float:
    return 100 * part / whole if whole else 0.0


@contextmanager
def _progress(splits: Sequence[tuple[str, str]]) -> Iterator[OnSplit]:
    """On stderr: a bar on a terminal, elsewhere a plain line every half minute."""
    console = Console(stderr=True)
    if not console.is_terminal:
        last = time.monotonic()

        def plain(name: str, split: str) -> None:
            nonlocal last
            if time.monotonic() - last >= _PLAIN_SECONDS:
                last = time.monotonic()
                print(f"reading {name}.{split}", file=sys.stderr, flush=True)

        yield plain
        return
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(splits), completed=-1)
        yield lambda name, split: progress.update(task, advance=1, description=f"reading {name}.{split}")


if __name__ == "__main__":
    sys.exit(main())
