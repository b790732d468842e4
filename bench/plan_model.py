"""The model whose steps are counted, on the device `meta`."""

from __future__ import annotations

from dataclasses import replace

import torch

from bench.plan_count import META, Counted, counting
from engine.model.config import ModelConfig
from engine.model.heads import HeadSpec
from engine.model.randomness import Randomness
from engine.model.vilbert import ViLBERT
from engine.step import forward_backward
from pipelines.batch import Batch


class Model:
    """The model that is counted on; its gradients' memory is there before the first count, as in training."""

    def __init__(self, config: ModelConfig, heads: dict[str, HeadSpec], precision: torch.dtype, isa: str = "") -> None:
        """`isa`: products are the native library's on a CPU with `amx`, torch's elsewhere."""
        with META:
            self.model = ViLBERT(config, heads).to(precision)
        self._native_products = has_native_products(isa, precision)
        self._warm: set[str] = set()

    def count(self, batch: Batch, head: str, share: bool = True) -> Counted:
        """The step of one batch, whose tensors lie anywhere."""
        meta = replace(batch.to(META), slab=None)
        if head not in self._warm:
            self._warm.add(head)
            self._run(meta, head, share)
        counted, trunk = self._run(meta, head, share), self.model.trunk
        counted.batch_bytes = sum(x.numel() * x.element_size() for x in meta.tensors())
        counted.images = meta.n_images
        counted.rows = meta.pair_text_rows + meta.pair_image_rows
        counted.gradients = values(trunk) + values(self.model.heads[head])
        return counted

    def _run(self, batch: Batch, head: str, share: bool) -> Counted:
        with counting(self._native_products) as counted:
            forward_backward(self.model, head, 1.0, share, batch, Randomness(0, 1, training=True))
        for block in self.model.blocks():
            block.drop_gradients()
        return counted


def has_native_products(isa: str, precision: torch.dtype) -> bool:
    """Whether projections are the native library's, as `kernels.projection` decides it on a CPU with these instructions."""
    return isa == "amx" and precision is torch.bfloat16


def values(module: torch.nn.Module) -> int:
    """Parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())
