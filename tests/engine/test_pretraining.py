"""Pretraining as a task like the others: trained, validated, stopped, resumed, and begun from (paper section 3.1)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine import checkpoint
from engine.assembly import Parts, assemble
from engine.config import RunConfig, load
from engine.cursor import Cursor
from engine.journal import read_rows
from engine.losses import outcome
from engine.model.randomness import Randomness
from engine.tasks import CONFIGS, LOSS_PARTS
from engine.train import main
from pipelines.batch import MaskedTarget
from pipelines.errors import BadInput
from tests.engine.test_loop import run, same, weights
from tests.pipelines import small_world

WORLD = [f"world.seed={small_world.SEED}", "world.size=small"]
SMALL = ["task_overrides.conceptual_captions.batch=16", "max_iterations=6", "logging.console=quiet", "logging.every=2"]


def overrides(*more: str) -> list[str]:
    return [f"world.path={small_world.world()}", *WORLD, *SMALL, *more]


def configure(*more: str) -> RunConfig:
    return load(CONFIGS / "runs" / "world_pretrain.yaml", overrides(*more))


def test_a_run_writes_the_three_losses(tmp_path: Path) -> None:
    config = str(CONFIGS / "runs" / "world_pretrain.yaml")
    assert main(["--config", config, *overrides(f"output={tmp_path / 'run'}")]) == 0
    metrics = read_rows(tmp_path / "run" / "metrics.jsonl")
    events = read_rows(tmp_path / "run" / "events.jsonl")
    validations = [row for row in events if row["event"] == "validation"]
    assert len(metrics) == 3 and validations
    for row in [*metrics, *validations]:
        assert tuple(row["loss_parts"]) == LOSS_PARTS["masked"]
        assert row["loss"] == pytest.approx(sum(row["loss_parts"].values()), rel=1e-5)
        assert 0 <= row["score"] <= 1
    assert validations[0]["loss_parts"]["alignment"] == pytest.approx(0.693, abs=0.2)


def test_a_stopped_run_goes_on_to_the_bit(tmp_path: Path) -> None:
    whole = assemble(configure())
    assert run(whole, tmp_path / "whole")[0]
    first = assemble(configure())
    assert not run(first, tmp_path / "parts", stop_after=3)[0]
    second = assemble(configure())
    path, _ = checkpoint.newest_valid(tmp_path / "parts")
    cursor = checkpoint.load(path, second.model, second.stepper)
    assert cursor.iteration < 6 and cursor.windows
    assert run(second, tmp_path / "parts", cursor)[0]
    assert same(weights(whole), weights(second))


def test_the_tasks_begin_from_it(tmp_path: Path) -> None:
    parts = assemble(configure())
    run(parts, tmp_path / "run" / "checkpoints")
    more = [f"world.path={small_world.world()}", *WORLD, f"initial_weights={tmp_path / 'run'}", "max_iterations=1"]
    tasks = assemble(load(CONFIGS / "runs" / "world_from_pretraining.yaml", more))
    trained, fresh = dict(parts.model.published()), dict(tasks.model.published())
    started = [key for key in fresh if key.startswith("bert.") and "task_embeddings" not in key]
    assert len(started) > 50 and all(torch.equal(fresh[key], trained[key]) for key in started)
    assert {key.split(".")[0] for key in tasks.model.carried} >= {"cls"}, "kept for export, not trained"
    assert set(fresh) - set(trained) and not set(fresh) - set(trained) - {k for k in fresh if k.startswith("v")}


def losses(parts: Parts) -> tuple[list[float], MaskedTarget]:
    batch = parts.tasks["conceptual_captions"].train(0)
    found = outcome(parts.model, batch, "cls", Randomness())
    found.loss.backward()
    assert isinstance(batch.target, MaskedTarget)
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in parts.model.parameters())
    return [float(part.detach()) for part in found.parts], batch.target


def test_nothing_hidden_costs_nothing() -> None:
    (words, regions, alignment), target = losses(assemble(configure("masking.words=0", "masking.regions=0")))
    assert (words, regions) == (0, 0) and alignment > 0 and not len(target.word_rows) and not len(target.region_rows)


def test_captions_of_other_images_are_asked_for_alignment_alone() -> None:
    (words, regions, alignment), target = losses(assemble(configure("masking.unmatched=1")))
    assert (words, regions) == (0, 0) and alignment > 0 and bool(target.unmatched.all())


def test_texts_carry_no_task_token() -> None:
    parts = assemble(configure())
    assert parts.tasks["conceptual_captions"].token is None


def test_what_cannot_be_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.assembly.refuse_without_gpu", lambda device: None)
    with pytest.raises(BadInput, match="cuda_graphs: conceptual_captions: what pretraining hides"):
        assemble(configure("cuda_graphs=true"))
    with pytest.raises(BadInput, match=r"48 detector classes, the model has 7 \(set model.v_target_size\)"):
        assemble(configure("model.v_target_size=7"))


def test_bias_correction_divides_the_moments_by_what_they_lack() -> None:
    """Against the formula in float64: m / (1 - b1^t) over sqrt(v / (1 - b2^t)) + eps, decay after the step."""
    parts = assemble(configure())
    unit = parts.optimizer.units["trunk"]
    s, lr = unit.settings, 0.5 * unit.lr
    assert s.bias_correction and s.betas == (0.9, 0.98)
    parameter = unit.parameters[0]
    value = parameter.detach().double().clone()
    m, v = torch.zeros_like(value), torch.zeros_like(value)
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 4):
        gradient = torch.randn(parameter.shape, generator=generator)
        parameter.grad = gradient.clone()
        parts.optimizer.step("cls", 0.5, torch.tensor(1.0))
        m = s.betas[0] * m + (1 - s.betas[0]) * gradient.double()
        v = s.betas[1] * v + (1 - s.betas[1]) * gradient.double() ** 2
        update = (m / (1 - s.betas[0] ** step)) / ((v / (1 - s.betas[1] ** step)).sqrt() + s.eps)
        value = value - lr * update
        value = value - lr * s.weight_decay * unit.decays[0] * value
        torch.testing.assert_close(parameter.detach().double(), value, rtol=1e-6, atol=1e-4 * lr)


def test_the_count_of_steps_is_kept(tmp_path: Path) -> None:
    first = assemble(configure())
    run(first, tmp_path / "run")
    second = assemble(configure())
    path, _ = checkpoint.newest_valid(tmp_path / "run")
    assert isinstance(checkpoint.load(path, second.model, second.stepper), Cursor)
    assert int(second.optimizer.units["trunk"].steps) == int(first.optimizer.units["trunk"].steps) == 6
