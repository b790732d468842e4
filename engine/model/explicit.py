"""Blocks with a backward of their own.

Autograd sees a block as one node. Inside, products and kernels are called one after the other, forward and backward, so
that weight gradients are written by the product itself into the block's flat gradient (no `split`, no concatenation),
residual gradients are added by the product that follows (no pass of their own), and what backward can compute again
(the GELU's output, dropout masks, attention probabilities) is not kept.

The arithmetic is in `engine.model.sublayers`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from engine.model.flat import FlatBlock
from engine.ranges import span

Fields = dict[str, Tensor]
Outputs = Tensor | tuple[Tensor, ...]


class Pass(Protocol):
    """One way through a block: what it computes, and the gradients of that."""

    @property
    def forward(self) -> Callable[..., tuple[Outputs, Any]]:
        """forward(w, *inputs) -> (outputs, what backward needs), w the block's weights."""

    @property
    def backward(self) -> Callable[..., tuple[Tensor | None, ...]]:
        """backward(w, g, saved, *gradients) -> gradients of the inputs; writes every field of g, those of the weights."""


def run(block: FlatBlock, through: Pass, *inputs: Tensor) -> Any:
    """The outputs of `through` on these inputs, with the block's weights; differentiable once."""
    return _Explicit.apply(block, through, block.matrices, block.vectors, *inputs)


class _Explicit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, block: FlatBlock, through: Pass, matrices: Tensor, vectors: Tensor, *inputs: Tensor) -> Any:
        outputs, saved = through.forward(block.values(), *inputs)
        ctx.block, ctx.through = block, through
        ctx.saved = saved if any(ctx.needs_input_grad) else None
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        saved, ctx.saved = ctx.saved, None
        if saved is None:
            raise RuntimeError("backward through a block twice: what it had kept was used up the first time")
        with span(ctx.block.title):
            matrices, vectors, g = ctx.block.lend_gradients()
            # Gradients of row 0 alone, say, may come as views of something wider.
            of_inputs = ctx.through.backward(ctx.block.values(), g, saved, *(x.contiguous() for x in gradients))
            return None, None, matrices, vectors, *of_inputs
