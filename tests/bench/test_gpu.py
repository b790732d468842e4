"""What `make gpu` does around the GPU: its parts, their results, and the counts of a profile."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from bench import gpu, graphs
from bench.gpu import Part
from bench.provider import Setting
from engine.config import load
from engine.graphs import Graphs
from engine.tasks import load_table
from tests.engine.repeater import Repeater

CPU = torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("main", [gpu.main, graphs.main])
def test_without_a_gpu_one_line_and_exit_code_2(main: object, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2  # type: ignore[operator]
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert "GPU" in said
    assert said.count("\n") == 1


def test_every_part_has_a_module_and_a_result_of_its_own(tmp_path: Path) -> None:
    parts = gpu.parts(tmp_path, 16)
    assert [part.name for part in parts] == ["tests", "steps", "kernels", "iterations", "graphs"]
    assert len({part.result for part in parts}) == len(parts)
    for part in parts[2:]:
        assert part.command[1:3] == ("-m", f"bench.{part.name}")
        assert str(part.result) in part.command
        assert "--batch" in part.command


def test_parts_run_to_the_end_and_are_summed_up(tmp_path: Path) -> None:
    def part(name: str, code: str) -> Part:
        return Part(name, (sys.executable, "-c", code), tmp_path / f"{name}.json", {"SAID": name})

    old = tmp_path / "silent.json"
    old.write_text("{}")
    writes = "import os, pathlib; name = os.environ['SAID']; pathlib.Path(name).with_suffix('.json')"
    parts = [
        part("broken", "raise SystemExit(3)"),
        part("silent", "pass"),
        part("good", f"{writes}; pathlib.Path({str(tmp_path)!r}, 'good.json').write_text('{{}}')"),
    ]
    assert gpu.run(parts, tmp_path, {"device": "made up"}) == 1
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["conditions"] == {"device": "made up"}
    assert {name: found["passed"] for name, found in summary["parts"].items()} == {
        "broken": False,
        "silent": False,  # an older run's result counts for nothing
        "good": True,
    }
    assert summary["parts"]["broken"]["exit_code"] == 3
    assert gpu.run(parts[2:], tmp_path, {}) == 0


def test_tests_are_counted_and_failures_named(tmp_path: Path) -> None:
    (tmp_path / "test_made_up.py").write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert False\n"
        "def test_elsewhere(): pytest.skip('no')\n"
        "@pytest.fixture\ndef broken(): raise ValueError\n"
        "def test_broken(broken): pass\n"
    )
    result = tmp_path / "tests.json"
    command = (
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(tmp_path),
        str(tmp_path),
    )
    part = Part("tests", (*command, "--junitxml", str(tmp_path / "tests.xml")), result, {}, gpu.summarise_tests)
    assert gpu.run([part], tmp_path, {}) == 1
    found = json.loads(result.read_text())
    assert (found["passed"], found["failed"], found["skipped"]) == (1, 2, 1)
    assert [name.rpartition(".")[2] for name in found["failures"]] == ["test_bad", "test_broken"]


def test_calls_are_added_up_by_what_they_are_for() -> None:
    calls = {"cudaLaunchKernel": 7, "cuLaunchKernelEx": 2, "cudaGraphLaunch": 1, "cudaMemcpyAsync": 3, "aten::mm": 9}
    assert graphs.counted(calls) == {"launches": 9, "graph_launches": 1, "copies": 3, "fills": 0, "syncs": 0}
    assert graphs.counted({"cudaStreamSynchronize": 2, "cudaMemcpy": 1})["syncs"] == 3, "a plain copy waits too"


def test_ways_are_measured_and_a_replay_computes_the_same() -> None:
    run = load(graphs.RUN, ["model=tiny", "model.max_position_embeddings=256", "device=cpu", "kernels=torch"])
    stepper = graphs.Stepper(Setting(run, 2, CPU), lambda model: Graphs(model, CPU, Repeater(model)))
    result = graphs.measure(stepper, [load_table().tasks["nlvr2"]], batches=1, rounds=2)
    for task in result["tasks"].values():
        assert list(task["ways"]) == list(graphs.WAYS)
        assert all(way["step_s"] > 0 for way in task["ways"].values())
        assert task["replay_differs"] == {"loss": 0.0, "gradients": 0.0}
    assert result["counters"]["captures"] == 1
    assert result["counters"]["eager"] == 1
    assert result["counters"]["replays"] == 2 + 2 - 1 + 2, "warming up and timed, less the first, profiled and compared"
    text = graphs.table(result)
    assert "nlvr2" in text
    assert "differs" not in text
