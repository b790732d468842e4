"""The matrix products of a step: recorded while it runs, then run back to back with nothing between them.

    GEMM share = time of exactly this list / time of forward + backward

What is recorded of a product is its shapes, strides, dtypes and scalars, and which operands lie where: two operands at one
address become one buffer in the replay, two at different addresses two. So a weight that the step reads three times is
read three times here, and one that it reads once is as cold as there.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from statistics import median
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import projection

aten = torch.ops.aten

_OUT_FORMS: dict[Any, Any] = {
    aten.mm: aten.mm.out,
    aten.addmm: aten.addmm.out,
    aten.bmm: aten.bmm.out,
    aten.baddbmm: aten.baddbmm.out,
    aten.addmm_: aten.addmm.out,
    aten.baddbmm_: aten.baddbmm.out,
}
"""Products, in place or not, and the form that writes where it is told to. A linear layer arrives as one of these."""

_PATTERN = 1 << 20
"""Random values that the buffers are filled from."""


@dataclass(frozen=True)
class Operand:
    """Where a tensor lay in the step, and how."""

    address: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, x: Tensor) -> Operand:
        return cls(x.data_ptr(), tuple(x.shape), x.stride(), x.dtype, x.device)

    @property
    def extent(self) -> int:
        """Elements from its first to its last."""
        return 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.stride, strict=True))


@dataclass(frozen=True)
class Gemm:
    """One product: `form` writes the result of `operands` into `out`."""

    form: Callable[..., Tensor]
    operands: tuple[Operand, ...]
    scalars: dict[str, float]
    out: Operand
    depth: int
    """Terms of a sum."""

    @property
    def flops(self) -> int:
        """Multiplications and additions: 2 m k n, for every matrix of a batch."""
        return 2 * prod(self.out.shape) * self.depth


def product_flops(func: Any, args: Any, result: Any) -> int:
    """Of one of torch's ops, as its dispatcher has it; 0 where it is no product."""
    if func.overloadpacket not in _OUT_FORMS:
        return 0
    left = [x for x in args if isinstance(x, Tensor)][-2]
    return 2 * result.numel() * left.shape[-1]


class GemmRecorder(TorchDispatchMode):
    """Within its `with` block, every product that torch or the project's own kernels run for a projection is written down,
    forward and backward alike."""

    def __init__(self) -> None:
        super().__init__()
        self.gemms: list[Gemm] = []

    def __enter__(self) -> Self:
        self._native = dict(projection.NATIVE)
        for name, product in self._native.items():
            projection.NATIVE[name] = partial(self._run_native, name, product)
        return super().__enter__()

    def __exit__(self, *failure: Any) -> None:
        projection.NATIVE.update(self._native)
        super().__exit__(*failure)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        form = _OUT_FORMS.get(func.overloadpacket)
        if form is not None and result.numel():
            operands = tuple(Operand.of(x) for x in args if isinstance(x, Tensor))
            scalars = {name: value for name, value in (kwargs or {}).items() if name in ("alpha", "beta")}
            self.gemms.append(Gemm(form, operands, scalars, Operand.of(result), operands[-2].shape[-1]))
        return result

    def _run_native(self, name: str, product: Callable[..., Tensor], *tensors: Tensor | None, out: Tensor) -> Tensor:
        plain = projection.PLAIN.get(name)
        form, of_product = (product, tensors) if plain is None else (self._native[plain], tensors[:2])
        operands = tuple(Operand.of(x) for x in of_product if x is not None)
        left = tensors[0] if name != "added_input_gradient" else tensors[1]
        assert left is not None
        depth = left.shape[0 if name == "weight_gradient" else 1]
        self.gemms.append(Gemm(form, operands, {}, Operand.of(out), depth))
        return product(*tensors, out=out)


class Replay:
    """A list of products with memory of their own, ready to run."""

    def __init__(self, gemms: list[Gemm]) -> None:
        buffers: dict[Operand, Tensor] = {}
        for gemm in gemms:
            for operand in (*gemm.operands, gemm.out):
                if operand not in buffers:
                    buffers[operand] = _filled(operand)
        self._calls = [
            (gemm.form, [buffers[operand] for operand in gemm.operands], gemm.scalars, buffers[gemm.out])
            for gemm in gemms
        ]
        self._graph: torch.cuda.CUDAGraph | None = None
        self.bytes = sum(buffer.untyped_storage().nbytes() for buffer in buffers.values())

    @torch.no_grad()
    def seconds(self) -> float:
        """Run the list once. On a GPU it is recorded after the first time, so that the host's launching is not in it."""
        if not self._calls or not self._calls[0][3].is_cuda:
            started = time.perf_counter()
            self._run()
            return time.perf_counter() - started
        if self._graph is None:
            self._run()
            torch.cuda.synchronize()
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._run()
        torch.cuda.synchronize()
        started = time.perf_counter()
        self._graph.replay()
        torch.cuda.synchronize()
        return time.perf_counter() - started

    def _run(self) -> None:
        for form, operands, scalars, out in self._calls:
            form(*operands, **scalars, out=out)


def _filled(operand: Operand) -> Tensor:
    """A tensor laid out like the operand, of ordinary values (small: sums of thousands of products stay finite)."""
    pattern = torch.randn(_PATTERN, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(operand.dtype)
    memory = torch.empty(operand.extent, dtype=operand.dtype, device=operand.device)
    for piece in memory.split(_PATTERN):
        piece.copy_(pattern[: len(piece)])
    return memory.as_strided(operand.shape, operand.stride)


@dataclass(frozen=True)
class GemmTimes:
    """A step's products beside its forward and backward, run in turns."""

    replay_s: list[float]
    forward_backward_s: list[float]
    products: int
    flops: int

    @property
    def share(self) -> float:
        """Median over median."""
        return median(self.replay_s) / median(self.forward_backward_s)
