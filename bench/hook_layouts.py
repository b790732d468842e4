"""The full model's parameters in two layouts, flat and published, as modules whose backward gives gradients and costs little.

Only names, shapes and the grouping into modules are the model's; forward passes one scalar through all modules that run,
backward hands out zeros. What is left is what surrounds a parameter: autograd's bookkeeping and DeepSpeed's hooks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from engine.model.config import ModelConfig
from engine.model.published import PUBLISHED_HEADS, TIED, published_shapes
from engine.model.vilbert import ViLBERT
from engine.slices import named_parameters

HEAD = "vil_prediction"
"""The head that runs: that of VQA."""
NARROW = ModelConfig(
    vocab_size=200, max_position_embeddings=32, hidden_size=24, intermediate_size=48, v_feature_size=32, v_target_size=16,
    v_hidden_size=32, v_intermediate_size=32, bi_hidden_size=32,
)  # fmt: skip
"""As many tensors as the full model has, and little in them."""

Shape = tuple[int, ...]


class Layout(NamedTuple):
    """Parameters by name, in groups that are modules."""

    shapes: dict[str, dict[str, Shape]]
    """By module and parameter."""
    running: list[str]
    """The modules that a step with `HEAD` runs."""
    one_leaf: bool
    """Whether stage 3 is told to take the model whole, as the engine does."""

    @property
    def tensors(self) -> int:
        """How many there are."""
        return sum(map(len, self.shapes.values()))

    @property
    def running_tensors(self) -> int:
        """How many get a gradient in a step."""
        return sum(len(self.shapes[name]) for name in self.running)

    @property
    def values(self) -> int:
        """How many values they hold."""
        return sum(torch.Size(shape).numel() for module in self.shapes.values() for shape in module.values())


def flat(config: ModelConfig) -> Layout:
    """Ours: two flat tensors a block."""
    with torch.device("meta"):
        model = ViLBERT(config, PUBLISHED_HEADS, pretraining=True)
    shapes: defaultdict[str, dict[str, Shape]] = defaultdict(dict)
    running: dict[str, None] = {}
    for named in named_parameters(model):
        block, _, kind = named.key.rpartition("." if "." in named.key else "/")
        shapes[block][kind] = tuple(named.parameter.shape)
        if named.unit in ("trunk", HEAD):
            running[block] = None
    return Layout(dict(shapes), list(running), one_leaf=True)


def published(config: ModelConfig) -> Layout:
    """The authors': one tensor each (the tied one once), in the modules that their names tell."""
    shapes: defaultdict[str, dict[str, Shape]] = defaultdict(dict)
    for key, shape in published_shapes(config, {}).items():
        if key != TIED:
            module, _, name = key.rpartition(".")
            shapes[module][name] = shape
    running = [name for name in shapes if name.startswith(("bert.", f"{HEAD}.")) and "q_dense" not in name]
    return Layout(dict(shapes), running, one_leaf=False)


LAYOUTS = {"flat": flat, "published": published}


class _Through(torch.autograd.Function):
    """x, past some parameters."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shapes: list[Shape], *parameters: Tensor) -> Tensor:
        ctx.shapes, ctx.dtype = shapes, parameters[0].dtype
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
        return dx, None, *(torch.zeros(shape, dtype=ctx.dtype) for shape in ctx.shapes)


class _Group(nn.Module):
    """The parameters of one module."""

    def __init__(self, shapes: Mapping[str, Shape], dtype: torch.dtype) -> None:
        super().__init__()
        self._shapes = list(shapes.values())
        self._own = nn.ParameterList(nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in self._shapes)

    def forward(self, x: Tensor) -> Tensor:
        """The scalar, unchanged."""
        return _Through.apply(x, self._shapes, *self._own)


class Standing(nn.Module):
    """A layout as a module. Its forward takes a scalar that wants a gradient and gives it back."""

    def __init__(self, layout: Layout, dtype: torch.dtype) -> None:
        super().__init__()
        self._running = layout.running
        self._groups = nn.ModuleDict(
            {name.replace(".", "/"): _Group(shapes, dtype) for name, shapes in layout.shapes.items()}
        )

    def forward(self, x: Tensor) -> Tensor:
        """Through every module that runs."""
        for name in self._running:
            x = self._groups[name.replace(".", "/")](x)
        return x
