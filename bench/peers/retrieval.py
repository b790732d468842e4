"""Retrieval as it is done by pairs: what `engine.evaluation.pairs` is held to.

Both score one caption against some images a call, padded, by the same published model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bench.peers.model import PaddedInputs, PaddedModel


class PairwiseLoop:
    """The plain loop: every pair by itself, padded to the task's lengths, one head. In any dtype."""

    def __init__(self, model: PaddedModel) -> None:
        self.model = model

    @torch.inference_mode()
    def scores(self, text: PaddedInputs, images: PaddedInputs) -> Tensor:
        """float32 [images]. `text`: of one row; `images`: of many, without a text."""
        n, model = len(images.features), self.model
        ids, mask = (x.expand(n, -1) for x in (text.input_ids, text.input_mask))
        states, regions, _ = model.bert(images._replace(input_ids=ids, input_mask=mask, task_token=text.task_token))
        t, v = model.bert.t_pooler(states), model.bert.v_pooler(regions)
        pooled = t * v if model.config.fusion_method == "mul" else t + v
        logits: Tensor = model.vil_logit(pooled)
        return logits[:, 0].float()


class AuthorsLoop:
    """The authors' evaluation (spec section 6): float32, all heads, the text's layers before the first bridge once a call
    (`fast_mode`). They give it 500 images a call."""

    def __init__(self, model: PaddedModel) -> None:
        self.model = model

    @torch.inference_mode()
    def scores(self, text: PaddedInputs, images: PaddedInputs) -> Tensor:
        """As `PairwiseLoop.scores`."""
        inputs = images._replace(input_ids=text.input_ids, input_mask=text.input_mask, task_token=text.task_token)
        return self.model(inputs)["vil_logit"][:, 0]
