"""Other schedules of layers and bridges than the published one, against the plain padded model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from engine.golden import pack_padded
from engine.model.config import ModelConfig
from engine.model.published import PUBLISHED_HEADS, export_published
from engine.model.vilbert import ViLBERT
from pipelines.batch import RegionTarget
from tests.padded_model import PaddedModel

SMALL: dict[str, Any] = {
    "vocab_size": 50, "max_position_embeddings": 12, "hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 40,
    "v_feature_size": 10, "v_target_size": 7, "v_hidden_size": 16, "v_num_attention_heads": 2, "v_intermediate_size": 20,
    "bi_hidden_size": 32, "bi_num_attention_heads": 4, "initializer_range": 0.2,
}  # fmt: skip

SCHEDULES = {
    "as published": {"num_hidden_layers": 4, "v_num_hidden_layers": 2, "t": (2, 3), "v": (0, 1)},
    "image layers first": {"num_hidden_layers": 3, "v_num_hidden_layers": 4, "t": (1, 2), "v": (2, 3)},
    "nothing after the last bridge": {"num_hidden_layers": 2, "v_num_hidden_layers": 1, "t": (1, 2), "v": (0, 1)},
    "several layers after it": {"num_hidden_layers": 5, "v_num_hidden_layers": 3, "t": (0, 2), "v": (0, 0)},
    "one bridge": {"num_hidden_layers": 2, "v_num_hidden_layers": 2, "t": (1,), "v": (1,)},
}


def config_of(schedule: dict[str, Any]) -> ModelConfig:
    layers = {key: value for key, value in schedule.items() if key not in "tv"}
    return ModelConfig(**SMALL, **layers, t_biattention_id=schedule["t"], v_biattention_id=schedule["v"])


def inputs(pairs: int = 4) -> dict[str, Tensor]:
    """Padded inputs with junk-free zeros in padded rows, as the authors' loaders leave them."""
    random = torch.Generator().manual_seed(1)
    text_mask = torch.arange(9)[None] < torch.tensor([9, 3, 5, 2])[:pairs, None]
    image_mask = torch.arange(6)[None] < torch.tensor([2, 6, 1, 4])[:pairs, None]
    return {
        "input_ids": torch.randint(5, 50, (pairs, 9), generator=random) * text_mask,
        "input_mask": text_mask.long(),
        "features": torch.rand(pairs, 6, 10, generator=random) * image_mask[..., None],
        "locations": torch.rand(pairs, 6, 5, generator=random) * image_mask[..., None],
        "image_mask": image_mask.long(),
    }


@pytest.mark.parametrize("token", [None, 7])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_every_head_agrees_with_the_padded_model(schedule: dict[str, Any], token: int | None) -> None:
    model = ViLBERT(config_of(schedule), PUBLISHED_HEADS)
    model.initialise(3)
    with torch.no_grad():
        for block in model.blocks():
            block.vectors.add_(0.1 * torch.randn(block.vectors.shape, generator=torch.Generator().manual_seed(4)))
    plain = PaddedModel(export_published(model), model.config, torch.float32)
    t = inputs()
    regions = t["image_mask"].sum(1)
    target = RegionTarget(torch.cat((torch.zeros(1), regions.cumsum(0))).int(), torch.zeros(int(regions.sum())))
    batch = pack_padded("any", t["input_ids"], t["input_mask"], t, token, target, 4)
    for head in PUBLISHED_HEADS:
        expected = plain.logits(head, t, token)
        expected = expected[t["image_mask"].bool()] if head == "vision_logit" else expected
        torch.testing.assert_close(model(batch, head), expected, atol=2e-5, rtol=1e-4)
