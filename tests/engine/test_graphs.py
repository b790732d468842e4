"""The bookkeeping of recorded steps, with a recorder that does the work again where a GPU would replay it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from engine import assembly, graphs
from engine.assembly import Parts, assemble
from engine.config import load_tasks
from engine.cursor import Cursor, Window
from engine.graphs import Graphs
from engine.loop import Listener, Loop
from engine.model.randomness import Randomness
from engine.step import StepResult, forward_backward, train_step
from pipelines.batch import Batch
from pipelines.buckets import Grid, bucket_of
from pipelines.errors import BadInput
from tests.engine import two_ranks
from tests.engine.repeater import Repeater
from tests.engine.small_run import configure

GRID = Grid.fitting(16)
CPU = ("device=cpu", "kernels=torch")
GPU = pytest.param(
    ("device=cuda",), marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"), id="gpu"
)


class Losses(Listener):
    """Remembers every window's loss."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def window(self, iteration: int, task: str, window: Window, *_: object) -> None:
        self.found.append(window.loss)


class Run:
    """One model and optimizer, stepped with or without graphs."""

    def __init__(self, folder: Path, limit: int | None = None, overrides: Sequence[str] = CPU) -> None:
        self.parts = assemble(configure(folder, *overrides))
        model, device = self.parts.model, self.parts.device
        recorder = Repeater(model) if device.type == "cpu" else None
        self.graphs = None if limit is None else Graphs(model, device, recorder, limit)

    def batch(self, task: str, number: int) -> Batch:
        return dataclasses.replace(self.parts.tasks[task].train, grid=GRID)(number)

    def step(self, task: str, batch: Batch, step: int) -> StepResult:
        row = self.parts.tasks[task].row
        return train_step(
            self.parts.model, self.parts.optimizer, batch if self.graphs else batch.to(self.parts.device), row.head,
            loss_scale=1.5, lr_multiplier=0.1, random=Randomness(3, step, training=True), graphs=self.graphs,
        )  # fmt: skip


def weights(parts: Parts) -> dict[str, Tensor]:
    state = {name: value.detach().clone() for name, value in parts.model.named_parameters()}
    return state | {f"optimizer/{key}": value.clone() for key, value in parts.optimizer.state_dict().items()}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("where", [pytest.param(CPU, id="cpu"), GPU])
def test_training_with_graphs_is_training_without(tmp_path: Path, where: tuple[str, ...], precision: str) -> None:
    """All five kinds of task, every batch several times: the same results, weights and moments, to the bit."""
    eager, recorded = (Run(tmp_path, limit, (*where, f"precision={precision}")) for limit in (None, 100))
    results: dict[Run, list[StepResult]] = {eager: [], recorded: []}
    buckets = set()
    for step in range(4):
        for task in eager.parts.tasks:
            batch = eager.batch(task, step % 2)
            buckets.add((task, bucket_of(batch)))
            for run, steps in results.items():
                steps.append(run.step(task, batch, step))
    for found, expected in zip(results[recorded], results[eager], strict=True):
        for field in dataclasses.fields(StepResult):
            assert torch.equal(getattr(found, field.name), getattr(expected, field.name)), field.name
    learned, wanted = weights(recorded.parts), weights(eager.parts)
    assert learned.keys() == wanted.keys()
    assert all(torch.equal(learned[key], value) for key, value in wanted.items())
    assert recorded.graphs is not None
    counters = recorded.graphs.counters
    assert counters.eager == counters.captures == len(buckets)
    assert counters.replays == 4 * len(eager.parts.tasks) - len(buckets)
    assert counters.dropped == 0
    told = str(counters)
    assert f"{counters.replays} steps replayed, {counters.captures} recorded" in told
    assert f"{100 * counters.padded_rows / counters.rows:.1f} % of rows were padding" in told


def test_masks_change_between_replays_and_only_with_the_step(tmp_path: Path) -> None:
    run = Run(tmp_path, 10)
    assert run.graphs is not None
    model, batch = run.parts.model, run.batch("answers", 0)
    work = partial(forward_backward, model, run.parts.tasks["answers"].row.head, 1.0, True)
    losses = []
    for step in (1, 2, 3, 2):
        losses.append(float(run.graphs.run("answers", batch, Randomness(3, step, training=True), work)[0]))
        for block in model.blocks():
            block.drop_gradients()
    assert losses[1] == losses[3]
    assert len(set(losses)) == 3


def test_results_outlive_the_next_replay(tmp_path: Path) -> None:
    """The loop reads losses once per log window."""
    run = Run(tmp_path, 10)
    batch = run.batch("answers", 0)
    found = [run.step("answers", batch, step) for step in range(4)]
    at_once = [float(result.loss) for result in found]
    run.step("answers", batch, 9)
    assert [float(result.loss) for result in found] == at_once
    assert len(set(at_once)) == 4


def test_the_graph_not_used_for_longest_is_dropped(tmp_path: Path) -> None:
    run = Run(tmp_path, 2)
    assert run.graphs is not None
    counters = run.graphs.counters
    tasks = ["answers", "phrases", "pairs"]
    batches = {task: run.batch(task, 0) for task in tasks}
    for step, task in enumerate(["answers", "phrases"] * 2):
        run.step(task, batches[task], step)
    assert (counters.eager, counters.captures, counters.replays, counters.dropped) == (2, 2, 2, 0)
    run.step("answers", batches["answers"], 5)  # so that `phrases` is the oldest
    for step in (6, 7):
        run.step("pairs", batches["pairs"], step)
    assert (counters.eager, counters.captures, counters.replays, counters.dropped) == (3, 3, 4, 1)
    run.step("answers", batches["answers"], 8)
    assert (counters.replays, counters.captures) == (5, 3), "the one in use was kept"
    run.step("phrases", batches["phrases"], 9)
    assert (counters.eager, counters.captures) == (4, 3), "what was dropped must come twice again"


def test_a_larger_batch_takes_new_memory_and_older_graphs_keep_theirs(tmp_path: Path) -> None:
    eager, recorded = Run(tmp_path), Run(tmp_path, 10)
    small = [recorded.batch("answers", 4) for _ in range(2)]  # the last batch of the epoch
    large = [recorded.batch("captions", 0) for _ in range(2)]
    assert small[0].slab is not None
    assert large[0].slab is not None
    assert large[0].slab.numel() > 1 << (small[0].slab.numel() - 1).bit_length()
    for step, batch in enumerate([*small, *large, *small, *large]):
        found, expected = (run.step(batch.task, batch, step) for run in (recorded, eager))
        assert torch.equal(found.loss, expected.loss)
        assert torch.equal(found.grad_norm, expected.grad_norm)
    assert recorded.graphs is not None
    assert recorded.graphs.counters.captures == 2


def test_padding_is_counted(tmp_path: Path) -> None:
    run = Run(tmp_path, 10)
    assert run.graphs is not None
    assert run.graphs.counters.as_json()["padded_row_share"] == 0
    batches = [run.batch("answers", number) for number in range(2)]
    for batch in batches:
        run.step("answers", batch, 0)
    padded, rows = sum(b.padding for b in batches), sum(b.pair_text_rows + b.pair_image_rows for b in batches)
    assert run.graphs.counters.as_json()["padded_row_share"] == padded / rows > 0


def test_left_gradients_are_not_recorded_into_a_graph(tmp_path: Path) -> None:
    run = Run(tmp_path, 10)
    batch = run.batch("answers", 0)
    run.step("answers", batch, 0)
    parameter = next(run.parts.model.parameters())
    parameter.grad = torch.zeros_like(parameter)
    with pytest.raises(RuntimeError, match="gradients are left"):
        run.step("answers", batch, 1)


def test_an_unpadded_batch_is_refused(tmp_path: Path) -> None:
    run = Run(tmp_path, 10)
    with pytest.raises(ValueError, match="no padded batch"):
        run.step("answers", run.parts.tasks["answers"].train(0), 0)


def test_a_cpu_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    config = configure(tmp_path, "cuda_graphs=true", "device=cpu")
    (tmp_path / "sheet.yaml").unlink()
    with pytest.raises(BadInput, match="cuda_graphs: graphs are recorded on a GPU, and this run is on cpu"):
        assemble(config)
    with pytest.raises(BadInput, match="recorded on a GPU"):
        Graphs(nn.Linear(1, 1), torch.device("cpu"))


def test_the_loop_trains_with_graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assembly, "refuse_without_gpu", lambda device: None)
    monkeypatch.setattr(graphs, "refuse_without_gpu", lambda device: None)
    monkeypatch.setattr(graphs, "CudaRecorder", lambda device: None)
    plain, recorded = (
        assemble(configure(tmp_path, "device=cpu", "kernels=torch", f"cuda_graphs={on}")) for on in (False, True)
    )
    recorded.stepper.graphs = Graphs(recorded.model, recorded.device, Repeater(recorded.model))
    told = [Losses(), Losses()]
    loops = [
        Loop(parts, Cursor(), tmp_path / str(number), losses)
        for number, (parts, losses) in enumerate(zip((plain, recorded), told, strict=True))
    ]
    assert all(loop.run() for loop in loops)
    assert plain.stepper.graphs is None
    assert recorded.stepper.graphs is not None
    counters = recorded.stepper.graphs.counters
    steps = sum(loops[1].cursor.consumed.values())
    assert counters.eager + counters.replays == steps
    assert counters.replays > 0
    assert 0 < counters.padded_rows < 0.3 * counters.rows
    # Products of other row counts round otherwise, and training carries that on: 1e-4 to 1e-3 by kind of CPU.
    assert told[1].found == pytest.approx(told[0].found, rel=3e-3)
    assert len(told[0].found) == 10


def test_two_ranks_replay_what_they_would_compute(tmp_path: Path) -> None:
    """Under DeepSpeed's stage 0 gradients are reduced after the replay: results, weights and moments to the bit."""
    configure(tmp_path)
    two_ranks.run("tests.engine.replayed_ranks", tmp_path, tmp_path / "found.json")
    first, second = json.loads((tmp_path / "found.json").read_text())
    assert first["differs"] == second["differs"] == []
    assert first["loss"] != second["loss"], "each has batches of its own"


def test_zero_and_graphs_are_refused_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assembly, "refuse_without_gpu", lambda device: None)
    with pytest.raises(BadInput, match="cuda_graphs: ZeRO stage 1 reduces gradients .*deepspeed: zero0"):
        assemble(configure(tmp_path, "cuda_graphs=true", "device=cpu", "deepspeed=zero1"))


@pytest.mark.parametrize(("asked", "device", "stage", "recorded"), [
    ("auto", "cpu", 0, False), ("auto", "cuda", 0, True), ("auto", "cuda", 1, False), (False, "cuda", 0, False),
    (True, "cuda", 0, True),
])  # fmt: skip
def test_steps_are_recorded_wherever_they_can_be(
    tmp_path: Path, asked: object, device: str, stage: int, recorded: bool
) -> None:
    """And where a GPU is left without, the run says what that costs."""
    config, said = configure(tmp_path, f"cuda_graphs={str(asked).lower()}"), list[str]()
    rows = load_tasks(config)[1]
    assert assembly._records_steps(config, rows, torch.device(device), stage, said.append) is recorded
    assert len(said) == (stage > 0)
    assert not said or "deepspeed: zero0" in said[0]


def test_batches_in_pieces_are_not_recorded(tmp_path: Path) -> None:
    said = list[str]()
    config = configure(tmp_path, "data_path=dali")
    assert not assembly._records_steps(config, load_tasks(config)[1], torch.device("cuda"), 0, said.append)
    assert len(said) == 1 and "data_path: plain" in said[0]
    config = configure(tmp_path, "data_path=dali", "cuda_graphs=true")
    with pytest.raises(BadInput, match="data_path: plain"):
        assembly._records_steps(config, load_tasks(config)[1], torch.device("cuda"), 0, said.append)
