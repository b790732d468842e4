"""Triton's interpreter, mended for bfloat16 and made faster.

It keeps bfloat16 values as the 16-bit integers that they are stored as, and then computes with those integers: sums, products,
comparisons and matrix products are of bit patterns, and a float32 that becomes a bfloat16 is cut off where the GPU rounds
to nearest even. `install` widens such operands to float32 before every operation and rounds the result back. Reductions
are left alone: kernels widen before they reduce. `tests/kernels/interpreted/test_interpreter.py` holds the mended interpreter
to torch, and notices when the shipped one stops being wrong.

It also replaces the functions of `triton.language` at every call of a device function, though the launch has done so already,
which takes half of its time. `install` does it once a launch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import triton.language as tl
from numpy.typing import NDArray
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_ELEMENTWISE = ("binary_op", "unary_op", "create_fma", "create_clampf", "create_erf", "create_rsqrt")
_CASTS = ("cast_impl", "create_fp_to_fp")
_replace_language = interpreter._patch_lang
_SHIPPED = {name: getattr(InterpreterBuilder, name) for name in (*_ELEMENTWISE, *_CASTS, "create_dot")}


def install() -> None:
    """Mend the interpreter of this process; again is harmless."""
    for name in _ELEMENTWISE:
        setattr(InterpreterBuilder, name, _in_float32(_SHIPPED[name]))
    for name in _CASTS:
        setattr(InterpreterBuilder, name, _cast_by(_SHIPPED[name]))
    InterpreterBuilder.create_dot = _dot
    interpreter._patch_lang = _replace_language_once
    InterpreterBuilder.get_bf16 = lambda self, value: _rounded(TensorHandle(np.array([value], np.float32), tl.float32))


@contextmanager
def as_shipped() -> Iterator[None]:
    """The interpreter as Triton ships it, for the time of a `with` block."""
    for name, function in _SHIPPED.items():
        setattr(InterpreterBuilder, name, function)
    try:
        yield
    finally:
        install()


def _replace_language_once(function: Any) -> Any:
    """What is replaced already is left, with nothing to restore."""
    if any(tl.core.is_builtin(module.load) for module in _languages_of(function)):
        return _replace_language(function)
    return interpreter._LangPatchScope()


@cache
def _languages_of(function: Any) -> list[ModuleType]:
    """The modules of Triton's language that a function names."""
    named = {id(value) for value in function.__globals__.values()}
    return [module for module in (tl, tl.core) if id(module) in named]


def _is_bfloat16(operand: Any) -> bool:
    return isinstance(operand, TensorHandle) and operand.dtype.scalar == tl.bfloat16


def _widened(operand: Any) -> Any:
    """A bfloat16 handle as float32; anything else as it is."""
    if not _is_bfloat16(operand):
        return operand
    return TensorHandle((operand.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _rounded(handle: TensorHandle) -> TensorHandle:
    """A float handle as bfloat16: to nearest, ties to even, NaN to NaN."""
    values = np.ascontiguousarray(handle.data, np.float32)
    bits = values.view(np.uint32)
    nearest: NDArray[np.uint32] = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    high = np.where(np.isnan(values), np.uint32(0x7FC0), nearest >> np.uint32(16)).astype(np.uint16)
    return TensorHandle(high.reshape(handle.data.shape), tl.bfloat16)


def _in_float32(shipped: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    """The operation on widened operands; its result is rounded back, unless it is a truth value."""

    def operation(self: InterpreterBuilder, *operands: Any) -> TensorHandle:
        if not any(map(_is_bfloat16, operands)):
            return shipped(self, *operands)
        result = shipped(self, *map(_widened, operands))
        return result if result.data.dtype == np.bool_ else _rounded(result)

    return operation


def _cast_by(shipped: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    """The cast, by way of float32 where bfloat16 is on either side."""

    def cast(self: InterpreterBuilder, source: TensorHandle, target: tl.dtype, *rounding: Any) -> TensorHandle:
        if target.scalar == tl.bfloat16:
            return source if _is_bfloat16(source) else _rounded(source)
        if not _is_bfloat16(source):
            return shipped(self, source, target, *rounding)
        widened = _widened(source)
        return widened if target.scalar == tl.float32 else _SHIPPED["cast_impl"](self, widened, target)

    return cast


def _dot(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, start: TensorHandle, *more: Any) -> TensorHandle:
    """a b + start, in the precision of start."""
    product = _SHIPPED["create_dot"](self, _widened(a), _widened(b), _widened(start), *more)
    return _rounded(product) if _is_bfloat16(start) else product
