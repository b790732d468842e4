"""`python -m bench.kernels`: the same work for everybody, right counts, files that say what they should."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench import kernel_measure
from bench.kernel_case import DEFAULT_TASKS, Call, Setting, Work, draw
from bench.kernel_cases import cases
from bench.kernel_measure import Ceilings, Row, _limited, _TooLong, measure
from bench.kernel_peers import PACKAGES
from bench.kernel_plot import plot
from bench.kernel_report import headline
from bench.kernels import main
from bench.peak_memory import peak_bytes
from bench.timing import interleaved, spread
from kernels.names import OPS

CPU = torch.device("cpu")
SMALL = Setting("small", (5, 5), (7, 7), captions=2, words=50, parameters=1000, p=0.0)
"""Items of one length each, no dropout: packed and padded rows are the same, and so are everybody's results."""


def results(value: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return [x.detach().double().flatten().clone() for x in (value if isinstance(value, tuple) else (value,))]


@pytest.mark.parametrize("op", [op for op in OPS if op != "adamw"])
def test_peers_compute_the_same(op: str) -> None:
    for case in cases(op, SMALL, torch.float32, CPU):
        truth = results(case.ours.function(*case.ours.leaves))
        for name, make in case.peers.items():
            if name in PACKAGES:
                continue
            peer = make()
            leaves = peer.leaves
            if name == "torch_gemm_bias":  # the product before has added the bias
                leaves = ((case.ours.leaves[0] + case.ours.leaves[1]).detach(), *leaves[1:])
            for ours, theirs in zip(truth, results(peer.function(*leaves)), strict=True):
                torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4, msg=f"{op} by {name}: {case.shape}")


def test_an_optimizer_step_moves_every_master_for_everybody() -> None:
    (case,) = cases("adamw", SMALL, torch.float32, CPU)
    for make in (lambda: case.ours, case.peers["torch"], case.peers["torch_fused"]):
        call = make()
        (before,), (after,) = results(call.function()), results(call.function())
        assert (after != before).double().mean() > 0.99


def test_work_is_counted_as_by_hand() -> None:
    text, *_ = cases("attention", SMALL, torch.bfloat16, CPU)
    rows = 2 * 5 * 768 * 2
    product = 2 * (2 * 5 * 5) * 768
    forward, backward = Work(4 * rows, 2 * product), Work(7 * rows, 5 * product)
    assert text.work == {"forward": forward, "backward": backward, "both": forward + backward}
    assert text.longest == 5
    (step,) = cases("adamw", SMALL, torch.bfloat16, CPU)
    assert step.work == {"step": Work(1000 * (2 + 2 + 6 * 4))}  # gradient, weights, three float32 read and written
    _, image = cases("bias_gelu", SMALL, torch.float32, CPU)
    once = (2 * 14 * 1024 + 1024) * 4
    assert image.work["forward"] == Work(once)
    assert image.work["backward"] == Work(once + (14 * 1024 + 1024) * 4)


@pytest.mark.parametrize("task", DEFAULT_TASKS)
def test_pairs_of_a_batch(task: str) -> None:
    drawn = draw(task, 16)
    pairs = {"nlvr2": 32, "coco_retrieval": 64}.get(task, 16)
    assert len(drawn.texts) == len(drawn.regions) == pairs
    assert min(drawn.regions) >= (306 if task == "guesswhat_306" else 101)
    assert drawn == draw(task, 16)


def test_calls_take_turns_and_only_what_is_prepared_is_timed() -> None:
    order: list[str] = []

    def prepare(name: str) -> Callable[[], object]:
        order.append(f"prepare {name}")
        return partial(order.append, name)

    found = interleaved({"a": partial(prepare, "a"), "b": partial(prepare, "b")}, CPU, seconds=0.0)
    assert order == ["prepare a", "a", "prepare b", "b"] * 4  # one round to warm up, three that count
    assert found["a"].calls == found["b"].calls == 3


def test_quantiles() -> None:
    found = spread([5.0, 1.0, 2.0, 4.0, 3.0, 6.0])
    assert (found.least, found.low, found.median, found.high, found.calls) == (1.0, 2.0, 3.5, 5.0, 6)


def test_peak_memory_counts_what_lives_together() -> None:
    def call() -> Tensor:
        first = torch.empty(1000)
        del first
        return torch.empty(500) + torch.empty(250).sum()

    assert 4000 <= peak_bytes(call, CPU) <= 4100
    assert peak_bytes(lambda: torch.empty(10_000), CPU) == 40_000


def test_a_compiler_that_takes_too_long_is_stopped() -> None:
    with pytest.raises(_TooLong), _limited(0.05):
        while True:
            try:
                sum(range(1000))
            except Exception:  # noqa: BLE001 - compilers do this; it must not swallow the end of their time
                continue


def test_a_run_appends_to_its_csv_and_writes_json_and_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    table, result, picture = tmp_path / "new" / "kernels.csv", tmp_path / "kernels.json", tmp_path / "kernels.png"
    command = ["--quick", "--op", "soft_label_bce", "--dtype", "float32", "--csv", str(table)]
    assert main([*command, "--json", str(result), "--plot", str(picture)]) == 0
    assert "soft_label_bce, float32" in capsys.readouterr().out
    assert main(command) == 0
    lines = list(csv.DictReader(table.open()))
    rows = json.loads(result.read_text())["rows"]
    assert len(lines) == 2 * len(rows) == 2 * 2 * 2 * 3  # runs, shapes, providers, modes
    assert lines[0]["torch"] == torch.__version__ and lines[0]["dirty"] in ("true", "false") and lines[0]["config"]
    again = [json.loads(line) for line in table.with_suffix(".jsonl").read_text().splitlines()]
    assert [row["median_us"] for row in again] == [float(line["median_us"]) for line in lines]
    assert all(row["median_us"] >= min(row["samples_us"]) > 0 for row in again)
    assert {row["provider"] for row in rows} in ({"native", "torch"}, {"reference", "torch"})
    for row in rows:
        assert 0 < row["least_us"] <= row["p20_us"] <= row["median_us"] <= row["p80_us"]
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["median_us"] / 1e3, rel=0.02, abs=0.01)
        assert row["share"] == pytest.approx(row["ceiling_us"] / row["median_us"], rel=0.02, abs=0.002)
    assert picture.read_bytes().startswith(b"\x89PNG")


ROW = Row(
    "bias_dropout_residual_layernorm", "native", "both", "float32", "vqa", "s, dropout 0.1", 10.0, 9.0, 11.0, 8.0, 5, 100,
    0, 1.0, 0.0, "bandwidth", 5.0, 0.5, None, None,
)  # fmt: skip


def test_headline_ratios_are_peers_over_ours_in_the_mean_of_shapes(tmp_path: Path) -> None:
    rows = [ROW, replace(ROW, provider="torch", median_us=20.0, least_us=8.0)]
    rows += [replace(row, task="gqa", median_us=row.median_us**2 / 10) for row in rows]
    region = replace(ROW, op="masked_region_loss", peak_bytes=100, gradient_bytes=40)
    everything = replace(region, provider="torch_all_rows", median_us=50.0, least_us=24.0)
    rows += [region, replace(everything, peak_bytes=2000, gradient_bytes=0)]
    short = replace(ROW, op="attention", dtype="bfloat16")
    rows += [
        short,
        replace(short, provider="sdpa", median_us=40.0),
        replace(short, task="guesswhat_306", median_us=1.0),
    ]
    found = headline(rows)
    assert found["layernorm"] == {"torch, float32": {"median": 2.83, "least": 1.0, "worst": 2.0}}  # √(2 · 4)
    assert found["masked_region_loss_against_all_regions"] == {
        "float32": {"median": 5.0, "least": 3.0, "worst": 5.0, "memory": 0.05, "memory_beyond_gradients": 0.03}
    }
    assert found["short_attention_bfloat16"] == {"sdpa": {"median": 4.0, "least": 1.0, "worst": 4.0}}
    plot(tmp_path / "p.png", rows, {"device": "d", "isa": "i", "threads": "1", "torch": "t"})
    assert (tmp_path / "p.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--op", "attention,atention"], "there is no atention (there are attention, "),
        (["--aot", "sm_99"], "there is no sm_99"),
        (["--dtype", "float64"], "there is no float64"),
        (["--tasks", "vqqa"], "there is no vqqa"),
    ],
)
def test_unknown_names_are_refused(arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert complaint in capsys.readouterr().err


def test_help_says_what_the_columns_mean() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench.kernels", "--help"],
        cwd=Path(__file__).resolve().parents[2], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0
    for word in ("--aot", "share", "× peer", "quantiles", "build/bench/kernels.csv"):
        assert word in done.stdout


def test_a_peer_that_fails_is_reported_and_the_others_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashAttention has no float32, for instance."""
    monkeypatch.setattr(kernel_measure, "missing", lambda name, device: "")
    case = next(cases("attention", SMALL, torch.float32, CPU))

    def fails() -> Call:
        raise RuntimeError("only for fp16\nand bf16")

    case = replace(case, peers={"flash_attn": fails, "torch": case.peers["torch"]})
    rows, skipped = measure(case, CPU, 0.0, Ceilings(CPU, 0.0), compile_seconds=0)
    assert {row.provider for row in rows if row.provider != "reference"} <= {"native", "torch"}
    assert [(one.provider, one.reason) for one in skipped] == [("flash_attn", "RuntimeError: only for fp16")]
