"""The peers are the published recipe: the golden numbers, the published layout, the published update, and our own losses."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from bench.batches import draw, pack, pad
from bench.lengths import load
from bench.peers import authors, stock
from bench.peers.authors import PerTensorAdamW
from bench.peers.losses import PaddedBatch
from bench.peers.model import PaddedInputs, PaddedModel
from engine.golden import GoldenTask, load_tasks
from engine.losses import loss_and_score
from engine.model.config import ModelConfig
from engine.model.published import PUBLISHED_HEADS, export_published
from engine.model.vilbert import ViLBERT
from engine.tasks import load_table
from tests.reference import reference

KINDS = {
    "VL-classifier": "soft_labels", "VL-classifier-GQA": "soft_labels", "VL-logit": "options", "V-logit": "regions",
    "V-logit-mc": "choices", "VL-binary-classifier": "classes", "VL-tri-classifier": "classes",
}  # fmt: skip

SMALL: dict[str, Any] = {
    "vocab_size": 200, "max_position_embeddings": 256, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
    "intermediate_size": 24, "v_feature_size": 12, "v_target_size": 7, "v_hidden_size": 24, "v_num_hidden_layers": 2,
    "v_num_attention_heads": 3, "v_intermediate_size": 24, "bi_hidden_size": 32, "bi_num_attention_heads": 4,
    "v_biattention_id": (0, 1), "t_biattention_id": (1, 2), "initializer_range": 0.1,
}  # fmt: skip


def small(**changes: Any) -> ModelConfig:
    """A model of every part, small, without dropout unless told."""
    dropouts = [
        f"{name}_dropout_prob" for name in ("hidden", "attention_probs", "v_hidden", "v_attention_probs", "head")
    ]
    return ModelConfig(**{**SMALL, **dict.fromkeys(dropouts, 0.0), **changes})


def golden_batch(task: GoldenTask) -> PaddedBatch:
    """A golden file as it is: padded."""
    t = task.tensors
    inputs = PaddedInputs(
        t["input_ids"].long(), t["input_mask"], t["features"], t["locations"], t["image_mask"], task.number
    )
    samples = t["target"].shape[0]
    target = t["target"] if t["target"].dtype == torch.int64 else t["target"].float()
    return PaddedBatch(inputs, samples, task.head, KINDS[task.loss_type], target, t.get("choice_index"))


def test_golden_logits_losses_and_gradients() -> None:
    golden = reference("golden")
    meta = json.loads((golden / "meta.json").read_text())
    state = load_file(golden / "weights.safetensors")
    model = PaddedModel(ModelConfig.from_published(meta["config"])).eval()
    model.load_state_dict(state)
    tasks = load_tasks(golden, meta)
    assert len(tasks) == 12
    for task in tasks:
        batch, expected = golden_batch(task), task.tensors
        model.zero_grad()
        logits = model(batch.inputs)
        ours = logits[task.head]
        if batch.loss == "choices":
            slots = batch.choice_index
            assert slots is not None
            ours = ours[:, 101:].gather(1, slots[..., None])
        torch.testing.assert_close(ours.reshape(expected["logits"].shape), expected["logits"], atol=2e-5, rtol=1e-4)
        loss, score = batch.loss_and_score(logits)
        torch.testing.assert_close(loss.detach(), expected["loss"].reshape(()), atol=2e-5, rtol=1e-4)
        assert 0 <= float(score) <= 1
        loss.backward()
        compare_gradients(model, expected)


def compare_gradients(model: PaddedModel, expected: dict[str, Tensor]) -> None:
    """The norm of every gradient that the file has, and no gradient where it has none."""
    norms = {key.removeprefix("gradnorm/"): value for key, value in expected.items() if key.startswith("gradnorm/")}
    assert norms
    for name, parameter in model.named_parameters():
        if name in norms:
            assert parameter.grad is not None, name
            torch.testing.assert_close(parameter.grad.norm(), norms[name].reshape(()), atol=2e-5, rtol=1e-4, msg=name)
        else:
            assert parameter.grad is None, name


def test_the_full_model_has_the_published_tensors() -> None:
    with torch.device("meta"):
        model = PaddedModel(ModelConfig())
    assert len(model.state_dict()) == 560
    assert len(list(model.parameters())) == 559
    assert sum(parameter.numel() for parameter in model.parameters()) == 268_028_859


def test_every_head_is_evaluated() -> None:
    config = small()
    row = load_table().row("vqa")
    batch = pad(draw(row, load()["vqa"], config, 2, (0, 0)))
    shapes = {name: tuple(value.shape) for name, value in PaddedModel(config)(batch.inputs).items()}
    assert shapes == {
        "vil_prediction": (2, 3129), "vil_prediction_gqa": (2, 1533), "vil_logit": (2, 1), "vil_tri_prediction": (2, 3),
        "vil_binary_prediction": (1, 2), "vision_logit": (2, 101, 1), "linguisic_logit": (2, 24, 1),
        "cls.predictions": (2, 24, 200), "cls.imagePredictions": (2, 101, 7), "cls.bi_seq_relationship": (2, 2),
    }  # fmt: skip


@pytest.mark.parametrize("row", load_table().default_tasks(), ids=lambda row: row.name)
def test_losses_and_scores_are_the_engines(row: Any) -> None:
    """The same weights and samples: packed through the engine, padded through the peer."""
    config = small()
    engine = ViLBERT(config, PUBLISHED_HEADS)
    engine.initialise(3)
    peer = PaddedModel(config)
    peer.load_state_dict(export_published(engine))
    samples = draw(row, load()[row.name], config, 3, (5, 1))
    loss, score = loss_and_score(engine(pack(samples), row.head), pack(samples))
    padded = pad(samples)
    peer_loss, peer_score = padded.loss_and_score(peer(padded.inputs))
    torch.testing.assert_close(loss, peer_loss, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(score.mean(), peer_score, atol=1e-6, rtol=1e-6)


def test_dropout_is_where_it_is_published() -> None:
    """Each rate reaches the logits in training, none in evaluation."""
    row = load_table().row("refcoco")
    for name in ("hidden", "attention_probs", "v_hidden", "v_attention_probs", "head"):
        config = small(**{f"{name}_dropout_prob": 0.5})
        model = PaddedModel(config)
        inputs = pad(draw(row, load()["refcoco"], config, 2, (0, 0))).inputs
        with torch.no_grad():
            trained = [model.train()(inputs)["vision_logit"] for _ in range(2)]
            evaluated = [model.eval()(inputs)["vision_logit"] for _ in range(2)]
        assert not torch.equal(*trained), name
        assert torch.equal(*evaluated), name


def test_the_published_update() -> None:
    """Two steps by hand, in float64: no bias correction, decay after the step, untouched tensors skipped."""
    theta, untouched = (
        torch.nn.Parameter(torch.tensor([0.5, -2.0], dtype=torch.float64)),
        torch.nn.Parameter(torch.ones(1)),
    )
    lr, decay, eps = 0.1, 0.01, 1e-6
    optimizer = PerTensorAdamW([{"params": [p], "lr": lr, "weight_decay": decay} for p in (theta, untouched)])
    expected, m, v = theta.detach().clone(), torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for gradient in (torch.tensor([0.3, -0.7], dtype=torch.float64), torch.tensor([-0.1, 0.2], dtype=torch.float64)):
        theta.grad = gradient.clone()
        optimizer.step()
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        expected = expected - lr * m / (v.sqrt() + eps)
        expected = expected - lr * decay * expected
        torch.testing.assert_close(theta.detach(), expected, atol=1e-14, rtol=1e-12)
    assert untouched.item() == 1


def test_parameter_groups() -> None:
    model = PaddedModel(small())
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {names[id(group["params"][0])]: group for group in authors._optimizer(model, 1e-5, 1e-4).param_groups}
    assert len(groups) == len(names), "one group per tensor"
    assert groups["bert.encoder.layer.0.output.LayerNorm.weight"]["weight_decay"] == 0
    assert groups["bert.encoder.c_layer.0.biOutput.LayerNorm1.weight"]["weight_decay"] == 0.01, (
        "by substring, as published"
    )
    assert (groups["vil_logit.weight"]["lr"], groups["vision_logit.weight"]["lr"]) == (1e-4, 1e-5)
    grouped = [id(p) for group in stock.optimizer(model, 1e-5, 1e-4).param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(names)
