"""The gradients of a projection's weight and bias:  dW = dyᵀ x,  db = Σ_rows dy,  for  y = x Wᵀ + b.

A product is torch's business on every device. On CPUs with AMX oneDNN reads a transposed left operand at less than half
the speed of a plain one, so there dy is turned around first (`native/transpose.cpp`); elsewhere that would only cost.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import native_library


def weight_gradient(dy: Tensor, x: Tensor, out: Tensor) -> None:
    """Writes dyᵀ x into out [width of y, width of x]; dy [rows, width of y] and x [rows, width of x], rows maybe strided."""
    torch.mm(_turned(dy) if _worth_turning(dy) else dy.t(), x, out=out)


def bias_gradient(dy: Tensor, out: Tensor) -> None:
    """Writes the column sums of dy [rows, width] into out [width]."""
    torch.sum(dy, 0, out=out)


def _worth_turning(x: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.element_size() == 2
        and native_library.available()
        and native_library.isa() == "amx"
    )


def _turned(x: Tensor) -> Tensor:
    """xᵀ [columns, rows], contiguous; x of a 16-bit dtype."""
    rows, columns = x.shape
    turned = x.new_empty(columns, rows)
    native_library.library().stopgo_transpose(rows, columns, x.data_ptr(), x.stride(0), turned.data_ptr())
    return turned
