"""`python -m engine.train --config RUN.yaml [key=value …]`: train one model on many data sets.

Exit codes: 0 done; 2 bad input or configuration; 75 stopped by a signal, saved, to be resumed;
130 interrupted before there was anything to save; 1 anything else.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Self

from engine import checkpoint
from engine.assembly import Parts, assemble
from engine.config import RunConfig, config_hash, describe, load, resolved
from engine.console import Console
from engine.cursor import Cursor
from engine.house import check_imports
from engine.journal import Journal
from engine.loop import Loop, TooManySkipped
from engine.reporting import Reporter
from pipelines.errors import BadInput
from pipelines.files import write_atomic

EXIT_BAD_INPUT, EXIT_SAVED, EXIT_INTERRUPTED = 2, 75, 130


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        check_imports()
        if arguments.keys:
            print(_keys())
            return 0
        if arguments.resume:
            if not (arguments.resume / "config.yaml").is_file():
                raise BadInput(arguments.resume, "not a run folder: it has no config.yaml", "give the folder of a run")
            if arguments.overrides:
                what = "a resumed run keeps its configuration"
                raise BadInput(arguments.overrides[0], what, "leave it out, or start a new run")
            if arguments.print_config:
                print((arguments.resume / "config.yaml").read_text(), end="")
                return 0
            with _alone_in(arguments.resume):
                return _resume(arguments.resume)
        config = load(arguments.config, arguments.overrides)
        if arguments.print_config:
            print(resolved(config), end="")
            return 0
        return _start(config)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except TooManySkipped as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing was under way that could be saved", file=sys.stderr)
        return EXIT_INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m engine.train",
        description="Train one vision-and-language model on many data sets by round-robin batches with dynamic stop-and-go.",
        epilog="--keys lists what a configuration can say. "
        "Exit codes: 0 done, 2 bad input, 75 stopped by a signal and saved (resume it), "
        "130 interrupted before there was anything to save, 1 anything else.",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", type=Path, help="run configuration, e.g. configs/runs/world.yaml")
    what.add_argument("--keys", action="store_true", help="list every key of a run configuration and stop")
    what.add_argument("--resume", type=Path, metavar="RUN", help="run folder to continue from its newest checkpoint")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)  # launchers add it
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. max_iterations=100 stopgo.gap=8")
    return parser


def _keys() -> str:
    rows = describe()
    width = max(len(key) for key, _, _ in rows)
    return "\n".join(f"{key:{width}}  {text}{'; ' if text else ''}{default}" for key, default, text in rows)


def _start(config: RunConfig) -> int:
    """A new run in a folder of its own; nothing is written before everything has been read."""
    _run_folder(config)  # a used folder is refused before the work of reading
    console = Console(config.logging.console)
    parts = assemble(config, console.message)
    folder = _claimed_folder(config)
    console.message(f"run folder {folder}")
    with _alone_in(folder), Journal(folder) as journal:
        write_atomic(folder / "config.yaml", resolved(config).encode())
        tasks = [
            {"name": name, "title": task.row.title, "group": task.row.group, "epoch_iterations": task.epoch_iterations,
             "examples": len(task.train.data), "removed_examples": task.train.data.removed_examples}
            for name, task in parts.tasks.items()
        ]  # fmt: skip
        journal.event(
            "start", 0, name=config.name, config_hash=config_hash(config), max_iterations=config.max_iterations,
            tasks=tasks, blind=config.blind,
        )  # fmt: skip
        return _train(parts, folder, journal, console, Cursor(config_hash=config_hash(config)))


def _resume(folder: Path) -> int:
    """Continue a run exactly: its own configuration, its newest checkpoint that verifies."""
    config = load(folder / "config.yaml", [])
    console = Console(config.logging.console)
    path, refused = checkpoint.newest_valid(folder / "checkpoints")
    for line in refused:
        console.message(f"checkpoint refused: {line}")
    parts = assemble(config, console.message)
    cursor = checkpoint.load(path, parts.model, parts.optimizer)
    if cursor.config_hash != config_hash(config):
        raise BadInput(
            folder / "config.yaml", f"differs from the configuration that {path} was made with", "put it back"
        )
    console.message(f"continuing from {path}")
    with Journal(folder, keep=cursor.covers) as journal:
        journal.event("resume", cursor.iteration, checkpoint=str(path))
        return _train(parts, folder, journal, console, cursor)


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Two processes must not write one run. Raises BadInput while another one does."""
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput(folder, "another process is training here", "wait for it, or stop it") from None
        yield


def _train(parts: Parts, folder: Path, journal: Journal, console: Console, cursor: Cursor) -> int:
    reporter = Reporter(parts, journal, console, cursor)
    rows = [task.row for task in parts.tasks.values()]
    console.start(parts.config.max_iterations, rows, cursor.iteration)
    try:
        with _StopSignals() as stop:
            loop = Loop(parts, cursor, folder / "checkpoints", reporter, stop.asked)
            done = loop.run()
        if loop.graphs is not None:
            journal.event("graphs", cursor.iteration, **loop.graphs.counters.as_json())
            console.message(str(loop.graphs.counters))
        if done:
            return _finish(reporter, folder, cursor, console)
    except BaseException:
        journal.event("end", cursor.iteration, reason="error")
        raise
    finally:
        console.close()
    journal.event("signal", cursor.iteration, name=stop.name)
    journal.event("end", cursor.iteration, reason="signal")
    console.message(f"{stop.name}: saved; continue with: {_python()} -m engine.train --resume {folder}")
    return EXIT_SAVED


def _finish(reporter: Reporter, folder: Path, cursor: Cursor, console: Console) -> int:
    try:
        reporter.finish(folder, cursor)
    except KeyboardInterrupt:
        again = f"{_python()} -m engine.train --resume {folder}"
        console.message(f"interrupted while scoring; the run is complete and saved, its tables: {again}")
        return EXIT_INTERRUPTED
    return 0


def _python() -> str:
    """This interpreter, as one would type it here."""
    return os.path.relpath(sys.executable)


class _StopSignals:
    """SIGINT and SIGTERM ask for a stop; the loop honours it between two task steps. A second one ends at once."""

    def __init__(self) -> None:
        self.name = ""

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def asked(self) -> bool:
        return bool(self.name)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        signal.signal(number, signal.SIG_DFL)


def _claimed_folder(config: RunConfig) -> Path:
    """The run folder, made by this process: another one may have started while this one was reading."""
    while True:
        folder = _run_folder(config)
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            if config.output == "auto":
                continue
        return folder


def _run_folder(config: RunConfig) -> Path:
    """The configured folder, refused if used; `auto` takes the next free number."""
    if config.output == "auto":
        number = 1
        while Path(f"runs/{config.name}-{number}").exists():
            number += 1
        return Path(f"runs/{config.name}-{number}")
    folder = Path(config.folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadInput(folder, "already holds a run", "choose another output, output=auto, or --resume it")
    return folder


if __name__ == "__main__":
    sys.exit(main())
