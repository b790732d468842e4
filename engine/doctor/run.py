"""What held a run back, from its journal alone: the disk, the CPU that fills batches, or the steps themselves.

Time is counted in windows, from one row of a task to its next. Of each, the journal has the seconds that steps waited for their
batch and those that they took; what is left went to validation, saves, and reading results back. The first window (memory
and libraries settle) and those that a resume falls into do not count.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.doctor.lines import Asked, Line, Probe, gib
from pipelines.errors import BadInput

WAIT_NOTE, WAIT_PROBLEM = 0.02, 0.10
"""Shares of the time in which steps may wait for data; the first is this project's goal."""
_READS = 2**20
"""Bytes a second from disks: a run that reads less finds its features in memory."""
_BUSY = 0.7
_SAVING, _REST = 0.02, 0.30


@dataclass
class Measured:
    """Seconds of a run, and what it used in them."""

    windows: int = 0
    seconds: float = 0.0
    waiting: float = 0.0
    stepping: float = 0.0
    saving: float = 0.0
    """In which the loop stood still for a checkpoint."""
    steps: Counter[str] = field(default_factory=Counter)
    waits: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Seconds by task."""
    validations: int = 0
    device: str = ""
    """cpu or cuda; empty where the journal does not say."""
    busy: float | None = None
    """Of the cores that torch's threads had, the share that was busy; above 1 where other threads worked too."""
    read_rate: float | None = None
    """Bytes a second from disks."""
    memory: int | None = None
    """Most bytes that were the process's own."""

    @property
    def rest(self) -> float:
        """Seconds that were neither waiting, nor steps, nor saves."""
        return max(0.0, self.seconds - self.waiting - self.stepping - self.saving)

    def share(self, seconds: float) -> float:
        """Of the run's time."""
        return seconds / self.seconds if self.seconds else 0.0


def measure(metrics: Sequence[Mapping[str, Any]], events: Sequence[Mapping[str, Any]]) -> Measured:
    """The windows of a journal that count, summed. Raises BadInput for rows without the columns that this needs."""
    groups: defaultdict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for row in metrics:
        groups[row["iteration"]].append(row)
    begun = [row["iteration"] for row in events if row.get("event") in ("start", "resume")]
    found, counted = Measured(), set[int]()
    steps: Counter[str] = Counter()
    before: tuple[int, float] | None = None
    for iteration, rows in sorted(groups.items()):
        end = max(_number(row, "t") for row in rows)
        whole = before is not None and not any(before[0] <= start < iteration for start in begun)
        for row in rows:
            task = str(row.get("task"))
            new, steps[task] = int(_number(row, "steps")) - steps[task], int(_number(row, "steps"))
            if whole:
                found.steps[task] += new
                found.waits[task] += new * _number(row, "data_wait_ms") / 1000
                found.stepping += new * _number(row, "step_ms") / 1000
        if whole and before is not None:
            found.windows += 1
            found.seconds += end - before[1]
            counted |= set(range(before[0] + 1, iteration + 1))
        before = iteration, end
    found.waiting = sum(found.waits.values())
    _add_events(found, [row for row in events if row["iteration"] in counted])
    return found


def _add_events(found: Measured, events: Sequence[Mapping[str, Any]]) -> None:
    """What events of the windows that count say."""
    kinds: defaultdict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in events:
        kinds[str(row.get("event"))].append(row)
    found.saving = sum((row.get("stalled_ms") or 0) / 1000 for row in kinds["checkpoint"])
    found.validations = len(kinds["validation"])
    usage = kinds["usage"]
    seconds = sum(_number(row, "seconds") for row in usage)
    if seconds:
        cores = sum(_number(row, "seconds") * _number(row, "threads") for row in usage)
        found.device = str(usage[-1].get("device"))
        found.busy = sum(_number(row, "cpu_s") for row in usage) / cores if cores else None
        found.read_rate = sum(_number(row, "read_bytes") for row in usage) / seconds
        found.memory = max((row["memory_bytes"] for row in usage if row.get("memory_bytes")), default=None)


def verdict(found: Measured, config: Mapping[str, Any]) -> Iterator[Line]:
    """What bound the run, and the knob to turn. `config`: its resolved configuration."""
    waiting = found.share(found.waiting)
    if waiting > WAIT_NOTE:
        yield _bound_by_data(found, waiting, int(config.get("data_threads") or 1))
    else:
        yield Line("data", f"steps waited for it {waiting:.1%} of the time (up to {WAIT_NOTE:.0%} is well)")
        yield _bound_by_steps(found, config)
    yield from _beside(found, config)


def _bound_by_data(found: Measured, share: float, threads: int) -> Line:
    task, seconds = max(found.waits.items(), key=lambda item: item[1])
    value = f"steps waited for it {share:.0%} of the time, most for {task} ({1000 * seconds / found.steps[task]:.0f} ms a step)"
    state = "problem" if share > WAIT_PROBLEM else "note"
    if found.read_rate is None:
        what, mend = (
            "disk or CPU, the journal does not say which",
            f"data_threads={2 * threads}, then stopgo doctor again",
        )
    elif found.read_rate >= _READS:
        what = f"bound by the disk, which gave {gib(found.read_rate)}/s"
        mend = "rsync -a STORE LOCAL_DISK/, or half the bytes: stopgo features FORMAT SOURCE NEW.lmdb --dtype uint8"
    else:
        what, mend = "bound by the CPU that fills batches: features came from memory", f"data_threads={2 * threads}"
        if found.device == "cuda":
            mend += ", or resident_features=true"
    return Line("data", f"{what}; {value}", "problem" if state == "problem" else "note", mend)


def _bound_by_steps(found: Measured, config: Mapping[str, Any]) -> Line:
    share = f"{found.share(found.stepping):.0%} of the time"
    if found.device == "cuda":
        value = f"bound by its steps ({share}); whether the GPU computes or waits for the host, a journal cannot tell"
        return Line("steps", value, "note", "python -m bench.profile, then cuda_graphs=true where the GPU waits")
    if found.busy is None:
        return Line("steps", f"bound by its steps ({share})")
    if found.busy >= _BUSY:
        return Line("steps", f"bound by computing ({share}): the CPU was busy {min(found.busy, 1):.0%}")
    value = (
        f"{share}, but the CPU was busy only {found.busy:.0%}: other work on the machine, or more threads than cores"
    )
    return Line("steps", value, "note", f"threads={config.get('threads') or 1}, or top -o %CPU")


def _beside(found: Measured, config: Mapping[str, Any]) -> Iterator[Line]:
    """What a run does beside training."""
    saving, rest = found.share(found.saving), found.share(found.rest)
    if saving > _SAVING:
        every = (config.get("checkpoint") or {}).get("every")
        mend = f"checkpoint.every={2 * every}" if every else "checkpoint.minutes=30"
        yield Line("checkpoints", f"the loop stood still for them {saving:.0%} of the time", "note", mend)
    value = f"{rest:.0%} of the time for {found.validations} validations, and all else"
    if rest > _REST and found.validations:
        yield Line("validation", value, "note", "validation.max_examples=1000, or validation.batch_factor=4")
    else:
        yield Line("validation", value)
    if found.memory:
        yield Line("memory", f"{gib(found.memory)} of its own at most (rank 0)")
    if found.read_rate is not None:
        yield Line("read", f"{gib(found.read_rate)}/s from disks on average (rank 0)")


def folder_files(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]:
    """Configuration, metrics and events of a run folder. Raises BadInput where it is none."""
    from engine.journal import EVENTS_FILE, METRICS_FILE, read_rows
    from engine.yaml_files import read_mapping

    if not (folder / "config.yaml").is_file():
        raise BadInput(folder, "not a run folder: it has no config.yaml", "give the folder of a run")
    config = read_mapping(folder / "config.yaml")
    return config, read_rows(folder / METRICS_FILE), read_rows(folder / EVENTS_FILE)


def _run(asked: Asked) -> Iterator[Line]:
    if asked.run is None:
        return
    config, metrics, events = folder_files(asked.run)
    found = measure(metrics, events)
    last = max((row["iteration"] for row in metrics), default=0)
    ends = [str(row.get("reason")) for row in events if row.get("event") == "end"]
    how = f"ended: {ends[-1]}" if ends else "still running, or killed"
    yield Line("run", f"{config.get('name')}, iteration {last} of {config.get('max_iterations')}; {how}")
    if found.seconds <= 0:
        every = (config.get("logging") or {}).get("every", 10)
        yield Line("data", f"not told yet: two rows of each task are needed, one every {every} iterations of its own")
    else:
        yield from verdict(found, config)


def _number(row: Mapping[str, Any], column: str) -> float:
    value = row.get(column)
    if isinstance(value, bool) or not isinstance(value, int | float):
        where = f"row of iteration {row.get('iteration')}"
        raise BadInput(
            where, f"{column} is {value!r}, and should be a number", "is it the journal of a run of this version?"
        )
    return float(value)


PROBES: Mapping[str, Probe] = {"run": _run}
