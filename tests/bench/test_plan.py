"""What a plan counts, against what runs; its arithmetic, against numbers by hand; its warnings and its table of hardware."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from bench import lengths, plan, plan_batches, plan_check, plan_hardware, plan_ranks
from bench.batches import draw, pack
from bench.gemms import GemmRecorder
from bench.peak_memory import peak_bytes
from bench.plan_check import Checked
from bench.plan_cost import Layout, Work, communicate, step
from bench.plan_count import Counted, Product
from bench.plan_cpu import CpuRank, Line, Rates
from bench.plan_gpu import GpuRank
from bench.plan_memory import of_rank
from bench.plan_model import Model, values
from bench.plan_report import MEASURED, PROJECTION, Plan
from bench.plan_samples import Sample
from engine.config import RunConfig, load
from engine.model.config import ModelConfig
from engine.model.published import PUBLISHED_HEADS
from engine.model.randomness import Randomness
from engine.model.vilbert import ViLBERT
from engine.step import forward_backward
from engine.tasks import load_table
from pipelines.errors import BadInput

TINY = ("model=tiny", "model.max_position_embeddings=256", "precision=bfloat16")
HARDWARE = plan_hardware.load()


def tiny(*overrides: str) -> RunConfig:
    return load(plan.RUN, [*TINY, *overrides])


# Counting


@pytest.mark.parametrize("task", ["refcoco", "coco_retrieval", "visual7w", "nlvr2", "snli_ve"])
def test_what_is_counted_is_what_runs(task: str) -> None:
    """The same products in the same order, and the allocator's peak, of a step that computes."""
    config, row = tiny().model, load_table().row(task)
    batch = pack(draw(row, lengths.load()[task], config, 3, (0, 0)), torch.bfloat16)
    counted = Model(config, dict(PUBLISHED_HEADS), torch.bfloat16, plan.isa()).count(batch, row.head)

    model = ViLBERT(config, PUBLISHED_HEADS)
    model.initialise(0)
    model.to(torch.bfloat16)

    def run() -> None:
        forward_backward(model, row.head, 1.0, True, batch, Randomness(0, 1, training=True))

    with GemmRecorder() as recorder:
        run()
    drop(model)
    assert [product.flops for product in counted.products] == [gemm.flops for gemm in recorder.gemms]
    if plan.isa():  # the plain reference keeps more than the kernels do, and is not what a plan is for
        scratch = 0.01 if plan.isa() == "amx" else 0.15  # oneDNN's, where products are its own; nobody counts it
        assert counted.activations == pytest.approx(peak_bytes(run, torch.device("cpu")), rel=scratch)
    assert counted.rows == batch.pair_text_rows + batch.pair_image_rows
    assert counted.images == batch.n_images
    assert counted.batch_bytes == sum(x.nbytes for x in batch.tensors())
    assert counted.gradients == values(model.trunk) + values(model.heads[row.head])


def drop(model: ViLBERT) -> None:
    for block in model.blocks():
        block.drop_gradients()


def test_products_of_the_full_model_are_those_that_were_measured() -> None:
    measured = json.loads(Path("bench/results/iterations_batch_4.json").read_text())["tasks"]
    run = load(plan.RUN, ["precision=bfloat16"])
    source = plan_batches.source(run)
    model = Model(run.model, dict(source.heads), torch.bfloat16, "amx")
    for row in source.rows:
        counted = model.count(source.draw(row, 4, 1), row.head)
        gemm = measured[row.name]["gemm"]
        assert (len(counted.products), sum(p.flops for p in counted.products)) == (gemm["products"], gemm["flops"])


def test_parameters_are_those_of_the_published_model() -> None:
    """268,028,859 less what the twelve tasks do not train: pretraining's heads, q_dense1 and 2 of six bridges, and a head of
    the text stream that no task has."""
    model = Model(ModelConfig(), dict(PUBLISHED_HEADS), torch.bfloat16)
    layout = plan_batches.layout_of(load(plan.RUN), model)
    pretraining = (768 * 768 + 3 * 768 + 30522) + (1024 * 1024 + 3 * 1024 + 1601 * 1025) + 2 * 1025
    never_used = 6 * (1024 * 1025 + 768 * 1025)
    assert layout.parameters == 268_028_859 - pretraining - never_used - 769
    assert layout.trunk + layout.heads["vision_logit"] == 235_721_216 + 1025
    assert layout.trunk_tensors == 54


def test_the_rank_with_most_rows_is_counted() -> None:
    run, row = tiny(), load_table().row("guesswhat_pointing")
    draw_one = plan_batches.source(run).draw
    rows = [plan_batches.shapes(run, row, lengths.load()[row.name], 2, turn) for turn in range(4)]
    most = max(batch.pair_text_rows + batch.pair_image_rows for batch in rows)
    found = draw_one(row, 2, 4)
    assert found.pair_text_rows + found.pair_image_rows == most > draw_one(row, 2, 1).pair_text_rows


# Arithmetic, by hand


def layout(**changes: Any) -> Layout:
    plain = Layout(
        ranks=4, stage=0, precision="bfloat16", trunk=1000, heads={"a": 200, "b": 100}, trunk_tensors=5, largest=300,
        bucket=1000.0,
    )  # fmt: skip
    return replace(plain, **changes)


@pytest.mark.parametrize(
    ("stage", "ranks", "weights", "gradients", "optimizer"),
    [(0, 1, 2600, 2600, 15600), (0, 4, 2600, 2600, 15600), (1, 4, 2600, 2600, 3900), (2, 4, 2600, 650, 3900),
     (3, 4, 650, 650, 3900)],
)  # fmt: skip
def test_memory_by_stage(stage: int, ranks: int, weights: int, gradients: int, optimizer: int) -> None:
    """1,300 values: 2 bytes each of weights and gradients, 12 of master and moments."""
    counted = [Counted(activations=7000, batch_bytes=50), Counted(activations=500, batch_bytes=90)]
    memory = of_rank(layout(stage=stage, ranks=ranks), counted, context=11.0)
    assert (memory.weights, memory.gradients, memory.optimizer) == (weights, gradients, optimizer)
    assert memory.activations == 7000
    buckets = 0 if ranks == 1 else 2 * 1000 * 2 / 2
    gathered = 2 * 600 if stage == 3 else 0
    assert memory.buffers == 11 + 600 + 2 * 90 + buckets + gathered
    assert memory.total == sum((weights, gradients, optimizer, 7000, memory.buffers))


def test_memory_in_float32() -> None:
    """No masters: 4 bytes of weights, 4 of gradients, 8 of moments."""
    memory = of_rank(layout(ranks=1, precision="float32"), [Counted()])
    assert (memory.weights, memory.gradients, memory.optimizer) == (5200, 5200, 10400)


class Slow:
    """A machine whose collectives take a second a byte that is sent, over the ranks' share of it."""

    title, measured, overlap, memory = "slow", True, 0.5, 1e9

    def work(self, counted: Counted, graphs: bool) -> Work:
        return Work(products=1.0, attention=2.0, elementwise=3.0, host=1.0)

    def update(self, values: int, tensors: int) -> float:
        return values / 100

    def travel(self, sent: float, ranks: int, collectives: int, both_ways: bool) -> float:
        return (2 if both_ways else 1) * (ranks - 1) / ranks * sent

    def agree(self, work: Work) -> float:
        return 0.25

    def engine(self, stage: int) -> float:
        return 0.5 * stage

    def load(self, images: int, sent: int, threads: int) -> float:
        return images / threads


@pytest.mark.parametrize(
    ("stage", "sent", "seconds", "hidden"),
    [(0, 3600, 3600, 2), (1, 3600, 3600, 2), (2, 3600, 3600, 2), (3, 5400, 5400, 2 + 1)],
)
def test_communication(stage: int, sent: float, seconds: float, hidden: float) -> None:
    """1,200 values of 2 bytes, three quarters of which cross: 1,800 bytes a pass. Forward takes 2 s, backward 4, half of
    either hides what travels; at stage 3 gathering for forward hides behind it, the rest of backward is used up."""
    found = communicate(Slow(), layout(stage=stage), 1200, Slow().work(Counted(), False))
    assert found.sent == sent
    assert found.seconds == pytest.approx(seconds + 0.25)
    assert found.exposed == pytest.approx(seconds + 0.25 - hidden)


def test_the_last_bucket_hides_behind_nothing() -> None:
    machine = Slow()
    machine.overlap = 1e9
    found = communicate(machine, layout(bucket=500.0), 1200, machine.work(Counted(), False))
    assert found.exposed == pytest.approx(3600 / 4 + 0.25)


def test_one_rank_waits_for_nobody() -> None:
    found = communicate(Slow(), layout(ranks=1), 1200, Slow().work(Counted(), False))
    assert (found.sent, found.seconds, found.exposed) == (0, 0, 0)


def test_a_step() -> None:
    """6 s of forward and backward; AdamW on the trunk and the head that ran, a quarter of them from stage 1 on."""
    whole = step(Slow(), layout(ranks=1), "vqa", "a", 8, 8, Counted(images=2))
    assert (whole.work.seconds, whole.update, whole.seconds, whole.waiting) == (6, 12, 18, 0)
    starved = step(Slow(), layout(ranks=1, data_threads=2), "vqa", "a", 8, 8, Counted(images=100))
    assert (starved.seconds, starved.waiting) == (50, 32)
    divided = step(Slow(), layout(stage=1), "vqa", "b", 8, 2, Counted())
    assert divided.update == pytest.approx(1100 / 4 / 100) and (divided.engine, whole.engine) == (0.5, 0)
    assert divided.computing == pytest.approx(6 + divided.communication.exposed + 1100 / 4 / 100 + 0.5)


def gpu(**changes: Any) -> GpuRank:
    return replace(GpuRank(HARDWARE.gpu("h100"), HARDWARE.efficiencies, per_node=8, images_per_s=1e9), **changes)


def value(name: str) -> float:
    return float(getattr(HARDWARE.efficiencies, name).value)


@pytest.mark.parametrize(
    ("m", "n", "k", "used"),
    [
        (128 * 12, 128 * 11, 4096, 1.0),  # a tile for each multiprocessor
        (128 * 19, 128 * 7, 4096, 133 / 264),  # and one more
        (128 * 12, 128 * 8, 1024, 96 / 132),  # fewer, and too short a sum for the rest to help
        (128 * 6, 128 * 8, 1 << 20, 96 / 132),  # 48 tiles, and their sums split in two
    ],
)
def test_tiles(m: int, n: int, k: int, used: float) -> None:
    arithmetic = 2 * m * n * k / (used * value("products") * 989e12)
    assert gpu().product(Product(m, n, k, 2)) == pytest.approx(arithmetic)


def test_a_small_product_waits_for_memory_or_for_itself() -> None:
    wide = Product(1, 1 << 14, 1 << 14, 2)
    assert gpu().product(wide) == pytest.approx(wide.bytes / (value("adamw") * 3.35e12))
    assert gpu().product(Product(1, 1, 1, 2)) == value("kernel")


def test_launches_bind_without_graphs() -> None:
    counted = Counted(calls=Counter(products=0, other=1000))
    assert gpu().work(counted, graphs=False).seconds == pytest.approx(1000 * value("launch"))
    assert gpu().work(counted, graphs=True).seconds == pytest.approx(1000 * value("kernel"))


def test_travel_within_and_between_nodes() -> None:
    """7/8 over NVLink, then 1/2 of an eighth over the network."""
    within = 7 / 8 * 1e9 / (value("nvlink") * 450e9)
    between = 1 / 2 * 1e9 / 8 / (value("network") * 50e9)
    latency = value("collective")
    assert gpu().travel(1e9, 8, 3, both_ways=False) == pytest.approx(within + 3 * latency)
    assert gpu().travel(1e9, 16, 3, both_ways=True) == pytest.approx(2 * (within + between) + 2 * 3 * latency)


def test_lines_are_found_again() -> None:
    line = Line(2e-6, 3e-12, 4e-11)
    sizes = [(1, 1e6, 1e4), (3, 1e8, 1e6), (9, 2e9, 5e6), (2, 1e5, 1e7)]
    found = Line.fit(
        [Sample("x", calls, flops, moved, line.seconds(calls, flops, moved)) for calls, flops, moved in sizes]
    )
    assert (found.fixed, found.per_flop, found.per_byte) == pytest.approx((2e-6, 3e-12, 4e-11))
    falling = Line.fit([Sample("x", 1, 0, 1e6, 2e-3), Sample("x", 1, 0, 2e6, 1e-3)])
    assert falling.per_byte == 0 and falling.fixed > 0, "no coefficient is negative"


def test_rates_know_what_lies_between_kernels() -> None:
    """Kernels alone, then whole steps in which they take half as much again, and a microsecond passes between any two."""
    kinds = ("products", "attention", "layernorm", "other")
    alone = [Sample(kind, 1, 0, moved, 1e-6 + moved * 1e-10) for kind in kinds for moved in (1e4, 1e7)]
    steps = []
    for calls, moved in ((100, 10**6), (50, 10**9)):
        counted = Counted(calls=Counter(other=calls), bytes=Counter(other=moved))
        seconds = 1.5 * (calls * 1e-6 + moved * 1e-10) + calls * 1e-6
        steps += [Sample("steps", 0, 0, 0, seconds * slower, counted) for slower in (1, 1, 50)]  # one was disturbed
    rates = Rates.fit([*alone, *steps])
    assert (rates.colder, rates.between) == pytest.approx((1.5, 1e-6))
    assert rates.work(counted).elementwise == pytest.approx(seconds)


# Warnings


def planned(machine: Any = None, **changes: Any) -> Plan:
    machine = machine or gpu()
    of = layout(**({"ranks": 1} | changes))
    counted = Counted(images=1, activations=10, calls=Counter(other=10))
    steps = (step(machine, of, "vqa", "a", 8, 8, counted), step(machine, of, "nlvr2", "b", 2, 2, counted))
    return Plan(machine, of, steps, of_rank(of, [counted]), 100, 1e9, HARDWARE.limits)


def test_no_warning_without_a_reason() -> None:
    assert planned(graphs=True).warnings == ()


def warned(of: Plan, start: str) -> str:
    (found,) = (line for line in of.warnings if line.startswith(start))
    return found


def test_warnings() -> None:
    plain = planned(graphs=True)
    large = replace(plain, memory=replace(plain.memory, activations=73e9))
    assert "most are activations, 73.0 GB" in warned(large, "does not fit")
    assert not replace(plain, memory=replace(plain.memory, activations=71e9)).warnings
    assert "data_threads=" in warned(replace(plain, capacity=plain.images_per_s / 3), "starves")
    assert "%" in warned(planned(Slow(), ranks=4), "bound by communication")
    assert warned(planned(graphs=True, ranks=4), "fewer examples").endswith("nlvr2 (2)")
    assert "2 of 2 tasks: cuda_graphs=true" in warned(planned(graphs=False), "bound by the host")


def test_hours() -> None:
    """100 rounds of two steps of 18 and 17 s: the heads differ by 100 values."""
    of = planned(Slow())
    assert of.round_s == pytest.approx(6 + 12 + 6 + 11)
    assert of.hours == pytest.approx(100 * 35 / 3600)
    assert of.images_per_s == pytest.approx(2 / 35)


# The table of hardware


def test_every_number_has_a_source() -> None:
    rows = yaml.safe_load(plan_hardware.FILE.read_text())
    assert set(rows["gpus"]) == {"h100", "h200", "a100-80", "a100-40", "l40s"}
    for name, row in rows["gpus"].items():
        assert set(row["sources"]) == set(row) - {"title", "sources"}, name
        assert all(isinstance(source, str) and source for source in row["sources"].values()), name
    assert all(row["from"] and row["unit"] for row in rows["efficiencies"].values())


@pytest.mark.parametrize(
    ("path", "named"),
    [(("gpus", "h100", "sources", "nvlink"), "no source of nvlink"), (("gpus", "l40s", "memory"), "gpus.l40s.memory"),
     (("efficiencies", "adamw", "from"), "efficiencies.adamw.from"), (("limits",), "limits")],
)  # fmt: skip
def test_a_table_that_lacks_something(path: tuple[str, ...], named: str, tmp_path: Path) -> None:
    rows = yaml.safe_load(plan_hardware.FILE.read_text())
    place = rows
    for key in path[:-1]:
        place = place[key]
    del place[path[-1]]
    file = tmp_path / "hardware.yaml"
    file.write_text(yaml.safe_dump(rows))
    with pytest.raises(BadInput, match=named):
        plan_hardware.load(file)


# The command


def test_projection(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "out/plan.json"
    what = ["--gpus", "1,8", "--gpu", "a100-40", "--zero", "0,1,2,3", "--json", str(file)]
    assert plan.main([*what, *TINY, "tasks=[vqa,nlvr2]"]) == 0
    assert PROJECTION in " ".join(capsys.readouterr().out.split())
    result = json.loads(file.read_text())
    assert [(of["ranks"], of["zero"]) for of in result["plans"]] == [(1, 0), (8, 0), (8, 1), (8, 2), (8, 3)]
    for of in result["plans"]:
        assert of["provenance"] == PROJECTION
        assert list(of["tasks"]) == ["vqa", "nlvr2"]
        assert of["round_s"] == pytest.approx(sum(task["seconds"] for task in of["tasks"].values()))
        assert of["hours"] == pytest.approx(40_000 * of["round_s"] / 3600)
    one, first, second = (result["plans"][i]["memory"]["optimizer"] for i in (0, 1, 2))
    assert (first, second) == (one, pytest.approx(one / 8))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "nothing to plan for"),
        (["--gpus", "8", "--gpu", "h1000"], "h1000"),
        (["--gpus", "0"], "--gpus 0"),
        (["--gpus", "x"], "--gpus x"),
        (["--gpus", "8", "--zero", "4"], "--zero 4"),
        (["--gpus", "8", "--per-node", "0"], "--per-node"),
        (["--gpus", "8", "precision=float32"], "precision"),
        (["--gpus", "8", "tasks=conceptual_captions"], "conceptual_captions"),
        (["--cpu-ranks", "4096"], "cores"),
    ],
)
def test_bad_input(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(arguments) == 2
    error = capsys.readouterr().err
    assert named in error and error.count("\n") == 1


def test_without_a_measured_pipeline(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"python -m bench\.pipeline"):
        plan.pipeline_rate(tmp_path / "pipeline.json")


@pytest.mark.parametrize(("predicted", "code"), [(1.14, 0), (1.16, 1), (0.86, 0), (0.84, 1)])
def test_a_check_fails_beyond_15_percent(predicted: float, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [Checked("tiny", "vqa", 2 * predicted, 1.0), Checked("tiny", "nlvr2", predicted / 2, 1.0)]
    found.append(Checked("full", "vqa", 1.0, 1.0))  # which must not make up for it
    monkeypatch.setattr(plan_check, "one_rank", lambda *_: found)
    assert plan.main(["--check"]) == code


@pytest.mark.slow
def test_two_ranks_on_a_cpu() -> None:
    samples = plan_ranks.measure(tiny(), 2, plan.isa(), [0, 1], lambda line: None)
    rank = plan_ranks.fitted(tiny(), 2, plan.isa(), samples, 1000.0)
    assert isinstance(rank, CpuRank) and rank.reduce.seconds(1, 0, 1e6) > 0
    for of, _ in plan.plans(tiny("tasks=[vqa,nlvr2]"), rank, [2], [0, 1], isa=plan.isa()):
        assert of.provenance == MEASURED
        assert all(found.communication.exposed == found.communication.seconds > 0 for found in of.steps)


@pytest.mark.slow
def test_a_step_is_predicted() -> None:
    case = plan_check.Case("tiny", 16, ("vqa", "nlvr2"))
    found = plan_check.one_rank(plan.RUN, ["threads=1"], plan.isa(), lambda line: None, [case])
    assert plan_check.off(found) < 0.5, "a neighbour may disturb it; python -m bench.plan --check asks for 15 %"
