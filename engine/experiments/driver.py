"""Trains the runs of a series, each in a process of its own: continued, never repeated; one that fails stops no other.

Imports no torch.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from types import FrameType

from engine.config import RunConfig, config_hash, load
from engine.experiments.series import Job, Series
from engine.journal import EVENTS_FILE, METRICS_FILE, read_rows
from pipelines.errors import BadInput

TRAIN = "engine.train"
"""The module that trains a run."""
EXIT_SAVED = 75  # of engine.train, which imports torch
_STOPPED = (EXIT_SAVED, 130, -signal.SIGTERM)
"""Exit codes of a run that was asked to stop: saved, while it scored, before it listened."""
_BEFORE_CONFIG = {".lock", METRICS_FILE, EVENTS_FILE}
"""What a run that was killed while it began may leave."""
_POLL_SECONDS = 0.1


class State(StrEnum):
    """Of a job."""

    NOT_RUN = "not run"
    BEGUN = "begun"
    DONE = "done"


@dataclass
class Outcome:
    """What became of a series."""

    done: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    """Name of a job -> why."""
    interrupted: bool = False


Ended = Callable[[Job, str, Outcome], None]
Running = dict[str, tuple[Job, subprocess.Popen[bytes]]]


def state_of(series: Series, job: Job) -> State:
    """Whether the job's run is there. Raises BadInput where its folder holds a run of another configuration."""
    folder = series.folder(job.name)
    if not (folder / "config.yaml").exists():
        if folder.exists() and {path.name for path in folder.iterdir()} - _BEFORE_CONFIG:
            raise BadInput(folder, "not a run folder, and in the way of one", "remove it, or take another --output")
        return State.NOT_RUN
    path, overrides = series.configuration(job)
    if _hash(load(folder / "config.yaml")) != _hash(load(path, overrides)):
        raise BadInput(folder, "holds a run of another configuration", "remove it, or take another --output")
    if finished(folder):
        return State.DONE
    return State.BEGUN


def _hash(config: RunConfig) -> str:
    """Of all that can change a number, but for the place of the run that it begins from: a series may be moved."""
    start = config.initial_weights
    return config_hash(config.model_copy(update={"initial_weights": start and Path(start).name}))


def finished(folder: Path) -> bool:
    """Whether a run has come to its end."""
    events = folder / EVENTS_FILE
    return events.exists() and any(row["event"] == "end" and row["reason"] == "done" for row in read_rows(events))


def command(series: Series, job: Job) -> list[str]:
    """What trains a job: continues its run folder if there is a checkpoint in it, else starts it anew."""
    folder = series.folder(job.name)
    if any((folder / "checkpoints").glob("iteration-*")):
        return trained("--resume", str(folder))
    shutil.rmtree(folder, ignore_errors=True)  # killed before its first checkpoint: nothing to continue from
    path, overrides = series.configuration(job)
    return trained("--config", str(path), *overrides)


def trained(*arguments: str) -> list[str]:
    """The command of a training process."""
    return [sys.executable, "-m", TRAIN, *arguments]


def start(arguments: Sequence[str], log: Path, threads: int | None) -> subprocess.Popen[bytes]:
    """Start a process whose output is appended to `log`; Ctrl-C reaches it through the driver alone."""
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
    with log.open("ab") as output:
        return subprocess.Popen(
            arguments, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )


def train(
    series: Series,
    jobs: Sequence[Job],
    at_once: int,
    ended: Ended = lambda job, how, outcome: None,
) -> Outcome:
    """Bring all jobs to their end, `at_once` at a time, in their order.

    `ended` is told each job that ends, and how, in words. On SIGINT or SIGTERM the runs under way are asked to save, and the
    outcome says `interrupted`.
    """
    outcome, waiting, running = Outcome(), list(jobs), Running()
    with _asked_to_stop() as asked, _left_alone(running):
        while (waiting and not asked) or running:
            while not asked and len(running) < at_once and (job := _next(waiting, outcome)) is not None:
                waiting.remove(job)
                process = _begin(series, job, outcome, ended)
                if process is not None:
                    running[job.name] = job, process
            if not running and not asked:  # what the others need has failed
                _give_up(waiting, outcome, ended)
            if asked and not outcome.interrupted:
                outcome.interrupted = True  # told once: a second signal would end the runs without a checkpoint
                for _, process in running.values():
                    process.send_signal(signal.SIGTERM)
            time.sleep(_POLL_SECONDS)
            for name, (job, process) in list(running.items()):
                if process.poll() is not None:
                    del running[name]
                    _end(series, job, process.returncode, outcome, ended)
        outcome.interrupted = bool(asked)  # also where no run was under way any more
    return outcome


@contextmanager
def _left_alone(running: Running) -> Iterator[None]:
    """No run outlives a driver that breaks."""
    try:
        yield
    except BaseException:
        for _, process in running.values():
            process.terminate()
        raise


def _give_up(waiting: list[Job], outcome: Outcome, ended: Ended) -> None:
    for job in waiting:
        lost = next(name for name in job.after if name not in outcome.done)
        _fail(job, f"not started: {lost} is not done", outcome, ended)
    waiting.clear()


def _next(waiting: Sequence[Job], outcome: Outcome) -> Job | None:
    """The first job whose needs are met."""
    return next((job for job in waiting if set(job.after) <= set(outcome.done)), None)


def _begin(series: Series, job: Job, outcome: Outcome, ended: Ended) -> subprocess.Popen[bytes] | None:
    """Start a job, unless it is done already or cannot be."""
    try:
        if state_of(series, job) is State.DONE:
            outcome.done.append(job.name)
            ended(job, "was done before", outcome)
            return None
        return start(command(series, job), series.output / "runs" / f"{job.name}.log", series.threads)
    except BadInput as error:
        _fail(job, str(error), outcome, ended)
        return None


def _end(series: Series, job: Job, code: int, outcome: Outcome, ended: Ended) -> None:
    if code == 0:
        outcome.done.append(job.name)
        ended(job, "done", outcome)
    elif outcome.interrupted and code in _STOPPED:
        ended(job, "stopped and saved" if code == EXIT_SAVED else "stopped", outcome)
    else:
        log = series.output / "runs" / f"{job.name}.log"
        _fail(job, f"exit code {code}: {_last_complaint(log)} (see {log})", outcome, ended)


def _fail(job: Job, why: str, outcome: Outcome, ended: Ended) -> None:
    outcome.failed[job.name] = why
    ended(job, why, outcome)


def _last_complaint(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return next((line for line in reversed(lines) if line.startswith("error:")), lines[-1] if lines else "no output")


@contextmanager
def alone_in(output: Path) -> Iterator[None]:
    """Two drivers must not train one series: each would take the other's unsaved runs for dead. Raises BadInput meanwhile."""
    output.mkdir(parents=True, exist_ok=True)
    with (output / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput(output, "another process trains this series", "wait for it, or stop it") from None
        yield


@contextmanager
def _asked_to_stop() -> Iterator[list[int]]:
    """A list that is no longer empty once SIGINT or SIGTERM came; a second one ends the driver at once."""
    asked: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
