"""The golden numbers of the published model: logits, losses, gradients, trajectory, controllers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine import trajectory
from engine.golden import load_tasks, task_batch
from engine.model.config import ModelConfig
from engine.verify import build, main, verify
from pipelines.batch import ChoiceTarget
from tests.padded_model import PaddedModel
from tests.reference import reference


def test_float32_is_within_tolerance() -> None:
    rows = list(verify(reference("golden")))
    assert len(rows) == 16 + len(trajectory.stages())  # 12 tasks, pretraining, sharing, 2 controllers; the trajectory
    assert not [failure for row in rows for failure in row.failures]
    assert all(row.differences for row in rows)


def test_float32_shares_prefixes_exactly() -> None:
    row = next(row for row in verify(reference("golden")) if row.name == "shared pairs")
    assert row.differences["sharing"] <= 2e-6


def test_bfloat16_is_at_most_twice_as_far_off_as_plain_torch() -> None:
    golden = reference("golden")
    meta = json.loads((golden / "meta.json").read_text())
    config, tasks = ModelConfig.from_published(meta["config"]), load_tasks(golden, meta)
    state = load_file(golden / "weights.safetensors")
    ours = build(config, tasks, state, golden).to(torch.bfloat16)
    plain = PaddedModel(state, config, torch.bfloat16)
    for task in tasks:
        batch, expected = task_batch(task), task.expected_logits()
        logits = task.real_logits(ours(batch, task.head), batch)
        peer = plain.logits(task.head, task.tensors, task.number)
        if task.head == "vision_logit":
            peer = peer[task.tensors["image_mask"].bool()]
            if isinstance(batch.target, ChoiceTarget):
                peer = task.real_logits(peer, batch)
        error = (logits.float().reshape(-1) - expected.reshape(-1)).abs().max()
        peer_error = (peer.float().reshape(-1) - expected.reshape(-1)).abs().max()
        assert error <= 2 * peer_error, task.name
        assert error <= 0.05 * expected.abs().max(), task.name


def test_padded_oracle_agrees_with_golden_numbers() -> None:
    golden = reference("golden")
    meta = json.loads((golden / "meta.json").read_text())
    plain = PaddedModel(
        load_file(golden / "weights.safetensors"), ModelConfig.from_published(meta["config"]), torch.float32
    )
    for task in load_tasks(golden, meta):
        if task.head != "vision_logit":
            logits = plain.logits(task.head, task.tensors, task.number)
            torch.testing.assert_close(
                logits.reshape(task.tensors["logits"].shape), task.tensors["logits"], atol=2e-5, rtol=1e-4
            )


def test_a_changed_weight_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "golden"
    shutil.copytree(
        reference("golden"), folder, ignore=shutil.ignore_patterns("trajectory*", "controller*", "bert*", "*.bin")
    )
    state = load_file(folder / "weights.safetensors")
    state["bert.encoder.c_layer.1.v_output.dense.bias"][0] += 1e-2
    save_file(state, folder / "weights.safetensors")
    assert main(["--golden", str(folder)]) == 1
    assert "past the tolerance" in capsys.readouterr().out


def test_a_missing_key_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "golden"
    shutil.copytree(
        reference("golden"), folder, ignore=shutil.ignore_patterns("trajectory*", "controller*", "bert*", "*.bin")
    )
    state = load_file(folder / "weights.safetensors")
    del state["bert.encoder.layer.2.intermediate.dense.bias"]
    save_file(state, folder / "weights.safetensors")
    assert main(["--golden", str(folder)]) == 2
    assert "bert.encoder.layer.2.intermediate.dense.bias" in capsys.readouterr().err


def test_a_folder_without_numbers_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--golden", str(tmp_path)]) == 2
    assert "meta.json" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--golden", str(tmp_path), "--device", "cuda"]) == 2
    assert "--device: cuda asked for, but torch sees no GPU (--device cpu)" in capsys.readouterr().err
