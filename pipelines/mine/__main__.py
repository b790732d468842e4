"""Mine hard negatives for retrieval: for each training image its nearest other images (paper section 3.2).

CONFIG is a data sheet or a run configuration. Every retrieval set of it is mined, or those that --set names: its
training split, as training reads it. What is written is what the sheet's key hard_negatives takes.

  --by features   Euclidean distance of the mean of all detected regions of an image (the authors' way)
  --by captions   TF-IDF of word pieces: the mean cosine of all pairs of a caption of one image and one of the other; the
                  features need not be there

Both are exact: the result is that of brute force, of equal neighbours the image first in the store comes first, and
memory, device and interruptions change no bit of it. While it runs, finished rows lie in FILE.partial; FILE appears
when it is whole. After an interruption, --resume goes on, and passes over sets that are done.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch

from pipelines.datasets import DataSpec, TaskData, load_task
from pipelines.errors import BadInput
from pipelines.mine.authors import read_pool
from pipelines.mine.images import NamedImages
from pipelines.mine.job import METHODS, Means, mine, write_pool
from pipelines.mine.summary import summary
from pipelines.progress import progress_on_stderr
from pipelines.runs import TASK_TABLE, RunData, read_run
from pipelines.sheet import Sheet, inspect_sheet
from pipelines.store.reader import FeatureStore
from pipelines.wordpiece import WordPiece

_TARGET = "options"
"""The target kind, the task row's loss, that draws negatives."""
_EXIT_CODES = "exit codes: 0 done, 2 something cannot be used (one line says what), 130 interrupted"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.mine",
        description=__doc__,
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", type=Path, metavar="CONFIG", help="a data sheet or a run configuration (YAML)")
    parser.add_argument("--set", nargs="+", metavar="NAME", dest="sets", help="only these sets; default: all retrieval")
    parser.add_argument("--by", choices=METHODS, default="features", help="default: features")
    parser.add_argument(
        "--neighbours", type=int, default=100, metavar="K", help="default: 100; fewer if there are fewer"
    )
    out = "default: what the sheet's hard_negatives names, else SET_hard_BY.npz in the sheet's root"
    parser.add_argument("--out", type=Path, metavar="FILE", help=out)
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    memory = "for blocks and features, beside annotations and Python itself, about 0.6 GB more (default: 1)"
    parser.add_argument("--memory", type=float, default=1.0, metavar="GB", help=memory)
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is one"
    )
    imported = "mine nothing: take the authors' pool (hard_negative.pkl), read by allow-list"
    parser.add_argument("--import", type=Path, metavar="FILE", dest="authors", help=imported)
    parser.add_argument("--tasks-table", type=Path, default=TASK_TABLE, help="default: configs/tasks.yaml")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Mine, say what was found, and what to write into the data sheet. Returns the exit code."""
    options = _parser().parse_args(argv)
    try:
        device = _check(options)
        run = read_run(options.config, options.tasks_table, options.sets)
        specs = _retrieval(run, options)
        sheet = _sheet(run.sheet_path(), [spec.name for spec in specs], _looks_at_features(options))
        targets = {spec.name: _target(sheet, spec, options) for spec in specs}
        tokenizer = WordPiece.load(sheet.vocabulary)
        for spec in specs:
            target = targets[spec.name]
            if target.exists():
                print(f"{target} is there already: nothing to do")
                continue
            data = _load(sheet, spec, tokenizer, _looks_at_features(options))
            for line in _one_set(data, target, device, tokenizer, options):
                print(line)
            print(f"wrote {target}; the data sheet, below sets.{spec.name}, takes it as")
            print(f"    hard_negatives: {_seen_from(sheet.root, target)}")
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: --resume goes on from here", file=sys.stderr)
        return 130
    return 0


def _check(options: argparse.Namespace) -> torch.device:
    if options.neighbours < 1:
        raise BadInput("--neighbours", f"{options.neighbours} are none", "give 1 or more")
    if not 0 < options.memory < 1e6:
        raise BadInput("--memory", f"{options.memory:g} GB cannot be used", "give the GB to use, such as 1")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device", "no GPU that torch can use", "leave it out, or check with stopgo doctor")
    chosen = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(chosen if options.device == "auto" else options.device)


def _retrieval(run: RunData, options: argparse.Namespace) -> list[DataSpec]:
    """The tasks to mine for. Raises BadInput for a set that draws no negatives, and where there is none at all."""
    others = [spec.name for spec in run.specs if spec.target != _TARGET]
    if options.sets and others:
        what = f"{others[0]} draws no negatives"
        raise BadInput("--set", what, f"name retrieval sets: their row in {options.tasks_table} has loss {_TARGET}")
    specs = [spec for spec in run.specs if spec.target == _TARGET]
    if not specs:
        raise BadInput(options.config, "no retrieval set in it", f"{options.tasks_table} has loss {_TARGET} for these")
    for option, file in (("--out", options.out), ("--import", options.authors)):
        if file is not None and len(specs) > 1:
            raise BadInput(option, f"one file for {', '.join(spec.name for spec in specs)}", "name one set with --set")
    return specs


def _looks_at_features(options: argparse.Namespace) -> bool:
    return options.by == "features" and options.authors is None


def _sheet(path: Path, names: list[str], features: bool) -> Sheet:
    """The sheet; the pools of these sets need not be there yet, nor features that nobody looks at. Raises the first problem."""
    sheet, problems = inspect_sheet(path, names)
    unneeded = ("hard_negatives",) if features else ("hard_negatives", "features")
    to_make = tuple(f"{path}: sets.{name}.{key}" for name in names for key in unneeded)
    for problem in problems:
        if not str(problem.where).startswith(to_make):
            raise problem
    assert sheet is not None  # or there was a problem
    return sheet


def _target(sheet: Sheet, spec: DataSpec, options: argparse.Namespace) -> Path:
    """Where the pool goes. Raises BadInput if something is there, unless a run goes on."""
    default = sheet.entry(spec.name).hard_negatives or sheet.root / f"{spec.name}_hard_{options.by}.npz"
    target: Path = options.out or default
    if target.exists() and not options.resume:
        raise BadInput(target, "exists already", "remove it, or choose another name with --out")
    return target


def _load(sheet: Sheet, spec: DataSpec, tokenizer: WordPiece, features: bool) -> TaskData:
    """The training split, without the pool that is to be made. Where no `features` are looked at, none need to be there."""
    entry = sheet.entry(spec.name).model_copy(update={"hard_negatives": None})
    sheet = replace(sheet, sets={**sheet.sets, spec.name: entry})
    if features:
        return load_task(spec, sheet, "train", tokenizer)
    examples = sheet.examples(spec.name, "train", spec.reader)
    named = NamedImages(sheet.path, (image for example in examples for image in example.images))
    return load_task(spec, sheet, "train", tokenizer, store=cast(FeatureStore, named))  # which is asked for keys alone


def _one_set(
    data: TaskData, target: Path, device: torch.device, tokenizer: WordPiece, options: argparse.Namespace
) -> list[str]:
    """Import or mine the pool of one set; what there is to say of it."""
    if options.authors is not None:
        keys, pool = read_pool(options.authors)
        write_pool(target, keys, pool, {"set": data.spec.name, "imported": options.authors.name}, data)
        return [f"{data.spec.name}: {len(keys):,} images x {pool.shape[1]} neighbours from {options.authors}"]
    target.parent.mkdir(parents=True, exist_ok=True)
    with progress_on_stderr() as show:
        means = Means(int(options.memory * 1e9), device, target.parent, show)
        ranking, found = mine(data, options.by, options.neighbours, target, means, options.resume)
    images, k = found.positions.shape
    head = f"{data.spec.name}, by {options.by}: {images:,} images x {k} neighbours"
    return [head, *summary(data, ranking, found, METHODS[options.by].value, tokenizer)]


def _seen_from(root: Path, target: Path) -> str:
    path = Path(os.path.abspath(target))
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)


if __name__ == "__main__":
    sys.exit(main())
