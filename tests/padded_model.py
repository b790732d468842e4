"""The published model as plain padded torch, written from the specification (spec sections 1.2 to 1.6): an oracle.

Works on the padded tensors of a golden folder, in any dtype, every op a stock torch op.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.model.config import ModelConfig

EPS = 1e-12


class PaddedModel:
    """`logits(head, …)` of padded inputs, from a published state dict."""

    def __init__(self, state: dict[str, Tensor], config: ModelConfig, dtype: torch.dtype) -> None:
        self.w = {key: value.to(dtype) for key, value in state.items()}
        self.config, self.dtype = config, dtype

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.w[f"{name}.weight"], self.w[f"{name}.bias"])

    def norm(self, x: Tensor, name: str) -> Tensor:
        weight = self.w[f"{name}.weight"]
        return F.layer_norm(x, weight.shape, weight, self.w[f"{name}.bias"], EPS)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, heads: int) -> Tensor:
        def split(x: Tensor) -> Tensor:
            return x.view(*x.shape[:2], heads, -1).transpose(1, 2)

        scores = split(q) @ split(k).transpose(-1, -2) / (q.shape[-1] // heads) ** 0.5 + bias
        return (scores.softmax(-1) @ split(v)).transpose(1, 2).reshape(q.shape)

    def layer(self, x: Tensor, bias: Tensor, name: str, heads: int) -> Tensor:
        q, k, v = (self.linear(x, f"{name}.attention.self.{part}") for part in ("query", "key", "value"))
        context = self.attend(q, k, v, bias, heads)
        x = self.norm(self.linear(context, f"{name}.attention.output.dense") + x, f"{name}.attention.output.LayerNorm")
        inner = F.gelu(self.linear(x, f"{name}.intermediate.dense"))
        return self.norm(self.linear(inner, f"{name}.output.dense") + x, f"{name}.output.LayerNorm")

    def bridge(self, v: Tensor, t: Tensor, v_bias: Tensor, t_bias: Tensor, name: str) -> tuple[Tensor, Tensor]:
        heads = self.config.bi_num_attention_heads
        q1, k1, v1 = (self.linear(v, f"{name}.biattention.{part}1") for part in ("query", "key", "value"))
        q2, k2, v2 = (self.linear(t, f"{name}.biattention.{part}2") for part in ("query", "key", "value"))
        to_text, to_image = self.attend(q2, k1, v1, v_bias, heads), self.attend(q1, k2, v2, t_bias, heads)
        v = self.norm(self.linear(to_image, f"{name}.biOutput.dense1") + v, f"{name}.biOutput.LayerNorm1")
        t = self.norm(self.linear(to_text, f"{name}.biOutput.dense2") + t, f"{name}.biOutput.LayerNorm2")
        for side in ("v", "t"):
            x = v if side == "v" else t
            inner = F.gelu(self.linear(x, f"{name}.{side}_intermediate.dense"))
            x = self.norm(self.linear(inner, f"{name}.{side}_output.dense") + x, f"{name}.{side}_output.LayerNorm")
            v, t = (x, t) if side == "v" else (v, x)
        return v, t

    def streams(
        self, ids: Tensor, mask: Tensor, features: Tensor, locations: Tensor, image_mask: Tensor, token: int | None
    ) -> tuple[Tensor, Tensor]:
        c, w, e = self.config, self.w, "bert.embeddings"
        position = w[f"{e}.position_embeddings.weight"][: ids.shape[1]]
        t = w[f"{e}.word_embeddings.weight"][ids] + position + w[f"{e}.token_type_embeddings.weight"][0]
        if token is not None:
            row = w[f"{e}.task_embeddings.weight"][token].expand(len(ids), 1, -1)
            t = torch.cat((t[:, :1], row, t[:, 1:]), 1)
            mask = torch.cat((torch.ones_like(mask[:, :1]), mask), 1)
        t = self.norm(t, f"{e}.LayerNorm")
        v = self.linear(features.to(self.dtype), "bert.v_embeddings.image_embeddings")
        v = v + self.linear(locations.to(self.dtype), "bert.v_embeddings.image_location_embeddings")
        v = self.norm(v, "bert.v_embeddings.LayerNorm")
        t_bias, v_bias = (((1 - m.to(self.dtype)) * -10000.0)[:, None, None, :] for m in (mask, image_mask))
        t_stops = (0, *c.t_biattention_id, c.num_hidden_layers)
        v_stops = (0, *c.v_biattention_id, c.v_num_hidden_layers)
        for k in range(c.n_bridges + 1):
            for i in range(t_stops[k], t_stops[k + 1]):
                t = self.layer(t, t_bias, f"bert.encoder.layer.{i}", c.num_attention_heads)
            for j in range(v_stops[k], v_stops[k + 1]):
                v = self.layer(v, v_bias, f"bert.encoder.v_layer.{j}", c.v_num_attention_heads)
            if k < c.n_bridges:
                v, t = self.bridge(v, t, v_bias, t_bias, f"bert.encoder.c_layer.{k}")
        return t, v

    def logits(self, head: str, inputs: dict[str, Tensor], token: int | None) -> Tensor:
        """Pooled heads: [rows, outputs] (two rows an output for the paired head); region head: [rows, R]."""
        names = ("input_ids", "input_mask", "features", "locations", "image_mask")
        ids, mask, features, locations, image_mask = (inputs[name] for name in names)
        t, v = self.streams(ids, mask, features, locations, image_mask, token)
        if head == "vision_logit":
            return self.linear(v, head)[..., 0]
        pooled = torch.relu(self.linear(t[:, 0], "bert.t_pooler.dense")) * torch.relu(
            self.linear(v[:, 0], "bert.v_pooler.dense")
        )
        if f"{head}.weight" in self.w:
            return self.linear(pooled, head)
        pooled = pooled.reshape(-1, self.w[f"{head}.logit_fc.0.weight"].shape[1])
        inner = self.norm(F.gelu(self.linear(pooled, f"{head}.logit_fc.0")), f"{head}.logit_fc.2")
        return self.linear(inner, f"{head}.logit_fc.3")
