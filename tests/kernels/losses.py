"""What the tests of the losses share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def leaves_of(inputs: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Copies in `dtype` that want gradients."""
    return {name: value.to(dtype, copy=True).requires_grad_() for name, value in inputs.items()}


def results(loss: Callable[..., Tensor], leaves: dict[str, Tensor], **others: Tensor) -> list[Tensor]:
    """Loss and the gradient of every leaf, under an upstream gradient of 3."""
    value = loss(**leaves, **others)
    return [value.detach(), *torch.autograd.grad(3 * value, list(leaves.values()))]


def in_turn(loss: Callable[..., Tensor], target: Tensor, parts: int = 8) -> Callable[..., Tensor]:
    """float32 [parts]: the loss of each part of hidden and target. One loss alone has too few roundings to compare two
    implementations by: the better one can be off by more, by luck."""
    return lambda hidden, **others: torch.stack(
        [loss(hidden=h, **others, target=t) for h, t in zip(hidden.chunk(parts), target.chunk(parts), strict=True)]
    )


def largest_made(function: Callable[[], object]) -> int:
    """Bytes of the largest memory that an operation inside `function` returned without having been given it."""
    with _Watch() as watch:
        function()
    return watch.largest


class _Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {memory.data_ptr() for memory in _memories((args, kwargs))}
        returned = function(*args, **(kwargs or {}))
        made = [memory.nbytes() for memory in _memories(returned) if memory.data_ptr() not in given]
        self.largest = max([self.largest, *made])
        return returned


def _memories(tree: object) -> list[torch.UntypedStorage]:
    return [x.untyped_storage() for x in tree_leaves(tree) if isinstance(x, Tensor)]
