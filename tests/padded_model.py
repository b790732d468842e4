"""The published model as plain padded torch, from a published state dict in any dtype: the oracle of the engine's tests.

It is the peers' model (`bench.peers.model`), written from the specification apart from the engine's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bench.peers import model as peers
from engine.model.config import ModelConfig


class PaddedModel:
    """`logits(head, …)` of padded inputs, such as a golden folder holds, without dropout."""

    def __init__(self, state: dict[str, Tensor], config: ModelConfig, dtype: torch.dtype) -> None:
        answers, gqa_answers = (
            len(state[f"{head}.logit_fc.3.bias"]) for head in ("vil_prediction", "vil_prediction_gqa")
        )
        self.model = peers.PaddedModel(config, answers, gqa_answers).eval()
        self.model.load_state_dict(state)
        self.model.to(dtype)
        self.dtype = dtype

    @torch.no_grad()
    def logits(self, head: str, inputs: dict[str, Tensor], token: int | None) -> Tensor:
        """Pooled heads: [rows, outputs] (two rows an output for the paired head); region head: [rows, R]."""
        logits = self.model(
            peers.PaddedInputs(
                inputs["input_ids"].long(), inputs["input_mask"], inputs["features"].to(self.dtype),
                inputs["locations"].to(self.dtype), inputs["image_mask"], token,
            )
        )[head]  # fmt: skip
        return logits[..., 0] if head == "vision_logit" else logits
