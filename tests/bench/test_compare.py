"""`python -m bench.compare` end to end, on revisions whose steps only wait and on files; what it refuses, what it counts."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.compare import __main__ as command
from bench.compare import trials
from bench.compare.changes import changed_counters
from bench.compare.measure import Plan, _affordable
from bench.compare.report import Report
from bench.compare.revisions import Repository
from bench.compare.sides import Side, SideFailed
from bench.compare.verdicts import NOISY, SLOWER
from pipelines.errors import BadInput
from tests.bench.small_revisions import Revisions

TOLD = ("--tasks", "vqa,nlvr2", "--ops", "none", "--starts", "5")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Revisions:
    return Revisions(tmp_path_factory.mktemp("compare") / "repository")


def compare(small: Revisions, base: str, head: str, *more: str, minutes: float = 0.05) -> Report:
    told = command._parser().parse_args([base, head, "--minutes", str(minutes), *TOLD, *more])
    return command.run(told, time.monotonic(), Repository(small.folder))


def test_a_slower_revision_is_found_and_what_it_does_more_is_counted(
    small: Revisions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slower = small.change("0.0015, 7, 3, 1.0", "0.0030, 7, 5, 1.5")
    monkeypatch.setattr(command, "Repository", lambda: Repository(small.folder))
    outputs = {"--json": tmp_path / "new/r.json", "--markdown": tmp_path / "r.md", "--csv": tmp_path / "c.csv"}
    files = [text for name, path in outputs.items() for text in (name, str(path))]
    began = time.monotonic()
    assert command.main([small.first, slower, "--minutes", "0.08", *TOLD, *files]) == 1
    assert time.monotonic() - began < 20, "five seconds were asked for"
    result = json.loads(outputs["--json"].read_text())
    step, *tasks = result["rows"]
    assert step["name"] == "step" and [row["name"] for row in tasks] == ["vqa", "nlvr2"]
    assert step["verdict"] == SLOWER and 1.6 < step["ratio"] < 2.4 and 1 < step["low"] < step["high"]
    assert result["counters"]["launches"] == {"vqa": [3, 5], "nlvr2": [3, 5]}
    assert "minor_faults" not in result["counters"]
    assert result["provenance"]["losses_differ"] == pytest.approx(1 / 3)
    sides = [result["provenance"][side] for side in ("base", "head")]
    assert [side["commit"] for side in sides] == [small.first[:7], slower[:7]]
    assert {side["dirty"] for side in sides} == {"false"} and sides[0]["config"] == sides[1]["config"]
    assert len(result["samples"]["task/vqa"]) == result["provenance"]["starts"] > 2
    assert "launches changed in 2 of 2 tasks" in outputs["--markdown"].read_text()
    assert "slower by more than 3 %: step" in capsys.readouterr().out
    with outputs["--csv"].open() as file:
        lines = list(csv.DictReader(file))
    assert [line["name"] for line in lines] == ["step", "vqa", "nlvr2"] and lines[0]["head_commit"] == slower[:7]


def test_the_working_tree_does_more_and_takes_as_long(small: Revisions) -> None:
    """Its changes are what is measured, and said."""
    small.edit("7, 3, 1.0", "7, 2, 1.0")
    try:
        report = compare(small, "HEAD", ".")
    finally:
        small.git("checkout", "-q", "--", ".")
    assert not report.failing and abs(report.rows[0].ratio - 1) < 0.05
    assert changed_counters(report.counts)["launches"]["vqa"] == (3, 2)
    assert report.provenance["losses_differ"] == 0
    assert report.provenance["head"]["dirty"] == "true" and report.provenance["head"]["changes"]


def test_kernels_are_compiled_once_for_the_same_sources(small: Revisions) -> None:
    new = small.change('"x"', '"y"', "kernels/native_library.py")
    other = small.change("7, 3, 1.0", "7, 4, 1.0")
    repository = Repository(small.folder)
    for name in (new, small.first, other, new):
        command._build(repository, repository.checkout(name))
    compiled = (small.folder / "build/compare/compiled").read_text()
    assert (compiled.count("x"), compiled.count("y")) == (1, 1)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("SECONDS, REAL", "raise OSError('no room')\nSECONDS, REAL", "`start` failed(.|\n)*no room"),
        (
            'print("a revision may print")',
            "import os; print('last words', flush=True); os._exit(3)",
            "code 3.(.|\n)*last",
        ),
        ("LAUNCHES, LOSS = 0.0015, 7", "LAUNCHES, LOSS = 0.0015, 9", "other samples .7 and 9 rows"),
        ("7, 3, 1.0", "7, 3, float('nan')", "HEAD, vqa: loss nan"),
    ],
)
def test_a_side_that_does_not_measure_is_named(small: Revisions, old: str, new: str, said: str) -> None:
    broken = small.change(old, new)
    with pytest.raises((SideFailed, BadInput), match=said):
        compare(small, small.first, broken)


def test_too_little_time_is_said_with_how_much_is_needed(small: Revisions) -> None:
    with pytest.raises(BadInput, match="--minutes: too little.*--minutes 0"):
        compare(small, small.first, small.first, minutes=0.001)


@pytest.mark.parametrize(
    ("done", "cost", "left", "starts", "expected"),
    [
        (1, 10.0, 170.0, 8, 8),
        (1, 40.0, 140.0, 8, 4),
        (1, 60.0, 120.0, 8, 3),
        (3, 60.0, 119.0, 5, 4),  # slower than it began: one less
        (3, 60.0, -5.0, 4, 3),
        (2, 90.0, 20.0, 4, 3),  # fewer than three say nothing: late rather than never
    ],
)
def test_starts_that_fit_into_the_time(done: int, cost: float, left: float, starts: int, expected: int) -> None:
    plan = Plan(Path(), (), (), (), batch=4, seconds=180.0, starts=8)
    assert _affordable(plan, done, cost, left, starts) == expected


def test_a_side_alone(small: Revisions) -> None:
    """The protocol; and no module of the installed checkout stands in for one that the revision lacks."""
    with Side("one", small.folder) as side:
        ready = side.ask("start", {"config": "x", "overrides": [], "batch": 1, "ops": ["adamw"]})
        assert ready["ops"] == [] and "No module named 'bench.kernel" in ready["missing"]["adamw"], (
            "no such op there: said, not fatal"
        )
        assert side.ask("prepare", "vqa", 1) == [8, 7]
        seconds, loss = side.ask("step")
        assert 0.001 < seconds < 1 and loss == 1.0
        with pytest.raises(SideFailed, match="one: `op` failed"):
            side.ask("op", "adamw", 1)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["no-such", "HEAD"], "no-such"),
        (["HEAD", "HEAD", "--tasks", "vqqa"], "vqqa"),
        (["HEAD", "HEAD", "--ops", "gelu"], "--ops gelu"),
        (["HEAD", "HEAD", "--model", "huge"], "huge"),
        (["HEAD", "HEAD", "--starts", "2"], "--starts"),
        (["HEAD", "HEAD", "--minutes", "nan"], "--minutes"),
        (["README.md", "HEAD"], "compare two of a kind"),
        (["README.md", "README.md"], "cannot be read as JSON"),
    ],
)
def test_bad_input(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(arguments) == 2
    assert said in capsys.readouterr().err


def test_the_gate_is_a_share(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.parse_gate("3%") == command.parse_gate("0.03") == pytest.approx(0.03)
    for wrong in ("three", "300%", "-1%", "nan"):
        with pytest.raises(SystemExit) as stopped:
            command.main(["HEAD", "HEAD", f"--fail-above={wrong}"])
        assert stopped.value.code == 2
    with pytest.raises(SystemExit):
        command.main(["--help"])
    text = capsys.readouterr().out
    for word in ("Exit codes", "Student's t", "ABBA", "--fail-above", "memory"):
        assert word in text


# Files


def iterations(path: Path, factor: float, peers: bool = True, machine: float = 1.0, **conditions: Any) -> str:
    """A result of bench.iterations: ours `factor` as long; the machine's mood is on everybody."""
    wobble = (1.0, 1.01, 0.99, 1.02, 0.98)
    seconds = {"ours": {"all": [machine * factor * w for w in wobble]}}
    if peers:
        seconds["stock"] = {"all": [machine * 3 * w * v for w, v in zip(wobble, (1, 1.01, 1, 0.99, 1), strict=True)]}
    about = {"model": "m", "batch": 4, "device": "cpu", **conditions}
    path.write_text(
        json.dumps({"tasks": {"vqa": {"seconds": seconds}, "gqa": {"seconds": seconds}}, "conditions": about})
    )
    return str(path)


def files(base: str, head: str, *more: str) -> Report:
    return command.run(command._parser().parse_args([base, head, *more]), time.monotonic())


def test_files_are_compared_by_their_ratios_to_the_peer(tmp_path: Path) -> None:
    base = iterations(tmp_path / "a.json", 1.0)
    same = files(base, iterations(tmp_path / "b.json", 1.0, machine=1.5))
    assert all(row.ratio == pytest.approx(1.0) for row in same.rows) and not same.failing
    assert "over those of the peers" in same.notes[-1]
    slower = files(base, iterations(tmp_path / "c.json", 1.3, machine=0.5))
    assert slower.rows[0].ratio == pytest.approx(1.3) and slower.failing
    assert [row.name for row in slower.rows] == ["step", "vqa", "gqa"]


def test_raw_times_of_two_runs_get_no_verdict(tmp_path: Path) -> None:
    pair = [iterations(tmp_path / f"{factor}.json", factor, peers=False) for factor in (1.0, 2.0)]
    report = files(*pair)
    assert {row.verdict for row in report.rows} == {NOISY} and report.rows[0].ratio == pytest.approx(2.0)
    assert "no verdict" in report.notes[-1]
    assert report.as_json()["rows"][0]["high"] is None


def kernels(path: Path, factor: float, samples: bool = True) -> str:
    rows = [
        {"op": "adamw", "provider": provider, "mode": "step", "dtype": "float32", "task": "any", "shape": "s",
         "median_us": 10.0 * by, **({"samples_us": [10.0 * by, 10.1 * by, 9.9 * by, 10.05 * by]} if samples else {})}
        for provider, by in (("native", factor), ("torch", 4.0))
    ]  # fmt: skip
    path.write_text(json.dumps({"rows": rows, "conditions": {"device": "cpu"}}))
    return str(path)


def test_files_of_kernels(tmp_path: Path) -> None:
    base, head = kernels(tmp_path / "a.json", 1.0), kernels(tmp_path / "b.json", 1.4)
    (row,) = files(base, head).rows
    assert row.name == "adamw step float32 any s" and row.ratio == pytest.approx(1.4) and row.fails(0.03)
    (row,) = files(kernels(tmp_path / "c.json", 1.0, samples=False), head).rows
    assert row.ratio == pytest.approx(1.4, rel=0.02) and row.verdict == NOISY, "no raw times, no interval"


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (lambda path: iterations(path, 1.0, batch=16), "measured other work.*batch 16, not 4"),
        (lambda path: kernels(path, 1.0), "is of another benchmark"),
        (lambda path: written(path, "[1]"), "is no result"),
        (lambda path: written(path, '{"tasks": {'), "cannot be read as JSON"),
        (lambda path: written(path, '{"tasks": {"vqa": 3}, "conditions": {}}'), "measured other work|lacks what"),
        (lambda path: written(path, '{"spills": 0}'), "no benchmark whose files"),
        (lambda path: written(path, '{"tasks": {}}'), "conditions: missing"),
    ],
)
def test_files_that_cannot_be_compared(tmp_path: Path, other: Callable[[Path], str], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        files(iterations(tmp_path / "a.json", 1.0), other(tmp_path / "b.json"))


def written(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


# Trials


def test_a_plant_is_a_commit_and_touches_no_file(small: Revisions) -> None:
    file = "kernels/thing.py"
    (small.folder / file).write_text("def thing_forward(x):\n    return x + 1\n")
    base = small._commit("an op")
    small.git("checkout", "-q", small.first)
    repository = Repository(small.folder)
    planted = trials.plant(repository, base, "thing", 0.02)
    assert small.git("diff", "--name-only", base, planted) == file and not small.git("status", "--porcelain")
    assert planted not in small.git("for-each-ref")
    space: dict[str, Any] = {}
    exec(small.git("show", f"{planted}:{file}"), space)
    began = time.perf_counter()
    assert space["thing_forward"](1) == 2 and time.perf_counter() - began >= 0.02


@pytest.mark.slow
def test_equal_and_planted_revisions_of_this_repository(tmp_path: Path) -> None:
    """Two comparisons of three minutes. The series from which the README quotes are many more of the same."""
    result = tmp_path / "compare.json"
    assert trials.main(["--equal", "1", "--planted", "1", "--json", str(result)]) == 0
    found = json.loads(result.read_text())
    assert found["equal_that_failed"] == 0 and found["planted_caught"] == found["planted_op_named"] == 1
    assert found["longest_s"] < 190
