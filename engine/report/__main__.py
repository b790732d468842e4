"""`python -m engine.report FOLDER`: one self-contained HTML file that shows a run, or an experiment.

FOLDER is a run folder (config.yaml, journal, checkpoints), or an experiment folder (tables/, figures/, runs/). The page has the
results, the stop-and-go timeline, learning curves, throughput, data overlap, configuration, and pictures: for each task
examples that the model gets right and wrong, with boxes, answers and retrieved images, and where the words of a text look.
It opens without a network, has no script, and prints.

Picture files come from --images DIR: from the folder in it that is named as the feature store (coco for coco.lmdb), else from
DIR itself. Without it from `images` beside the data sheet, as the embedded world has it. Where no file is found, regions are
drawn on grey. A run whose data or checkpoints are not there any more has a page without pictures, which says so.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from engine.exported import is_exported
from engine.house import check_imports
from engine.report.experiment_page import is_experiment, read_experiment
from engine.report.gallery import Settings, images_folder, looks, task_cards
from engine.report.journal_page import read_page
from engine.report.overlap_page import Overlap, overlap
from engine.report.page import Seen, experiment_html, run_html, too_large
from engine.report.pictures import Album
from engine.trained import Trained, load_trained
from pipelines.errors import BadInput
from pipelines.files import write_atomic
from pipelines.progress import Show, progress_on_stderr


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    arguments = _parser().parse_intermixed_args(argv)
    try:
        check_imports()
        _check(arguments)
        with progress_on_stderr() as show:
            make = _experiment if is_experiment(arguments.folder) else _run
            html = make(arguments, show)
        path = arguments.output or arguments.folder / "report.html"
        write_atomic(path, html.encode())
    except (BadInput, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    if warning := too_large(html, path):
        print(f"warning: {warning}; fewer pictures: --right 1 --wrong 1", file=sys.stderr)
    print(f"wrote {path} ({len(html.encode()) / 2**20:.1f} MiB)")
    return 0


def _parser() -> argparse.ArgumentParser:
    default = Settings()
    parser = argparse.ArgumentParser(
        prog="python -m engine.report", description=__doc__, epilog="Exit codes: 0 done, 2 bad input, 130 interrupted.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("folder", metavar="FOLDER", type=Path)
    add("overrides", nargs="*", metavar="key=value", help="of the run: data, world.path, device, threads, …")
    add("-o", "--output", type=Path, metavar="FILE", help="default: report.html in FOLDER")
    add("--images", type=Path, metavar="DIR", help="picture files, named as data sets name them")
    add("--split", choices=("train", "val", "test"), default=default.split, help="whose examples (default: val)")
    add("--asked", type=int, default=default.asked, metavar="N",
        help=f"examples of each task that the model is asked, to choose from (default: {default.asked})")  # fmt: skip
    add("--right", type=int, default=default.right, metavar="N", help=f"right ones per task (default: {default.right})")
    add("--wrong", type=int, default=default.wrong, metavar="N", help=f"wrong ones per task (default: {default.wrong})")
    add("--no-pictures", action="store_true", help="from the journal alone: loads no model and no data")
    return parser


def _check(arguments: argparse.Namespace) -> None:
    if not arguments.folder.is_dir():
        raise BadInput(arguments.folder, "no such folder", "a run folder, or an experiment's")
    if is_exported(arguments.folder):
        what = "an exported model, which has no journal with it"
        raise BadInput(arguments.folder, what, "name the run that it came from; its scores are in README.md")
    for option, least in (("asked", 1), ("right", 0), ("wrong", 0)):
        if getattr(arguments, option) < least:
            raise BadInput(f"--{option}", f"{getattr(arguments, option)} is too small", f"give {least} or more")
    if arguments.output is not None and not arguments.output.absolute().parent.is_dir():
        raise BadInput(arguments.output, f"no such folder: {arguments.output.parent}", "make it, or name another")


def _run(arguments: argparse.Namespace, show: Show) -> str:
    page = read_page(arguments.folder)
    seen, trained = _seen(arguments, arguments.folder, show)
    found, note = _overlap(trained, seen, show)
    return run_html(page, seen, found, note)


def _experiment(arguments: argparse.Namespace, show: Show) -> str:
    page = read_experiment(arguments.folder)
    run = page.shown_run
    if run is None:
        return experiment_html(page, None, Seen(Album(None), note="no run has finished yet"))
    seen, _ = _seen(arguments, run, show)
    return experiment_html(page, dict(page.runs)[run], seen)


def _seen(arguments: argparse.Namespace, run: Path, show: Show) -> tuple[Seen, Trained | None]:
    """The pictures. Data or checkpoints that have gone do not cost the rest of the page."""
    album = Album(arguments.images)
    if arguments.no_pictures:
        return Seen(album, note="left out (--no-pictures)"), None
    try:
        trained = load_trained(run, overrides=arguments.overrides, say=lambda line: print(line, file=sys.stderr))
    except BadInput as error:
        if arguments.overrides or arguments.images:  # who says where things are wants to know that they are not
            raise
        print(f"warning: no pictures: {error}", file=sys.stderr)
        return Seen(album, note=str(error)), None
    album = Album(images_folder(trained, arguments.images))
    settings = Settings(arguments.split, arguments.asked, arguments.right, arguments.wrong)
    tasks = tuple(task_cards(trained, album, settings, show))
    where = tuple(looks(trained, album, tasks))
    return Seen(album, tasks, where, trained.path.name, arguments.split), trained


def _overlap(trained: Trained | None, seen: Seen, show: Show) -> tuple[Overlap | None, str]:
    if trained is None:
        return None, seen.note
    try:
        return overlap(trained, show), ""
    except BadInput as error:
        print(f"warning: no data overlap: {error}", file=sys.stderr)
        return None, str(error)


if __name__ == "__main__":
    sys.exit(main())
