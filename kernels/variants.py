"""`Variant`: one Triton kernel as a run can launch it, named so that it can be compiled ahead of time, without a GPU.

Every op's file has `variants()`, which lists all of them for float32, bfloat16 and float16 at the full model's sizes;
`python -m bench.kernels --aot sm_80,sm_90` compiles and judges them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from triton.runtime.jit import JITFunction


@dataclass(frozen=True)
class Variant:
    """One compilation of one kernel.

    `signature` has every argument of the kernel in order, by Triton's type name: "*bf16", "i32", "fp32", "constexpr". An
    integer type may end in ":16" (as in "i32:16") where the full model's values are multiples of 16: a launch would
    specialise on that. Pointers are taken to be aligned to 16 bytes. `constexprs` has a value for each constexpr.
    """

    op: str
    name: str
    kernel: JITFunction[Any]
    signature: dict[str, str]
    constexprs: dict[str, object]
    num_warps: int
    num_stages: int
    dtype: str
    """Of the op's tensors: "float32", "bfloat16" or "float16"."""
    dot: bool
    """Has a matrix product: tensor-core instructions are expected, but in float32, whose products are in full precision."""
    copies: bool
    """Has a loop over loads: asynchronous copies are expected."""
