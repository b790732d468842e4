"""One training step, counted without being computed: the engine's own step on tensors that have shapes and no memory.

The model runs on torch's device `meta`, its kernels with a library that does nothing, so that products, bytes, launches and
what backward keeps are those of the code as it is, not of a formula beside it. A step takes a tenth of a second, whatever the
model and the batch.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.gemms import Gemm, GemmRecorder
from bench.traffic import moved_bytes
from kernels import attention, backends, native_library, soft_label_bce
from kernels.names import PROJECTION

META = torch.device("meta")

_PASSES = {
    "bias_dropout_residual_layernorm_forward": ("layernorm", 3),
    "bias_dropout_residual_layernorm_backward": ("layernorm", 5),
    "bias_gelu_forward": ("gelu", 2),
    "bias_gelu_backward": ("gelu", 4),
    "projection_gelu_forward": ("gelu", 1),
    "projection_gelu_gradient": ("gelu", 2),
    "region_embedding_forward": ("layernorm", 2),
    "region_embedding_backward": ("layernorm", 3),
    "dropout": ("layernorm", 2),
}
"""Kernel -> its kind, and how often it reads or writes a [rows, width] tensor. Those within a product: beyond the product's."""

_NOT_COUNTED = {"mm", "addmm", "addmm_", "bmm", "baddbmm"}
"""Products: `Counted.products` has them."""
_ALLOCATES_ONLY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias"}


@dataclass(frozen=True)
class Product:
    """A matrix product of a step: [m, n] from sums of k terms."""

    m: int
    n: int
    k: int
    element_size: int

    @property
    def flops(self) -> int:
        """Multiplications and additions."""
        return 2 * self.m * self.n * self.k

    @property
    def bytes(self) -> int:
        """Each operand once."""
        return self.element_size * (self.m * self.k + self.k * self.n + self.m * self.n)


@dataclass
class Counted:
    """Forward and backward of one batch on one rank; the update and what crosses between ranks are counted elsewhere."""

    products: list[Product] = field(default_factory=list)
    bytes: Counter[str] = field(default_factory=Counter)
    """Read and written by everything else, by kind: layernorm, gelu, attention, other."""
    calls: Counter[str] = field(default_factory=Counter)
    """Kernels of each kind, products too."""
    attention_flops: int = 0
    """Lengths that differ within a batch count as their mean."""
    activations: int = 0
    """Bytes that forward and backward hold at most, beside weights, gradients and the batch."""
    batch_bytes: int = 0
    images: int = 0
    """Distinct ones: what is read from a store."""
    rows: int = 0
    """Text and region rows over pairs."""
    gradients: int = 0
    """Values that get a gradient: the trunk and the head that ran."""

    @property
    def launches(self) -> int:
        """Of forward and backward."""
        return self.calls.total()

    @property
    def flops(self) -> int:
        """Of all products, attention's included."""
        return sum(product.flops for product in self.products) + self.attention_flops


@contextmanager
def counting(native_products: bool) -> Iterator[Counted]:
    """What runs on tensors of the device `meta` within the block, counted when it is over."""
    counted = Counted()
    with ExitStack() as stack:
        stack.enter_context(_silent_kernels(counted, native_products))
        recorder = stack.enter_context(GemmRecorder())
        memory = stack.enter_context(_Shapes(counted))
        yield counted
    counted.activations = memory.peak
    counted.products = [_product(gemm) for gemm in recorder.gemms]
    counted.calls["products"] += len(counted.products)


def _product(gemm: Gemm) -> Product:
    return Product(
        gemm.flops // (2 * gemm.depth * gemm.out.shape[-1]), gemm.out.shape[-1], gemm.depth, gemm.out.dtype.itemsize
    )


class _Silent:
    """Stands in for the native library: every function returns at once, and is counted by its name and first arguments."""

    def __init__(self, counted: Counted) -> None:
        self._counted = counted

    def __getattr__(self, name: str) -> Callable[..., None]:
        name = name.removeprefix("stopgo_")
        kind, passes = _PASSES.get(name, ("", 0))

        def call(*arguments: Any) -> None:
            within = name.startswith("projection_")  # the recorder of products has those
            self._counted.calls[kind or "other"] += not within
            if kind:
                rows, width = self._shape(name, arguments)
                self._counted.bytes[kind] += passes * rows * width * self._element_size(name, arguments)

        return call

    @staticmethod
    def _shape(name: str, arguments: Sequence[Any]) -> tuple[int, int]:
        """Rows and width."""
        if name.startswith("projection_"):
            return arguments[0], arguments[1]
        return arguments[1], arguments[2]

    @staticmethod
    def _element_size(name: str, arguments: Sequence[Any]) -> int:
        """Products are bfloat16's; the others say their dtype first: 0 is float32."""
        return 2 if name.startswith("projection_") or arguments[0] else 4


@contextmanager
def _silent_kernels(counted: Counted, native_products: bool) -> Iterator[None]:
    """Every op takes the way of its native kernel, which on a GPU is that of its Triton kernel, and computes nothing."""

    class Chosen(dict):
        def get(self, key: Any, default: Any = None) -> str:
            return "torch" if key[0] == PROJECTION and not native_products else "native"

    def attend(passes: int, products: int) -> Callable[..., None]:
        def call(directions: Sequence[attention.Direction], *_: Any) -> None:
            counted.calls["attention"] += 1
            for d in directions:
                queries, keys, width = d.q_rows.total, d.k_rows.total, d.q.shape[1]
                counted.bytes["attention"] += passes * (queries + keys) * width * d.q.element_size()
                counted.attention_flops += products * 2 * queries * keys * width // max(d.q_rows.n, 1)

        return call

    with ExitStack() as stack:
        stack.enter_context(patch.object(native_library, "_loaded", lambda: (_Silent(counted), "")))
        stack.enter_context(patch.object(backends, "_decided", Chosen()))
        stack.enter_context(patch.object(soft_label_bce, "_check", lambda *_: None))  # it reads values
        stack.enter_context(patch.dict(attention.FORWARD, native=attend(2, 2)))  # q, out | k, v
        stack.enter_context(patch.dict(attention.BACKWARD, native=attend(4, 5)))  # q, out, dout, dq | k, v, dk, dv
        yield


class _Shapes(TorchDispatchMode):
    """Bytes that torch's own ops move, and the most that lives at once. A search for distinct ids finds them all distinct."""

    _LIKE: ClassVar[dict[str, Callable[[Tensor], tuple[Tensor, ...]]]] = {
        "_unique2": lambda ids: (torch.empty_like(ids), torch.empty_like(ids), torch.empty_like(ids)),
    }

    def __init__(self, counted: Counted) -> None:
        super().__init__()
        self._counted, self._now, self.peak = counted, 0, 0
        self._alive: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        like = self._LIKE.get(name)
        result = like(args[0]) if like else func(*args, **kwargs)
        if not any(returned.alias_info for returned in func._schema.returns):  # else it lay somewhere before
            for x in tree_leaves(result):
                if isinstance(x, Tensor):
                    self._notice(x)
        if not func.is_view and name not in _ALLOCATES_ONLY and name not in _NOT_COUNTED:
            self._counted.calls["other"] += 1
            self._counted.bytes["other"] += moved_bytes(name, func, args, kwargs, result)
        return result

    def _notice(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self._alive:
            return

        def freed(_: object) -> None:
            self._now -= size
            del self._alive[key]

        self._alive[key] = weakref.ref(storage, freed)
        self._now += size
        self.peak = max(self.peak, self._now)
