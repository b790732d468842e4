"""Bias and erf-GELU in one op:  y = z Φ(z),  z = x + bias  (spec section 1.1: 0.5 z (1 + erf(z / √2)))."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """[rows, width] from x [rows, width] and bias [width], in x's dtype."""
    return bias_gelu_torch(x, bias)


def bias_gelu_torch(x: Tensor, bias: Tensor) -> Tensor:
    """The plain reference."""
    return F.gelu(x + bias)
