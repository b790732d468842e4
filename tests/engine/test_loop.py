"""The loop on small data: what a step changes, what a stop keeps, what a guard refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from engine.assembly import Parts, assemble
from engine.checkpoint import load, newest_valid
from engine.cursor import Cursor
from engine.loop import Listener, Loop, TooManySkipped
from engine.losses import loss_and_score
from engine.model.randomness import Randomness
from engine.step import train_step
from engine.stopgo import Decision
from pipelines.loader import TrainingSource
from pipelines.sampler import Sampler
from tests.engine.small_run import configure


def weights(parts: Parts) -> dict[str, torch.Tensor]:
    state = {name: value.detach().clone() for name, value in parts.model.named_parameters()}
    return state | {
        f"optimizer/{key}": value.clone()
        for key, value in parts.optimizer.state_dict().items()
        if not key.endswith("/steps")
    }


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def run(parts: Parts, folder: Path, cursor: Cursor | None = None, stop_after: int | None = None) -> tuple[bool, Cursor]:
    """Train; with `stop_after`, ask for a stop once so many task steps are done."""
    cursor = cursor or Cursor()
    asked = [0]

    def stop_asked() -> bool:
        asked[0] += 1
        return stop_after is not None and asked[0] > stop_after

    return Loop(parts, cursor, folder, Listener(), stop_asked).run(), cursor


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_step_changes_the_trunk_and_the_head_that_ran_only(tmp_path: Path, precision: str) -> None:
    parts = assemble(configure(tmp_path, f"precision={precision}"))
    for name, task in parts.tasks.items():
        before = weights(parts)
        train_step(
            parts.model, parts.optimizer, task.train(0), task.row.head, loss_scale=task.loss_scale, lr_multiplier=1.0,
            random=Randomness(0, 1, True),
        )  # fmt: skip
        after = weights(parts)
        moved = {key for key in after if not torch.equal(before[key], after[key])}
        others = [head for head in parts.model.heads if head != task.row.head]
        assert any(task.row.head in key for key in moved), name
        assert any("trunk" in key for key in moved), name
        assert not [key for key in moved for head in others if head in key], name


def test_masters_start_from_what_bfloat16_rounded(tmp_path: Path) -> None:
    exact, rounded = (assemble(configure(tmp_path, f"precision={name}")) for name in ("float32", "bfloat16"))
    masters = rounded.optimizer.masters()
    for unit, module in (("trunk", exact.model.trunk), ("pair_head", exact.model.heads["pair_head"])):
        for name, parameter in module.named_parameters():
            assert torch.equal(masters[f"{unit}/{name}"], parameter)


def test_zero_filled_update_moves_heads_that_have_run(tmp_path: Path) -> None:
    parts = assemble(configure(tmp_path, "optimizer.update=zero_filled"))
    for name in ("answers", "captions"):
        task, before = parts.tasks[name], weights(parts)
        train_step(
            parts.model,
            parts.optimizer,
            task.train(0),
            task.row.head,
            loss_scale=1.0,
            lr_multiplier=1.0,
            random=Randomness(),
        )
    after = weights(parts)
    assert not torch.equal(before["heads.answer_head.matrices"], after["heads.answer_head.matrices"])
    assert torch.equal(before["heads.pair_head.matrices"], after["heads.pair_head.matrices"])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("stop_after", [1, 7, 23])
def test_stop_and_resume_is_bit_exact(tmp_path: Path, precision: str, stop_after: int) -> None:
    config = configure(tmp_path, f"precision={precision}")
    whole = assemble(config)
    done, straight = run(whole, tmp_path / "straight")
    assert done

    parts = assemble(config)
    done, _ = run(parts, tmp_path / "stopped", stop_after=stop_after)
    assert not done
    parts = assemble(config)
    cursor = load(newest_valid(tmp_path / "stopped")[0], parts.model, parts.stepper)
    done, resumed = run(parts, tmp_path / "stopped", cursor)
    assert done
    assert same(weights(whole), weights(parts))
    assert straight.to_json() == resumed.to_json()


def test_runs_with_one_seed_are_equal_and_with_another_are_not(tmp_path: Path) -> None:
    first, second = (assemble(configure(tmp_path)) for _ in range(2))
    other = assemble(configure(tmp_path, "seed=1"))
    for number, parts in enumerate((first, second, other)):
        run(parts, tmp_path / str(number))
    assert same(weights(first), weights(second))
    assert not same(weights(first), weights(other))


@pytest.mark.parametrize("name", ["answers", "captions", "phrases", "pointing", "pairs"])
def test_sharing_prefixes_changes_nothing_even_with_dropout(tmp_path: Path, name: str) -> None:
    parts = assemble(configure(tmp_path))
    task = parts.tasks[name]
    batch = task.train(0)
    random = Randomness(3, 5, True)
    shared, unshared = (parts.model(batch, task.row.head, random, share) for share in (True, False))
    torch.testing.assert_close(shared, unshared, atol=2e-6, rtol=0)
    dropped, kept = parts.model(batch, task.row.head, random), parts.model(batch, task.row.head)
    assert not torch.allclose(dropped, kept)


def test_packing_does_not_change_an_example(tmp_path: Path) -> None:
    """Dropout masks and all: an example's logits are the same alone and in a batch."""
    parts = assemble(configure(tmp_path))
    task = parts.tasks["answers"]
    alone = TrainingSource(task.train.data, _Fixed([3]), task.token)
    together = TrainingSource(task.train.data, _Fixed([5, 3, 9]), task.token)
    random = Randomness(0, 9, True)
    first = parts.model(alone(0), task.row.head, random)
    second = parts.model(together(0), task.row.head, random)
    torch.testing.assert_close(first[0], second[1], atol=2e-6, rtol=0)


class _Fixed(Sampler):
    """A sampler of given indices."""

    def __init__(self, indices: list[int]) -> None:
        super().__init__(len(indices), len(indices), seed=0, number=0)
        self._indices = np.array(indices)

    def indices(self, step: int) -> NDArray[np.int64]:
        return self._indices


def test_a_step_that_is_not_finite_changes_nothing(tmp_path: Path) -> None:
    parts = assemble(configure(tmp_path))
    task = parts.tasks["captions"]
    batch = task.train(0)
    batch.features[0, 0] = float("nan")
    before = weights(parts)
    result = train_step(
        parts.model, parts.optimizer, batch, task.row.head, loss_scale=1.0, lr_multiplier=1.0, random=Randomness()
    )
    assert result.skipped == 1
    assert same(before, weights(parts))
    good = train_step(
        parts.model,
        parts.optimizer,
        task.train(0),
        task.row.head,
        loss_scale=1.0,
        lr_multiplier=1.0,
        random=Randomness(),
    )
    assert good.skipped == 0 and not same(before, weights(parts))


def test_many_steps_that_are_not_finite_end_the_run_and_name_the_task(tmp_path: Path) -> None:
    parts = assemble(configure(tmp_path, "guard.max_skipped=4"))
    with torch.no_grad():
        parts.model.trunk.text_embedding.vectors.fill_(float("nan"))
    with pytest.raises(TooManySkipped, match="4 steps of task answers in a row"):
        run(parts, tmp_path / "run")


def test_one_bad_task_among_good_ones_ends_the_run_and_is_named(tmp_path: Path) -> None:
    parts = assemble(configure(tmp_path, "guard.max_skipped=4"))
    parts.model.get_parameter("heads.pair_head.vectors").data.fill_(float("nan"))
    with pytest.raises(TooManySkipped, match="4 steps of task pairs in a row"):
        run(parts, tmp_path / "run")
    kept = load(newest_valid(tmp_path / "run")[0], parts.model, parts.stepper)
    assert kept.consumed["answers"] == 6 and kept.skipped_in_row == {
        "answers": 0,
        "captions": 0,
        "phrases": 0,
        "pointing": 0,
        "pairs": 4,
    }


def test_a_step_is_the_same_to_the_bit_on_two_threads(tmp_path: Path) -> None:
    """Sums of gathered rows must not depend on which thread comes first: sizes past torch's threshold for sharing."""
    config = configure(tmp_path, "model.hidden_size=96", "model.v_hidden_size=96", "model.bi_hidden_size=96",
                       "task_overrides.captions.batch=64", "task_overrides.answers.batch=64")  # fmt: skip
    parts = assemble(config)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for name in ("answers", "captions"):
            task = parts.tasks[name]
            batch = task.train(0)
            gradients = []
            for _ in range(6):
                parts.model.zero_grad()
                loss, _ = loss_and_score(parts.model(batch, task.row.head, Randomness(0, 1, True)), batch)
                loss.backward()
                gradients.append({key: value.clone() for key, value in parts.model.published("grad")})
            assert all(same(gradients[0], other) for other in gradients[1:]), name
    finally:
        torch.set_num_threads(threads)


def test_stopped_tasks_run_on_multiples_of_the_gap_only(tmp_path: Path) -> None:
    parts = assemble(configure(tmp_path, "stopgo.gap=4", "validation.on_last=false"))
    loop = Loop(parts, Cursor(), tmp_path / "run", Listener())
    loop.controllers["pairs"].decision = Decision.STOP
    for task in parts.tasks.values():
        assert task.epoch_iterations == 5
    loop.config = parts.config.model_copy(update={"max_iterations": 4})
    loop.run()
    assert loop.cursor.consumed == {"answers": 4, "captions": 4, "phrases": 4, "pointing": 4, "pairs": 1}


def test_float32_update_follows_the_published_rule(tmp_path: Path) -> None:
    """Three steps against the rule written out in float64 (spec section 4.4)."""
    parts = assemble(configure(tmp_path))
    task = parts.tasks["answers"]
    names = [name for name, _ in parts.model.named_parameters() if "trunk" in name or "answer_head" in name]
    reference = {name: dict(parts.model.named_parameters())[name].detach().double().clone() for name in names}
    moments = {name: (torch.zeros_like(value), torch.zeros_like(value)) for name, value in reference.items()}
    for step in range(3):
        batch = task.train(step)
        loss, _ = loss_and_score(parts.model(batch, task.row.head), batch)
        parts.model.zero_grad()
        loss.backward()
        for name, parameter in parts.model.named_parameters():
            if name in reference:
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                m, v = moments[name]
                m.mul_(0.9).add_(gradient.double(), alpha=0.1)
                v.mul_(0.999).addcmul_(gradient.double(), gradient.double(), value=0.001)
                lr, decay = 1e-3, 0.01 if name.endswith("matrices") else 0.0
                reference[name] -= lr * m / (v.sqrt() + 1e-6)
                reference[name] -= lr * decay * reference[name]
        parts.model.zero_grad()
        train_step(
            parts.model, parts.optimizer, batch, task.row.head, loss_scale=1.0, lr_multiplier=1.0, random=Randomness()
        )
    after = dict(parts.model.named_parameters())
    for name in names:
        torch.testing.assert_close(after[name].double(), reference[name], atol=2e-6, rtol=1e-5)
