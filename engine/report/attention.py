"""Where words look: the attention of the text over the regions in the last bridge, in plain torch.

The kernels keep no probabilities. For the few pairs that a report shows they are computed again, from the bridge's inputs and
its own projections.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.model.bridge import Bridge
from engine.model.randomness import Randomness
from engine.model.trunk import Need
from engine.trained import Trained
from pipelines.batch import Batch


@dataclass(frozen=True)
class Looks:
    """The last bridge of one pair: T text rows, R region rows, D text width, V image width, N heads."""

    weights: Tensor
    """float32 [N, T, R]: softmax over the regions, row 0 being the whole image."""
    text: Tensor
    """[T, D]: what the bridge was given."""
    image: Tensor
    """[R, V], likewise."""
    output: Tensor
    """[T, D]: what it made of the text."""


@torch.inference_mode()
def last_bridge(trained: Trained, batch: Batch) -> Looks:
    """Text-to-region attention of a batch of one (text, image) pair, paper section 3.1."""
    if batch.n_pairs != 1:
        raise ValueError(f"{batch.n_pairs} pairs; one at a time")
    trunk = trained.model.trunk
    bridge = trunk.bridges[-1]
    assert isinstance(bridge, Bridge)
    seen: list[tuple[Tensor, ...]] = []

    def keep(module: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor]) -> None:
        seen.append((inputs[0], inputs[1], outputs[0]))

    hook = bridge.register_forward_hook(keep)
    try:
        trunk(batch.to(trained.device).with_features(), Need.ALL, Randomness(), trained.config.share_prefixes)
    finally:
        hook.remove()
    text, image, output = (x.float().cpu() for x in seen[0])
    return Looks(text_to_regions(bridge, text, image), text, image, output)


def text_to_regions(bridge: Bridge, text: Tensor, image: Tensor) -> Tensor:
    """float32 [N, T, R]: softmax(q_text k_imageᵀ / √(width of a head)) of one pair (spec section 1.4)."""
    w = {name: field.detach().float().cpu() for name, field in bridge.fields().items()}
    query = F.linear(text, w["text_qkv"], w["text_qkv_bias"]).split(bridge.inner, 1)[0]
    key = F.linear(image, w["image_qkv"], w["image_qkv_bias"]).split(bridge.inner, 1)[1]
    query, key = (x.view(len(x), bridge.heads, -1).transpose(0, 1) for x in (query, key))
    return (query @ key.transpose(1, 2) / query.shape[-1] ** 0.5).softmax(-1)
