"""The driver: whole series, interrupted and continued ones, runs that fail. Runs are made up, but for the slow test."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from engine.config import load, load_tasks, resolved
from engine.experiments import driver, figures, timing
from engine.experiments.__main__ import main
from engine.experiments.driver import State, state_of, train
from engine.experiments.results import collect
from engine.experiments.series import Job, Series, read_plan
from engine.experiments.systems import Entry, load_catalogue
from engine.experiments.timing import Cost, iterations_within
from pipelines.errors import BadInput
from tests.engine.small_run import TASKS

SYSTEMS = ("all-tasks", "single-task", "finetune-at", "without-dsg")
RUNS = 2 * (2 + 2 * TASKS)  # two seeds


def score(name: str, task: str) -> float:
    """Of a made-up run: another one for each run and task."""
    return (sum(map(ord, name + task)) % 89) / 89


class FakeRun:
    """A process that trains in no time: it writes the run folder that `engine.train` would."""

    started: list[str] = []  # noqa: RUF012 - reset by the fixture
    behaviour: Callable[[str], int] = staticmethod(lambda name: 0)

    def __init__(self, arguments: Sequence[str], log: Path, threads: int | None) -> None:
        overrides = [text for text in arguments if "=" in text]
        folder = Path(next(text for text in overrides if text.startswith("output=")).split("=", 1)[1])
        FakeRun.started.append(folder.name)
        self.returncode = FakeRun.behaviour(folder.name)
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("" if self.returncode == 0 else "warming up\nerror: store: no such file\n")
        if self.returncode == 0:
            config = load(arguments[arguments.index("--config") + 1], overrides)
            write_run(folder, config)

    def poll(self) -> int:
        return self.returncode

    def send_signal(self, number: int) -> None:
        pass


def write_run(folder: Path, config: object, done: bool = True) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(resolved(config))  # type: ignore[arg-type]
    tasks = [row.name for row in load_tasks(config)[1]]  # type: ignore[arg-type]
    steps = config.max_iterations - (len(tasks) > 1)  # type: ignore[attr-defined]
    metrics = [{"iteration": 6, "task": task, "steps": steps, "score": 0.5, "loss": 1.0} for task in tasks]
    events: list[dict[str, object]] = [{"iteration": 0, "event": "start", "name": folder.name, "tasks": [
        {"name": task, "title": task, "group": "G1", "epoch_iterations": 3} for task in tasks]}]  # fmt: skip
    events += [
        {
            "iteration": 6,
            "event": "result",
            "task": task,
            "score": score(folder.name, task),
            "majority": 0.25,
            "blind": 0.2,
        }
        for task in tasks
    ]
    events += [{"iteration": at, "event": "validation", "task": task, "score": 0.4} for at in (3, 6) for task in tasks]
    events += [{"iteration": 6, "event": "end", "reason": "done"}] if done else []
    for name, rows in (("metrics", metrics), ("events", events)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"t": 1.0, **row}) + "\n" for row in rows))


@pytest.fixture(autouse=True)
def fake_runs(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    FakeRun.started, FakeRun.behaviour = [], staticmethod(lambda name: 0)
    if request.node.get_closest_marker("slow") is None:
        monkeypatch.setattr(driver, "start", FakeRun)
        monkeypatch.setattr(driver, "_POLL_SECONDS", 0.0)


def make(small_data: Path, output: Path, **more: object) -> Series:
    return replace(
        Series(load_catalogue(), "tiny", small_data / "run.yaml", 6, (0, 1), output, threads=1),
        **more,  # type: ignore[arg-type]
    )


def test_a_whole_series_is_trained_once(small_data: Path, tmp_path: Path) -> None:
    series = make(small_data, tmp_path)
    jobs = series.jobs(SYSTEMS)
    outcome = train(series, jobs, 2)
    assert len(jobs) == RUNS == len(outcome.done) and not outcome.failed
    assert FakeRun.started[0] == "all-tasks-seed0" and sorted(FakeRun.started) == sorted(job.name for job in jobs)
    first_seed = [name.endswith("seed0") for name in FakeRun.started]
    assert first_seed == sorted(first_seed, reverse=True)  # whole seeds first
    again = train(series, jobs, 2)
    assert len(again.done) == RUNS and len(FakeRun.started) == RUNS


def test_a_task_alone_gets_the_steps_that_it_had_together(small_data: Path, tmp_path: Path) -> None:
    series = make(small_data, tmp_path)
    train(series, series.jobs(["finetune-at"]), 1)
    config = load(series.folder("finetune-at-phrases-seed1") / "config.yaml")
    assert config.max_iterations == 5 == load(series.folder("all-tasks-seed1") / "config.yaml").max_iterations - 1
    assert config.initial_weights == str(series.folder("all-tasks-seed1"))


def test_a_run_that_fails_stops_only_what_needs_it(small_data: Path, tmp_path: Path) -> None:
    series = make(small_data, tmp_path)
    jobs = series.jobs(SYSTEMS)
    FakeRun.behaviour = staticmethod(lambda name: 1 if name in ("all-tasks-seed0", "without-dsg-seed1") else 0)
    told: list[str] = []
    outcome = train(series, jobs, 2, lambda job, how, so_far: told.append(f"{job.name}: {how}"))
    lost = 2 + 2 * TASKS - 1
    assert len(outcome.failed) == lost + 1 and len(outcome.done) == RUNS - lost - 1 and len(told) == RUNS
    assert outcome.failed["all-tasks-seed0"].startswith("exit code 1: error: store: no such file (see ")
    assert outcome.failed["single-task-pairs-seed0"] == "not started: all-tasks-seed0 is not done"
    FakeRun.behaviour = staticmethod(lambda name: 0)
    assert len(train(series, jobs, 2).done) == RUNS


@pytest.mark.parametrize("k", [1, 4])
def test_an_interrupted_series_goes_on_after_run_k(small_data: Path, tmp_path: Path, k: int) -> None:
    series = make(small_data, tmp_path)
    jobs = series.jobs(SYSTEMS)

    def behaviour(name: str) -> int:
        if len(FakeRun.started) == k + 1:
            os.kill(os.getpid(), signal.SIGTERM)
            return driver.EXIT_SAVED
        return 0

    FakeRun.behaviour = staticmethod(behaviour)
    outcome = train(series, jobs, 1)
    assert outcome.interrupted and len(outcome.done) == k and not outcome.failed
    assert len(train(series, jobs, 1).done) == RUNS
    assert len(FakeRun.started) == RUNS + 1


def test_a_stop_between_two_runs_is_no_end(small_data: Path, tmp_path: Path) -> None:
    series = make(small_data, tmp_path)
    jobs = series.jobs(SYSTEMS)
    outcome = train(series, jobs, 1, lambda job, how, so_far: os.kill(os.getpid(), signal.SIGTERM))
    assert outcome.interrupted and len(outcome.done) == 1 and not outcome.failed


def test_a_run_with_checkpoints_is_resumed_and_one_without_begun_anew(small_data: Path, tmp_path: Path) -> None:
    series = make(small_data, tmp_path)
    job = series.jobs(["all-tasks"])[0]
    path, overrides = series.configuration(job)
    folder = series.folder(job.name)
    write_run(folder, load(path, overrides), done=False)
    assert state_of(series, job) is State.BEGUN
    assert "--config" in driver.command(series, job) and not folder.exists()
    write_run(folder, load(path, overrides), done=False)
    (folder / "checkpoints" / "iteration-0000003").mkdir(parents=True)
    assert driver.command(series, job)[-2:] == ["--resume", str(folder)]


def test_a_folder_with_another_run_is_refused(small_data: Path, tmp_path: Path) -> None:
    series = make(small_data, tmp_path)
    jobs = series.jobs(["all-tasks"])
    train(series, jobs, 1)
    other = replace(series, iterations=7)
    assert "another configuration" in train(other, jobs, 1).failed["all-tasks-seed0"]
    found, unusable = collect(other, jobs)
    assert not found.rows and len(unusable) == 2


def test_a_folder_that_is_no_run_stays_as_it_is(small_data: Path, tmp_path: Path) -> None:
    series = make(small_data, tmp_path)
    job = series.jobs(["all-tasks"])[0]
    folder = series.folder(job.name)
    folder.mkdir(parents=True)
    (folder / ".lock").touch()
    assert state_of(series, job) is State.NOT_RUN
    (folder / "notes.txt").write_text("mine")
    assert "in the way" in train(series, [job], 1).failed[job.name]
    assert (folder / "notes.txt").read_text() == "mine" and not FakeRun.started


def test_a_series_may_be_moved(small_data: Path, tmp_path: Path) -> None:
    series = make(small_data, tmp_path / "before")
    jobs = series.jobs(["finetune-at"])
    train(series, jobs, 1)
    (tmp_path / "before").rename(tmp_path / "after")
    assert {state_of(replace(series, output=tmp_path / "after"), job) for job in jobs} == {State.DONE}


def test_processes_are_asked_to_save_once_and_waited_for(
    small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real processes here: each counts the signals that it gets."""
    program = (
        "import pathlib, signal, sys, time\n"
        "said, asked = pathlib.Path(sys.argv[1]), []\n"
        "signal.signal(signal.SIGTERM, lambda *_: asked.append('asked '))\n"
        "said.write_text('ready ')\n"
        "while not asked: time.sleep(0.01)\n"
        "time.sleep(0.2)\n"
        "said.write_text('ready ' + ''.join(asked))\n"
        "sys.exit(75)"
    )
    seen: list[Path] = []

    def start(arguments: Sequence[str], log: Path, threads: int | None) -> subprocess.Popen[bytes]:
        seen.append(tmp_path / log.stem)
        return subprocess.Popen([sys.executable, "-c", program, str(seen[-1])], start_new_session=True)

    def interrupt() -> None:
        while len(seen) < 2 or not all(path.exists() and path.read_text() for path in seen):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(driver, "start", start)
    series = make(small_data, tmp_path / "series")
    threading.Thread(target=interrupt).start()
    outcome = train(series, series.jobs(["all-tasks"]), 2)
    assert outcome.interrupted and not outcome.done and not outcome.failed
    assert [path.read_text() for path in seen] == ["ready asked ", "ready asked "]


def test_the_command_line_writes_results_tables_and_figures(
    small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--base", str(small_data / "run.yaml"), "--output", str(tmp_path), "--jobs", "2"]
    with monkeypatch.context() as undrawn:  # drawing takes longer than all the rest
        undrawn.setattr(figures, "write_all", lambda made, folder: ["none"])
        assert main(["without-dsg", *arguments, "--iterations", "6", "--seeds", "2"]) == 0
    written = json.loads((tmp_path / "results.json").read_text())
    assert len(written["runs"]) == 2 * TASKS and written["failed"] == [] and written["seeds"] == [0, 1]
    assert {row["score"] for row in written["runs"]} == {
        score(f"without-dsg-seed{seed}", row["task"])
        for seed in (0, 1)
        for row in written["runs"]
        if row["seed"] == seed
    }
    assert (tmp_path / "tables" / "table6.md").exists()
    assert "w/o DSG" in (tmp_path / "report.html").read_text()
    assert "all-tasks against single-task: not run" in capsys.readouterr().out
    assert main(["--list", "--json", *arguments]) == 0
    lines = {(line["table"], line["row"]): line for line in json.loads(capsys.readouterr().out)}
    assert lines["table6", "4"]["status"] == "done" and lines["table6", "4"]["seeds"] == [0, 1]
    assert lines["table6", "1"]["status"] == "not run"
    assert main(["single-task", *arguments]) == 0  # length and seeds from the plan; and all-tasks, whose steps it wants
    assert {path.name for path in (tmp_path / "figures").glob("*.svg")} == {
        "figure1.svg", "figure2_left.svg", "figure4.svg", "table6.svg",
    }  # fmt: skip
    shutil.rmtree(tmp_path / "runs" / "all-tasks-seed1")
    FakeRun.behaviour = staticmethod(lambda name: 1 if name.endswith("seed1") else 0)
    monkeypatch.setattr(figures, "write_all", lambda made, folder: ["none"])
    assert main(["all-tasks", *arguments]) == 1
    assert read_plan(tmp_path) is not None
    assert json.loads((tmp_path / "results.json").read_text())["failed"][-1]["run"] == "all-tasks-seed1"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "nothing to run"),
        (["table9"], "no such experiment"),
        (["all", "--model", "large"], "no such row"),
        (["all", "--seeds", "0"], "--seeds 0: must be above 0"),
        (["all", "--base", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["all", "maxiterations=3"], "did you mean max_iterations"),
        (["all", "table2"], "one experiment at a time"),
    ],
)
def test_what_cannot_be_run_is_told_in_one_line(
    arguments: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and named in error and error.count("\n") == 1
    assert not FakeRun.started


def test_two_drivers_do_not_train_one_series(
    small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with driver.alone_in(tmp_path):
        assert main(["all-tasks", "--base", str(small_data / "run.yaml"), "--output", str(tmp_path)]) == 2
    assert "another process trains this series" in capsys.readouterr().err and not FakeRun.started


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("{", "malformed or truncated JSON"),
        ("[]", "not the plan of a series"),
        ('{"format": 1, "model": "tiny", "base": "b", "iterations": "6", "seeds": [0], "overrides": []}', "iterations"),
        ('{"format": 1, "model": "tiny", "base": "b", "iterations": 6, "seeds": ["0"], "overrides": []}', "seeds"),
    ],
)
def test_a_damaged_plan_is_named(content: str, named: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(BadInput, match=named):
        read_plan(tmp_path)


def test_fewer_seeds_of_another_experiment_lose_none(
    small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "write_all", lambda made, folder: ["none"])
    arguments = ["--base", str(small_data / "run.yaml"), "--output", str(tmp_path)]
    assert main(["without-dsg", *arguments, "--seeds", "2"]) == 0
    assert main(["all-tasks", *arguments, "--seeds", "1"]) == 0
    assert sorted(FakeRun.started) == ["all-tasks-seed0", "without-dsg-seed0", "without-dsg-seed1"]
    assert len(json.loads((tmp_path / "results.json").read_text())["runs"]) == 3 * TASKS
    plan = read_plan(tmp_path)
    assert plan is not None and plan["seeds"] == [0, 1]


def test_a_series_keeps_its_length(small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(small_data, tmp_path).save()
    base = ["all-tasks", "--base", str(small_data / "run.yaml"), "--output", str(tmp_path)]
    assert main([*base, "--iterations", "7"]) == 2
    assert "plan.json: iterations: 6, and now 7" in capsys.readouterr().err


COST = Cost({"a": 0.1, "b": 0.3}, together=10.0, alone=5.0, spent=20.0)


def jobs_of(*tasks: tuple[str, ...]) -> list[Job]:
    entries = [Entry("x", "", names, True, (), "nothing", len(names) == 1) for names in tasks]
    return [Job(entry, 0, ()) for entry in entries]


@pytest.mark.parametrize(
    ("minutes", "at_once", "expected"),
    # a b: 10 + 0.4 n, a: 5 + 0.1 n, b: 5 + 0.3 n; 20 s are spent: (55.2 m - 20) at_once = 20 + 0.8 n
    [(2.1, 1, 94), (2.1, 2, 214), (10.1, 1, 646)],
)
def test_the_length_fills_the_minutes(minutes: float, at_once: int, expected: int) -> None:
    jobs = jobs_of(("a", "b"), ("a",), ("b",))
    found = iterations_within(COST, jobs, minutes, at_once)
    assert found == expected
    assert sum(COST.run(job.entry.tasks, found) for job in jobs) / at_once <= 60 * minutes * 0.92 - 20


def test_pretraining_comes_off_the_minutes_first() -> None:
    before = Job(Entry("pretraining", "", (), True, (), "nothing", False), 0, ())
    jobs = [before, *jobs_of(("a", "b"), ("a",), ("b",))]
    cost = replace(COST, pretraining=30.0)
    assert iterations_within(cost, jobs, 2.1, 2) == 139  # (115.92 - 20 - 30) 2 = 20 + 0.8 n
    assert timing.seconds(cost, jobs, 100, 2) == pytest.approx(30 + (20 + 80) / 2)


def test_too_few_minutes_are_told_with_those_that_would_do() -> None:
    with pytest.raises(BadInput, match="give at least 1, fewer seeds"):
        iterations_within(COST, jobs_of(("a", "b"), ("a",)), 0.7, 1)


@pytest.mark.slow
def test_real_runs_whole_and_continued(small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small runs by `engine.train` itself: a series that is stopped and continued gives the numbers of one that is not."""
    monkeypatch.setattr(driver, "TRAIN", "tests.engine.small_train")
    series = make(small_data, tmp_path / "whole")
    jobs = series.jobs(("all-tasks", "single-task"))
    assert len(train(series, jobs, 2).done) == 2 * (1 + TASKS)
    stopped = replace(series, output=tmp_path / "stopped")

    def stop_after_four(job: Job, how: str, outcome: driver.Outcome) -> None:
        if how == "done" and len(outcome.done) == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    assert train(stopped, jobs, 2, stop_after_four).interrupted
    assert len(train(stopped, jobs, 2).done) == len(jobs)
    first, second = (collect(one, jobs)[0].rows for one in (series, stopped))
    assert first == second and len(first) == 2 * 2 * TASKS


@pytest.mark.slow
def test_the_trial_measures_every_task(small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "TRAIN", "tests.engine.small_train")
    series = make(small_data, tmp_path)
    cost = timing.measure(series, series.jobs(["all-tasks"]), 2)
    assert len(cost.steps) == TASKS and all(0 < seconds < 5 for seconds in cost.steps.values())
    assert cost.alone > 0 and cost.together > 0 and not (tmp_path / "trial").exists()
