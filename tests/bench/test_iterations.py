"""The command end to end on the tiny model: its JSON, table and picture; what it refuses; what it counts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import iterations
from bench.comparison import geometric_mean
from bench.counters import counting
from bench.estimate import parameters, step_flops
from bench.memory import PeakMemory, minor_faults, release, tensor_bytes
from bench.ours import Ours
from bench.peers.model import PaddedModel
from bench.provider import Setting
from bench.worker import Worker, WorkerFailed
from engine.model.config import ModelConfig
from engine.tasks import load_table

TASKS = ("nlvr2", "refcoco")


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("iterations")
    code = iterations.main(
        ["--model", "tiny", "--tasks", ",".join(TASKS), "--batch", "2", "--rounds", "2", "--threads", "1",
         "--csv", str(folder / "rows.csv"), "--json", str(folder / "out/result.json"), "--plot", str(folder / "out/ratios.png")]
    )  # fmt: skip
    assert code == 0
    return json.loads((folder / "out/result.json").read_text()), folder / "out/ratios.png"


def test_json_has_what_is_quoted(outcome: tuple[dict[str, Any], Path]) -> None:
    result, picture = outcome
    assert list(result["tasks"]) == list(TASKS)
    for peer in ("authors", "stock"):
        ratios = [task["ratio"][peer] for task in result["tasks"].values()]
        assert result["geometric_mean"][peer] == pytest.approx(math.sqrt(ratios[0] * ratios[1]))
        assert result["memory"]["working_ratio"][peer] > 0
    assert 0 < result["gemm_share"] < 1.5  # the list alone takes no longer than the step, but clocks are noisy
    assert result["padded_row_share"] == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_json_of_a_task(outcome: tuple[dict[str, Any], Path]) -> None:
    task = outcome[0]["tasks"]["nlvr2"]
    ours, authors = task["seconds"]["ours"], task["seconds"]["authors"]
    assert len(ours["all"]) == 2
    assert task["iterations_per_s"] == pytest.approx(1 / ours["median"])
    assert task["samples_per_s"] == pytest.approx(2 / ours["median"])
    assert task["ratio"]["authors"] == pytest.approx(authors["median"] / ours["median"])
    assert task["rows"]["authors"] == 2 * 2 * (41 + 101), "two pairs a sample, padded"
    assert task["rows"]["ours"] < task["rows"]["authors"]
    assert task["padded_row_share"]["ours"] == 0 < task["padded_row_share"]["stock"]
    assert task["gemm"]["products"] > 0 and len(task["gemm"]["replay_s"]) == 2
    assert task["counts"]["launches"] >= task["gemm"]["products"]
    for memory in task["memory"].values():
        used = memory["working"] + memory["weights"] + memory["optimizer"] + memory["gradients"]
        assert memory["peak"] == used and memory["working"] > 0


def test_json_says_under_which_conditions(outcome: tuple[dict[str, Any], Path]) -> None:
    conditions, providers = outcome[0]["conditions"], outcome[0]["providers"]
    for key in (
        "device",
        "isa",
        "threads",
        "torch",
        "commit",
        "precision",
        "model",
        "seed",
        "gemm_gflops",
        "load_average",
    ):
        assert key in conditions, key
    assert conditions["batch"] == 2 and conditions["rounds"] == 2 and conditions["threads"] == "1"
    assert {name: about["precision"] for name, about in providers.items()} == {
        "ours": "bfloat16", "authors": "float32", "stock": "bfloat16 autocast",
    }  # fmt: skip
    run = iterations.run_of(iterations._parser().parse_args(["--model", "tiny"]))
    tensors = len(list(PaddedModel(run.model).parameters()))
    assert providers["authors"]["optimizer"] == f"PerTensorAdamW, {tensors} parameter groups"


def test_rows_are_kept_with_where_they_come_from(outcome: tuple[dict[str, Any], Path]) -> None:
    lines = (outcome[1].parent.parent / "rows.jsonl").read_text().splitlines()
    rows = {(row["task"], row["provider"]): row for row in map(json.loads, lines)}
    assert set(rows) == {(task, provider) for task in TASKS for provider in ("ours", "authors", "stock")}
    assert rows["nlvr2", "ours"]["median_s"] == outcome[0]["tasks"]["nlvr2"]["seconds"]["ours"]["median"]
    assert {row["config"] for row in rows.values()} == {outcome[0]["conditions"]["config"]}


def test_rest_and_wake() -> None:
    """Moments go and come back as zeros, masters stay."""
    ours, row = Ours(setting()), load_table().row("vqa")
    ours.prepare(row, 0)
    first, whole = ours.step(), ours.state()
    masters = {name: value.clone() for name, value in ours.optimizer.masters().items()}
    ours.rest()
    assert ours.state()["weights"] == whole["weights"]
    assert ours.state()["optimizer"] <= 0.4 * whole["optimizer"], "a master is a third of it"
    ours.prepare(row, 1)
    state = ours.optimizer.state_dict()
    assert ours.state() == whole
    assert not any(value.any() for name, value in state.items() if "/exp_avg" in name)
    after = ours.optimizer.masters()
    assert masters and all(torch.equal(value, after[name]) for name, value in masters.items())
    assert first.gradient_bytes > 0 and math.isfinite(ours.step().loss)


def test_help_says_who_the_peers_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        iterations.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "every head evaluated" in text and "--same-batch" in text


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--tasks", "vqa,unknown"], "unknown"),
        (["--against", "apex"], "apex"),
        (["--batch", "0"], "--batch"),
        (["--model", "huge"], "huge"),
        (["--against", "none", "--plot", "x.png"], "--plot"),
        (["--config", "configs/runs/world.yaml", "--plot", "x.png"], "--plot"),
    ],
)
def test_bad_input(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert iterations.main(arguments) == 2
    assert named in capsys.readouterr().err


def setting() -> Setting:
    run = iterations.run_of(iterations._parser().parse_args(["--model", "tiny", "--threads", "1"]))
    return Setting(run, 1, torch.device("cpu"))


def test_a_failing_provider_is_named() -> None:
    with Worker("authors", setting()) as worker:
        with pytest.raises(WorkerFailed, match="authors: `step` failed"):
            worker.ask("step")  # nothing was prepared
        worker._process.kill()
        with pytest.raises(WorkerFailed, match="authors: ended at `state` .*memory"):
            worker.ask("state")
    assert not worker._process.is_alive()


def test_counts_by_hand() -> None:
    with counting() as counts:
        x = torch.zeros(4, 8)
        y = x.t().contiguous().view(-1) + 1  # a copy and an addition; the views launch nothing
        torch.empty(3)
        y.sum().item()
    result = counts.as_json()
    assert result["copies"] == 1 and result["copied_bytes"] == 4 * 8 * 4
    assert result["syncs"] == {"_local_scalar_dense": 1}
    assert result["ops"]["add"] == 1 and result["ops"]["sum"] == 1
    assert "view" not in result["ops"] and "t" not in result["ops"]


def test_memory_marks() -> None:
    peak = PeakMemory(torch.device("cpu"))
    release()
    peak.reset()
    before, faults = peak.held(), minor_faults()
    block = torch.zeros(64 << 20, dtype=torch.uint8) + 1
    held = peak.read()
    del block
    release()
    assert held - before > 60 << 20
    assert minor_faults() > faults
    peak.reset()
    assert peak.read() < held - (60 << 20)
    shared = torch.zeros(10)
    assert tensor_bytes([shared[:5], shared[5:], torch.zeros(2)]) == 48


def test_arithmetic_of_the_estimate() -> None:
    """One text row of the full model is 132.1 million weights, one region row 75.5 and 2.1 of its embedding."""
    config = ModelConfig()
    assert step_flops(config, 1, 0, all_heads=False) / 6 == pytest.approx(132.1e6, rel=1e-3)
    assert step_flops(config, 0, 1, all_heads=False) / 6 == pytest.approx(77.6e6, rel=1e-3)
    assert parameters(config) == pytest.approx(268e6, rel=0.1)
    assert geometric_mean([2.0, 8.0]) == pytest.approx(4.0)
