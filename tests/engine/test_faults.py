"""Faults on real ranks, started by the real launchers: signals, kills, hangs, NaN, a full disk, a damaged record.

CI has one of each; the matrices are slow. With STOPGO_RECORD=bench/results/ranks.json they leave their numbers there.
"""

from __future__ import annotations

import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest

from engine.checkpoint import TEMPORARY, checkpoints, newest_valid
from engine.journal import CLOCK_COLUMNS, read_rows
from tests.engine.launch import DEEPSPEED, LAUNCHERS, TORCHRUN, Run, started
from tests.engine.small_run import configure
from tests.recorded import record

SETTINGS = ("max_iterations=12", "checkpoint.every=2", "stopgo.gap=2", "logging.console=plain", "ranks.timeout_s=60")
SAVED_S, GONE_S = 20, 40
"""After the first signal: the checkpoint is in place; no process is left."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    configure(folder)
    return folder


@pytest.fixture(scope="module")
def straight(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """The folder of a run of two ranks that nobody disturbs."""

    @cache
    def run() -> Path:
        folder = tmp_path_factory.mktemp("straight") / "run"
        assert finished(TORCHRUN, new(data, folder), folder).codes() == {0: 0, 1: 0}
        return folder

    return run


def new(data: Path, folder: Path, *more: str) -> list[str]:
    return ["--config", str(data / "run.yaml"), f"output={folder}", *SETTINGS, *more]


def finished(launcher: str, arguments: list[str], folder: Path, *faults: dict[str, Any]) -> Run:
    """A run that has ended, however."""
    with started(launcher, arguments, folder, faults) as run:
        run.wait(180)
        run.wait_until_gone(GONE_S)
    return run


def assert_same(undisturbed: Path, resumed: Path) -> None:
    """Weights, every rank's optimizer state, the cursor: byte for byte; metrics row for row."""
    newest, other = (checkpoints(folder / "checkpoints")[0] for folder in (undisturbed, resumed))
    assert newest.name == other.name == "iteration-0000012"
    names = sorted(path.name for path in newest.iterdir())
    assert len(names) == 5
    for name in names:
        assert (newest / name).read_bytes() == (other / name).read_bytes(), name
    rows, again = (
        [{key: row[key] for key in row if key not in CLOCK_COLUMNS} for row in read_rows(folder / "metrics.jsonl")]
        for folder in (undisturbed, resumed)
    )
    assert rows == again


MOMENTS: dict[str, dict[str, Any]] = {
    "training": {"at": "step", "call": 17},
    "validation": {"at": "validation", "call": 3},
    "a save": {"at": "between files", "call": 4},
}
ALONE = {"training": 17, "validation": 2, "a save": 2}
"""Calls of rank 1, which writes one file a save, and validates one batch a task."""


@pytest.mark.parametrize(
    ("launcher", "deed", "moment"),
    [
        (TORCHRUN, "terminate the group", "training"),
        *(
            pytest.param(launcher, deed, moment, marks=pytest.mark.slow)
            for launcher in LAUNCHERS
            for deed, moments in (
                ("terminate the group", MOMENTS),
                ("terminate", MOMENTS),
                ("terminate everyone", ("training",)),
                ("terminate the launcher", ("training",)),
            )
            for moment in moments
            if (launcher, deed, moment) != (TORCHRUN, "terminate the group", "training")
        ),
    ],
)
def test_sigterm_saves_and_leaves_no_process(
    data: Path, tmp_path: Path, straight: Callable[[], Path], launcher: str, deed: str, moment: str
) -> None:
    folder = tmp_path / "run"
    fault = {**MOMENTS[moment], "do": deed, "ranks": [0]}
    if deed == "terminate":  # one rank alone, and not the first
        fault |= {"ranks": [1], "call": ALONE[moment]}
    with started(launcher, new(data, folder), folder, [fault]) as run:
        run.wait(180)
        run.wait_until_gone(GONE_S)
        gone_s = time.time() - run.first_signal()
    assert run.codes() == {0: 75, 1: 75}, run.output()
    assert gone_s < GONE_S
    newest, refused = newest_valid(folder / "checkpoints")
    saved_s = (newest / "manifest.json").stat().st_mtime - run.first_signal()
    assert refused == [] and saved_s < SAVED_S
    last = read_rows(folder / "events.jsonl")[-2:]
    told = "SIGTERM" if deed != "terminate" else "another rank's signal"
    assert [(row["event"], row.get("name"), row.get("reason")) for row in last] == [
        ("signal", told, None),
        ("end", None, "signal"),
    ]
    numbers = {"saved_s": round(saved_s, 2), "no_process_s": round(gone_s, 2)}
    record("faults", f"SIGTERM, {launcher}, {deed}, during {moment}", numbers)
    assert finished(TORCHRUN, ["--resume", str(folder)], folder).codes() == {0: 0, 1: 0}
    assert_same(straight(), folder)


@pytest.mark.parametrize("launcher", [TORCHRUN, pytest.param(DEEPSPEED, marks=pytest.mark.slow)])
@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_killed_rank_ends_the_other_which_says_where(data: Path, tmp_path: Path, launcher: str, rank: int) -> None:
    folder = tmp_path / "run"
    fault = {"at": "step", "call": 17, "ranks": [rank], "do": "kill"}
    with started(launcher, new(data, folder), folder, [fault]) as run:
        run.wait(180)
        run.wait_until_gone(GONE_S)
        gone_s = time.time() - run.first_signal()
    assert gone_s < GONE_S
    assert run.codes() == {1 - rank: 1}
    assert f"error: rank {1 - rank}: lost contact in iteration 4, task " in run.output()
    # Rank 0 under deepspeed holds the store in which signs of life are left; torchrun has it in the launcher.
    silent = "rank 0, or its machine, does not answer" if (launcher, rank) == (DEEPSPEED, 0) else f"from rank {rank}"
    assert silent in run.output()
    assert newest_valid(folder / "checkpoints")[1] == []
    record("faults", f"SIGKILL of rank {rank}, {launcher}", {"no_process_s": round(gone_s, 2)})


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "rank"), [(launcher, rank) for launcher in LAUNCHERS for rank in (0, 1)])
def test_a_rank_that_hangs_is_named(data: Path, tmp_path: Path, launcher: str, rank: int) -> None:
    """The launcher's own end takes 30 s more, its wait before SIGKILL, and is not waited for."""
    folder, limit_s = tmp_path / "run", 8
    fault = {"at": "step", "call": 17, "ranks": [rank], "do": "stop"}
    other = 1 - rank
    with started(launcher, new(data, folder, f"ranks.timeout_s={limit_s}"), folder, [fault]) as run:
        run.wait_for(lambda run: other in run.codes())
        reported_s = time.time() - run.first_signal()
    assert run.codes() == {other: 1}
    output = run.output()
    assert f"error: rank {other}: " in output and "iteration 4, task " in output
    named = "rank 0, or its machine, does not answer" in output if rank == 0 else False
    assert named or f"no sign of life from rank {rank}" in output, output
    assert reported_s < limit_s + 20
    record(
        "faults", f"SIGSTOP of rank {rank}, {launcher}, ranks.timeout_s={limit_s}", {"ended_s": round(reported_s, 1)}
    )


def test_kill_and_resume(data: Path, tmp_path: Path) -> None:
    kills(data, tmp_path / "run", 1, random.Random(7))


@pytest.mark.slow
@pytest.mark.parametrize("wait", [False, True])
def test_thirty_kills_at_random_times(data: Path, tmp_path: Path, wait: bool) -> None:
    seed = random.SystemRandom().randrange(10_000)
    print(f"seed {seed}")  # shown if it fails
    found = kills(data, tmp_path / "run", 30, random.Random(seed), wait)
    in_save, lost = sum(during for during, _ in found), [lost for _, lost in found]
    assert in_save >= 8
    record(
        "faults", "30 SIGKILLs of all ranks, torchrun" + (", checkpoint.wait=true" if wait else ""),
        {"restarted_from_a_verified_checkpoint": len(found), "inside_a_save": in_save, "save_every_iterations": 3,
         "lost_iterations_at_most": max(lost)},
    )  # fmt: skip


def reaches(iteration: int, run: Run) -> bool:
    return run.iteration() >= iteration


def kills(data: Path, folder: Path, times: int, draw: random.Random, wait: bool = False) -> list[tuple[bool, int]]:
    """Kill all processes so often, and continue each time: (during a save?, iterations lost) of each."""
    every, found = 3, []
    more = ("max_iterations=100000", f"checkpoint.every={every}", f"checkpoint.wait={wait}", "logging.every=1")
    arguments = new(data, folder, *more)
    dawdle, reached = {"at": "between files", "do": "dawdle"}, 0
    for _ in range(times):
        target = reached + draw.randrange(1, 4)
        with started(TORCHRUN, arguments, folder, [dawdle]) as run:
            run.wait_for(partial(reaches, target))
            run.wait_for(lambda _: bool(checkpoints(folder / "checkpoints")))
            if draw.random() < 0.6:
                run.wait_for(lambda _: any((folder / "checkpoints").glob(f"{TEMPORARY}*")))
            time.sleep(draw.random() * 0.5)
            run.kill()
            run.wait_until_gone(10)
        during, reached = any((folder / "checkpoints").glob(f"{TEMPORARY}*")), run.iteration()
        newest, refused = newest_valid(folder / "checkpoints")
        assert refused == []
        lost = reached - int(newest.name.split("-")[1])
        # What runs while a save is written comes on top of the interval; the next save waits for it.
        assert lost <= (2 * every if during and not wait else every), (lost, during)
        found.append((during, lost))
        arguments = ["--resume", str(folder)]
    with started(TORCHRUN, arguments, folder) as run:
        run.wait_for(lambda run: f"continuingfrom{newest}" in "".join(run.output().split()))  # the console wraps
        run.wait_for(lambda run: run.iteration() > reached)
    assert not list((folder / "checkpoints").glob(f"{TEMPORARY}*{newest.name}-*"))
    return found


@pytest.mark.parametrize("stage", [1, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 2, 3))])
def test_nan_on_one_rank_skips_the_step_on_all(data: Path, tmp_path: Path, stage: int) -> None:
    """From the 17th step on; eight iterations later the tasks have been skipped three times in a row."""
    folder = tmp_path / "run"
    more = (f"deepspeed=zero{stage}", "guard.max_skipped=3", "stopgo.enabled=false")
    run = finished(TORCHRUN, new(data, folder, *more), folder, {"nan": "loss", "call": 17, "last": 99, "ranks": [1]})
    assert run.tells("nan") == {rank: {"same": True, "skipped": 1.0} for rank in (0, 1)}
    assert run.codes() == {0: 1, 1: 1}
    output = run.output()
    assert "iteration 4: the loss of captions was not finite on rank 1; no rank stepped" in output
    assert "error: 3 steps of task captions in a row were not finite (a loss of rank 1), by iteration 6" in output


@pytest.mark.slow
@pytest.mark.parametrize("stage", range(4))
def test_a_gradient_that_is_nan_on_one_rank_skips_the_step_on_all(data: Path, tmp_path: Path, stage: int) -> None:
    folder = tmp_path / "run"
    fault = {"nan": "gradient", "call": 17, "ranks": [1]}
    run = finished(TORCHRUN, new(data, folder, f"deepspeed=zero{stage}"), folder, fault)
    assert run.tells("nan") == {rank: {"same": True, "skipped": 1.0} for rank in (0, 1)}
    assert run.codes() == {0: 0, 1: 0}
    assert sum(row["skipped"] for row in read_rows(folder / "metrics.jsonl")) == 1


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param({"at": "write", "call": 4, "ranks": [1]}, marks=pytest.mark.slow),
        pytest.param({"at": "write", "call": 4, "ranks": [0]}, marks=pytest.mark.slow),
        pytest.param({"at": "commit", "call": 2, "ranks": [0]}, marks=pytest.mark.slow),
    ],
)
def test_a_full_disk_on_one_rank(data: Path, tmp_path: Path, fault: dict[str, Any]) -> None:
    """The second save fails; it is said, the run goes on, and the third one is in place."""
    folder = tmp_path / "run"
    more = ("max_iterations=6", "checkpoint.keep=9")
    run = finished(TORCHRUN, new(data, folder, *more), folder, {**fault, "do": "no space"})
    assert run.codes() == {0: 0, 1: 0}
    names = [path.name for path in checkpoints(folder / "checkpoints")]
    assert names == ["iteration-0000006", "iteration-0000002"]
    assert newest_valid(folder / "checkpoints")[1] == []
    assert not list((folder / "checkpoints").glob(f"{TEMPORARY}*"))
    said = "No space left on device" if fault["ranks"] == [0] else "another rank could not write its part"
    assert said in run.output()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 8 MiB: room for three checkpoints, the one being written among them."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(folder)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
def test_a_disk_that_is_full(data: Path, small_disk: Path, tmp_path: Path) -> None:
    """Something else fills the disk of the run, and goes away again: saves fail, are said, and work again; rows of the journal
    that found no room come after."""
    folder = small_disk / "run"
    with started(TORCHRUN, new(data, folder, "max_iterations=100000"), tmp_path / "run") as run:
        run.folder = folder
        there = folder / "checkpoints"
        run.wait_for(lambda _: there.is_dir() and len(checkpoints(there)) == 2)
        while (free := shutil.disk_usage(small_disk).free) > 64 * 1024:  # saves come and go meanwhile
            with (small_disk / "filling").open("ab") as filling:
                filling.write(b"." * min(free - 48 * 1024, 64 * 1024))
        run.wait_for(lambda run: "No space left on device" in run.output())
        good, refused = newest_valid(there)
        assert refused == []
        (small_disk / "filling").unlink()
        run.wait_for(lambda _: newest_valid(there)[0] != good)
        run.process.terminate()
        run.wait_until_gone(GONE_S)
    assert run.codes() == {0: 75, 1: 75}
    assert newest_valid(there)[1] == []


@pytest.mark.slow
def test_a_damaged_record_on_one_rank_ends_all_and_is_named(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    fault = {"at": "read", "call": 17, "ranks": [1], "do": "damaged record"}
    run = finished(TORCHRUN, new(data, folder), folder, fault)
    assert run.codes() == {0: 1, 1: 2}
    assert "error: rank 1: detected.lmdb: record 7: its checksum is wrong (convert it again)" in run.output()
    assert "error: rank 0: lost contact in iteration 4, task " in run.output()
    assert newest_valid(folder / "checkpoints")[1] == []
