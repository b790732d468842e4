"""A run that is killed, or asked to stop, and resumed: not one bit differs from the run that was left alone."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine import step, validation
from engine.checkpoint import checkpoints
from engine.journal import CLOCK_COLUMNS, read_rows
from tests.engine.small_run import ITERATIONS, TASKS, resume, train
from tests.reference import ROOT

pytestmark = pytest.mark.usefixtures("no_figures")


_KILLED = """
import os, signal, sys
from pathlib import Path
from engine import step
from tests.engine.small_run import train
from tests.pipelines.small import build

data, output, precision, after, more = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), sys.argv[5:]
whole_step, steps = step.train_step, 0

def train_step(*arguments, **keywords):
    global steps
    steps += 1
    if steps > after:
        os.kill(os.getpid(), signal.SIGKILL)
    return whole_step(*arguments, **keywords)

step.train_step = train_step
output.parent.joinpath("again").mkdir()
build(output.parent / "again")  # the reader of these data sets reads from memory
train(data, output, precision, *more)
"""


def train_and_kill(data: Path, output: Path, precision: str, after: int, *more: str) -> None:
    """Run in another process, which SIGKILL ends in the step after `after` task steps."""
    command = [sys.executable, "-c", _KILLED, str(data), str(output), precision, str(after), *more]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr


def rows(file: Path, *events: str) -> list[dict[str, Any]]:
    """Rows without their clocks; of events.jsonl only these kinds."""
    found = [row for row in read_rows(file) if not events or row["event"] in events]
    return [{key: value for key, value in row.items() if key not in CLOCK_COLUMNS} for row in found]


def assert_same(undisturbed: Path, resumed: Path) -> None:
    """Weights, optimizer, stop-and-go and all other state, byte for byte; metrics row for row."""
    newest, other = checkpoints(undisturbed / "checkpoints")[0], checkpoints(resumed / "checkpoints")[0]
    assert newest.name == other.name == f"iteration-{ITERATIONS:07d}"
    for name in ("weights.safetensors", "optimizer-00000-of-00001.safetensors"):
        assert (newest / name).read_bytes() == (other / name).read_bytes(), name
    state, again = (json.loads((path / "cursor.json").read_text()) for path in (newest, other))
    assert state == again
    assert rows(undisturbed / "metrics.jsonl") == rows(resumed / "metrics.jsonl")
    assert len(rows(undisturbed / "metrics.jsonl")) > TASKS
    kinds = ("validation", "decision", "result")
    assert rows(undisturbed / "events.jsonl", *kinds) == rows(resumed / "events.jsonl", *kinds)


@pytest.mark.parametrize(
    ("number", "precision"),
    [
        (0, "float32"),
        *(pytest.param(i, p, marks=pytest.mark.slow) for i, p in enumerate(["bfloat16", "float32"] * 3, 1)),
    ],
)
def test_a_killed_run_continues_to_the_bit(
    small_data: Path, tmp_path: Path, undisturbed: Callable[[str], Path], number: int, precision: str
) -> None:
    """`number` only tells the draws apart."""
    # A save is in place once the next one begins: not before, for it is written while training goes on.
    after = random.SystemRandom().randrange(4 * TASKS, 8 * TASKS)
    print(f"killed after {after} task steps")  # shown if it fails
    train_and_kill(small_data, tmp_path / "killed", precision, after)
    assert resume(tmp_path / "killed") == 0
    assert_same(undisturbed(precision), tmp_path / "killed")


def test_a_run_killed_before_its_first_checkpoint_says_so(
    small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_and_kill(small_data, tmp_path / "killed", "float32", after=1)
    assert resume(tmp_path / "killed") == 2
    assert "no usable checkpoint (start a new run)" in capsys.readouterr().err
    assert train(small_data, tmp_path / "killed", "float32") == 2
    assert "already holds a run" in capsys.readouterr().err


def interrupt(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int, number: signal.Signals) -> None:
    """Send this process a signal in the `call`-th call of a function of the loop."""
    function, calls = getattr(owner, name), [0]

    def interrupted(*arguments: Any, **keywords: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            os.kill(os.getpid(), number)
        return function(*arguments, **keywords)

    monkeypatch.setattr(owner, name, interrupted)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
@pytest.mark.parametrize(("owner", "name", "call"), [(step, "train_step", 17), (validation, "outcome", 8)])
def test_a_signal_saves_and_the_run_continues_to_the_bit(
    small_data: Path,
    tmp_path: Path,
    undisturbed: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    call: int,
    number: signal.Signals,
) -> None:
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        interrupt(patch, owner, name, call, number)
        assert train(small_data, tmp_path / "stopped", "float32") == 75
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before
    last = read_rows(tmp_path / "stopped" / "events.jsonl")[-2:]
    assert [(row["event"], row.get("name"), row.get("reason")) for row in last] == [
        ("signal", number.name, None),
        ("end", None, "signal"),
    ]
    assert resume(tmp_path / "stopped") == 0
    assert_same(undisturbed("float32"), tmp_path / "stopped")


def test_an_interrupt_before_training_leaves_nothing(
    small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("engine.train.assemble", interrupted)
    assert train(small_data, tmp_path / "run", "float32") == 130
    assert capsys.readouterr().err.startswith("interrupted;")
    assert not (tmp_path / "run").exists()


def test_a_finished_run_can_be_resumed_and_stays_as_it_is(small_data: Path, tmp_path: Path) -> None:
    assert train(small_data, tmp_path / "run", "float32") == 0
    before = rows(tmp_path / "run" / "events.jsonl", "validation", "decision", "result", "end")
    assert resume(tmp_path / "run") == 0
    assert rows(tmp_path / "run" / "events.jsonl", "validation", "decision", "result", "end") == before


def test_a_second_run_in_a_used_folder_is_refused(
    small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    assert train(small_data, tmp_path / "run", "float32") == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path / 'run'}: already holds a run (choose another output, output=auto, or --resume it)\n"
    )
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]
