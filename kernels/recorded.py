"""The torch backend of an op with an explicit forward and backward: autograd records the plain reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Recorded:
    """One call of a plain function, recorded on detached inputs, so that a block's own backward can run it later."""

    def __init__(self, function: Callable[..., Tensor | tuple[Tensor, ...]], *inputs: Tensor) -> None:
        self._inputs = [x.detach().requires_grad_() for x in inputs]
        with torch.enable_grad():
            results = function(*self._inputs)
        self._outputs = results if isinstance(results, tuple) else (results,)
        self.outputs = tuple(output.detach() for output in self._outputs)

    def backward(self, *gradients: Tensor) -> Sequence[Tensor]:
        """The gradient of every input under these gradients of the outputs. Once only: the record is freed."""
        return torch.autograd.grad(self._outputs, self._inputs, gradients)
