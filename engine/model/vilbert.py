"""`ViLBERT`: the trunk, the heads that a run needs, and nothing of the published checkpoint lost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from engine.model.config import ModelConfig
from engine.model.flat import FlatBlock
from engine.model.heads import KINDS, Head, HeadSpec, PretrainingHeads
from engine.model.randomness import Randomness
from engine.model.trunk import Trunk
from engine.ranges import span
from pipelines.batch import Batch

_EVALUATION = Randomness()


PRETRAINING = "cls"
"""Name of the pretraining heads, their prefix in the published layout."""


class ViLBERT(nn.Module):
    """One trunk, many heads (paper Figure 2 left). `heads` maps a head's published prefix to its spec."""

    def __init__(self, config: ModelConfig, heads: Mapping[str, HeadSpec], pretraining: bool = False) -> None:
        super().__init__()
        self.config = config
        self.trunk = Trunk(config)
        self.heads = nn.ModuleDict({name: KINDS[spec.kind](name, config, spec.outputs) for name, spec in heads.items()})
        for name, module in self.heads.items():
            assert isinstance(module, Head)
            module.title = name
        self.head_specs = dict(heads)
        self.pretraining = PretrainingHeads(config) if pretraining else None
        self.carried: dict[str, Tensor] = {}
        """Published tensors that this run does not train (never-used projections, other heads), kept for export."""

    def forward(self, batch: Batch, head: str, random: Randomness = _EVALUATION, share: bool = True) -> Tensor:
        """Logits of one head for one batch; only what that head needs is computed. Shapes: see the head's kind."""
        module = self.heads[head]
        assert isinstance(module, Head)
        streams = self.trunk(batch, module.need, random, share)
        with span(module.title):
            return module(self.trunk, streams, random)

    def blocks(self) -> Iterator[FlatBlock]:
        """Every block that holds parameters, in a fixed order."""
        for module in self.modules():
            if isinstance(module, FlatBlock):
                yield module

    def published(self, of: str = "value") -> Iterator[tuple[str, Tensor]]:
        """(published key, view) of every trained tensor's values, or of its gradient (`of="grad"`)."""
        for block in self.blocks():
            yield from block.published(of)

    def initialise(self, seed: int) -> None:
        """New weights, a pure function of the seed (spec section 1.8)."""
        generator = torch.Generator().manual_seed(seed)
        for block in self.blocks():
            block.initialise(self.config.initializer_range, generator)
