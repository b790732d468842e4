"""`python -m engine.train --config RUN.yaml [key=value …]`: train one model on many data sets.

The same file runs under `deepspeed --module engine.train …` and `torchrun -m engine.train …`, one process per GPU.

Exit codes: 0 done; 2 bad input or configuration; 75 stopped by a signal, saved, to be resumed;
130 interrupted before there was anything to save; 1 anything else.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Self

from engine import checkpoint
from engine.assembly import Parts, assemble
from engine.config import MAY_CHANGE, RunConfig, config_hash, describe, load, resolved
from engine.console import Console
from engine.cursor import Cursor
from engine.house import check_imports
from engine.journal import Journal
from engine.loop import Listener, Loop, PlansDiffer, TooManySkipped
from engine.ranges import nvtx, watched_by
from engine.ranks import Ranks, finish, join, joined, leave, rank_in_environment
from engine.reporting import Reporter, final_scores
from engine.watchdog import EXIT_LOST, Watchdog
from pipelines.errors import BadInput
from pipelines.files import write_atomic

EXIT_BAD_INPUT, EXIT_SAVED, EXIT_INTERRUPTED = 2, 75, 130


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    arguments = _parser().parse_intermixed_args(argv)
    try:
        check_imports()
        if arguments.keys:
            print(_keys())
            return 0
        folder, config = _asked_for(arguments)
        if arguments.print_config:
            print(resolved(config), end="")
            return 0
        ranks = join(config.ranks.timeout_s, config.device if config.device != "auto" else _device())
        with Watchdog(ranks, config.ranks.timeout_s) as watchdog:
            return _resume(folder, config, ranks, watchdog) if folder else _start(config, ranks, watchdog)
    except BadInput as error:
        _complain(error)
        return EXIT_BAD_INPUT
    except (TooManySkipped, PlansDiffer, OSError) as error:
        _complain(error)
        return 1
    except Scoring:
        return EXIT_INTERRUPTED
    except KeyboardInterrupt:
        print("interrupted; nothing was under way that could be saved", file=sys.stderr)
        return EXIT_INTERRUPTED
    finally:
        leave()  # after the complaints, which ask whether this is one of several ranks


def _asked_for(arguments: argparse.Namespace) -> tuple[Path | None, RunConfig]:
    """The run folder to continue (None: a new run), and the configuration."""
    overrides = list(arguments.overrides)
    if arguments.deepspeed_config:
        overrides.append(f"deepspeed={arguments.deepspeed_config}")
    if arguments.config:
        config = load(arguments.config, overrides)
        folder = Path(config.folder)
        again = arguments.autoresume and config.output != "auto" and (folder / "checkpoints").is_dir()
        return (folder if again else None), config
    folder = arguments.resume
    if not (folder / "config.yaml").is_file():
        raise BadInput(folder, "not a run folder: it has no config.yaml", "give the folder of a run")
    for override in overrides:
        if override.partition("=")[0].partition(".")[0] not in MAY_CHANGE:
            raise BadInput(
                override, "a resumed run keeps its configuration", f"these may change: {', '.join(MAY_CHANGE)}"
            )
    return folder, load(folder / "config.yaml", overrides)


def _device() -> str:
    """What `device: auto` means here."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _complain(error: Exception) -> None:
    """What is wrong everywhere is said once, by rank 0; what only one rank can know it says itself."""
    rank = rank_in_environment()
    if rank == 0:
        print(f"error: {error}", file=sys.stderr)
    elif isinstance(error, (OSError, BadInput)) and joined():
        print(f"error: rank {rank}: {error}", file=sys.stderr, flush=True)


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
    parser.add_argument(
        "--autoresume", action="store_true", help="with --config: continue the run in its folder if it has checkpoints"
    )
    parser.add_argument(
        "--deepspeed_config",
        "--deepspeed-config",
        metavar="FILE",
        help="DeepSpeed JSON, or a preset of configs/deepspeed",
    )
    parser.add_argument("--deepspeed", action="store_true", help=argparse.SUPPRESS)  # scripts pass it from habit
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)  # launchers add it
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. max_iterations=100 stopgo.gap=8")
    return parser


def _keys() -> str:
    rows = describe()
    width = max(len(key) for key, _, _ in rows)
    return "\n".join(f"{key:{width}}  {text}{'; ' if text else ''}{default}" for key, default, text in rows)


def _start(config: RunConfig, ranks: Ranks, watchdog: Watchdog) -> int:
    """A new run in a folder of its own; nothing is written before everything has been read."""
    _run_folder(config)  # a used folder is refused before the work of reading
    console = _console(config, ranks)
    parts = assemble(config, _saying(console, watchdog), ranks)
    folder = ranks.from_first(_claimed_folder(config) if ranks.first else Path())
    console.message(f"run folder {folder}")
    with _alone_in(folder, ranks):
        cursor = Cursor(config_hash=config_hash(config))
        if not ranks.first:
            return _train(parts, folder, None, console, cursor, watchdog)
        with Journal(folder) as journal:
            write_atomic(folder / "config.yaml", resolved(config).encode())
            tasks = [
                {"name": name, "title": task.row.title, "group": task.row.group, "epoch_iterations": task.epoch_iterations,
                 "examples": len(task.train.data), "removed_examples": task.train.data.removed_examples}
                for name, task in parts.tasks.items()
            ]  # fmt: skip
            journal.event(
                "start", 0, name=config.name, config_hash=config_hash(config), max_iterations=config.max_iterations,
                tasks=tasks, blind=config.blind, world_size=ranks.world_size,
            )  # fmt: skip
            return _train(parts, folder, journal, console, cursor, watchdog)


def _resume(folder: Path, config: RunConfig, ranks: Ranks, watchdog: Watchdog) -> int:
    """Continue a run exactly: its own configuration, its newest checkpoint that verifies, on as many ranks as there are."""
    console = _console(config, ranks)
    with _alone_in(folder, ranks):
        path, refused = ranks.from_first(
            checkpoint.newest_valid(folder / "checkpoints") if ranks.first else (folder, [])
        )
        for line in refused:
            console.message(f"checkpoint refused: {line}")
        parts = assemble(config, _saying(console, watchdog), ranks)
        cursor = checkpoint.load(path, parts.model, parts.stepper)
        if cursor.config_hash != config_hash(config):
            raise BadInput(
                folder / "config.yaml", f"differs from the configuration that {path} was made with", "put it back"
            )
        console.message(f"continuing from {path}")
        if not ranks.first:
            return _train(parts, folder, None, console, cursor, watchdog)
        checkpoint.remove_unfinished(folder / "checkpoints")
        with Journal(folder, keep=cursor.covers) as journal:
            journal.event("resume", cursor.iteration, checkpoint=str(path), world_size=ranks.world_size)
            return _train(parts, folder, journal, console, cursor, watchdog)


def _saying(console: Console, watchdog: Watchdog) -> Callable[[str], None]:
    """What is said while a run is put together also shows that it moves: reading may take longer than a step ever does."""

    def say(message: str) -> None:
        watchdog.moved(f"the start ({message})", starting=True)
        console.message(message)

    return say


def _console(config: RunConfig, ranks: Ranks) -> Console:
    """Rank 0 speaks for all."""
    return Console(config.logging.console if ranks.first else "quiet")


@contextmanager
def _alone_in(folder: Path, ranks: Ranks) -> Iterator[None]:
    """Two runs must not write one folder. Raises BadInput while another one does."""
    if not ranks.first:
        yield
        return
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput(folder, "another process is training here", "wait for it, or stop it") from None
        yield


def _train(
    parts: Parts, folder: Path, journal: Journal | None, console: Console, cursor: Cursor, watchdog: Watchdog
) -> int:
    """Run the loop; rank 0 has a journal, and reports."""
    reporter = None if journal is None else Reporter(parts, journal, console, cursor)
    console.start(parts.config.max_iterations, [task.row for task in parts.tasks.values()], cursor.iteration)
    parts.ranks.wait_for_all()
    try:
        with _StopSignals(parts.ranks) as stop:
            loop = Loop(parts, cursor, folder / "checkpoints", reporter or Listener(), stop.asked, watchdog.moved)
            with watched_by(nvtx()) if parts.config.logging.nvtx else nullcontext():
                stop.done = done = loop.run()
        found = _final_scores(parts, cursor, folder, console, watchdog) if done else {}
    except BaseException as error:
        if journal is not None:
            journal.event("end", cursor.iteration, reason="error")
        if parts.ranks.world_size > 1 and isinstance(error, RuntimeError):
            _tell_of_loss(error, cursor, parts.ranks, watchdog)
        raise
    finally:
        console.close()
    if reporter is None or journal is None:
        return 0 if done else EXIT_SAVED
    graphs = parts.stepper.graphs
    if graphs is not None:
        journal.event("graphs", cursor.iteration, **graphs.counters.as_json())
        console.message(str(graphs.counters))
    if done:
        reporter.finish(folder, cursor, found)
        return 0
    name = stop.name or "another rank's signal"
    journal.event("signal", cursor.iteration, name=name)
    journal.event("end", cursor.iteration, reason="signal")
    console.message(f"{name}: saved; continue with: {_python()} -m engine.train --resume {folder}")
    return EXIT_SAVED


def _tell_of_loss(error: RuntimeError, cursor: Cursor, ranks: Ranks, watchdog: Watchdog) -> None:
    """A collective failed, most likely because a rank is gone: say where, and who."""
    task = next(iter([*cursor.remaining, *cursor.due]), "none")
    where = f"rank {ranks.rank}: lost contact in iteration {cursor.iteration}, task {task}"
    try:
        print(f"error: {where} ({str(error).splitlines()[0][:160]})", file=sys.stderr, flush=True)
        print(f"error: rank {ranks.rank}: {watchdog.lost()}", file=sys.stderr, flush=True)
    finally:  # also where nobody listens any more
        os._exit(EXIT_LOST)  # threads of collectives that never end would keep the process


def _final_scores(
    parts: Parts, cursor: Cursor, folder: Path, console: Console, watchdog: Watchdog
) -> dict[str, tuple[float, float]]:
    watchdog.moved("the final scores")
    try:
        return final_scores(parts, cursor)
    except KeyboardInterrupt:
        again = f"{_python()} -m engine.train --resume {folder}"
        console.message(f"interrupted while scoring; the run is complete and saved, its tables: {again}")
        raise Scoring from None


class Scoring(Exception):
    """Interrupted when all that was left was to score."""


def _python() -> str:
    """This interpreter, as one would type it here."""
    return os.path.relpath(sys.executable)


class _StopSignals:
    """SIGINT and SIGTERM ask for a stop; the loop honours it between two task steps. A second one ends at once.

    Over several ranks a second SIGTERM does not: a scheduler signals all processes, and each launcher among them signals its
    ranks again (and ends by SIGKILL those that do not come to an end). For the same reason SIGTERM is ignored once the loop has
    stopped before its end: the rank still has to say why, and to exit with its own code.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.name = ""
        self.done = False
        self._several = ranks.world_size > 1

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._several and not self.done:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def asked(self) -> bool:
        return bool(self.name)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.name = self.name or signal.Signals(number).name
        if number == signal.SIGINT or not self._several:
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
    finish(main())
