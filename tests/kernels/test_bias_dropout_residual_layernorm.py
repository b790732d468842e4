"""Bias, dropout, residual and LayerNorm against loops over rows in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.bias_dropout_residual_layernorm import (
    bias_dropout_residual_layernorm,
    bias_dropout_residual_layernorm_torch,
)
from kernels.dropout import Dropout, row_tile
from kernels.rows import Rows
from tests.kernels.oracle import ALONE, LENGTHS, check, gradients_are_right, normal, rows_of
from tests.kernels.philox import keep_row

DROPOUTS = [None, Dropout(0.1, 5, 6, 7)]


def layer_norm(x: Tensor, weight: Tensor, shift: Tensor) -> Tensor:
    """Of one row; biased variance, eps 1e-12."""
    centred = x - x.sum() / x.numel()
    return centred / ((centred * centred).sum() / x.numel() + 1e-12).sqrt() * weight + shift


def dropped(x: Tensor, dropout: Dropout | None, key: int, row: int) -> Tensor:
    """One row after dropout, by the rule of `tests.kernels.philox`."""
    if dropout is None:
        return x
    d, width = dropout, x.numel()
    keep = torch.from_numpy(keep_row(d.seed, d.step, d.site, d.p, key, row, width, row_tile(width)))
    return x * keep * 65536 / (65536 - round(d.p * 65536))


def oracle(
    x: Tensor, bias: Tensor, residual: Tensor, weight: Tensor, shift: Tensor, rows: Rows, dropout: Dropout | None
) -> Tensor:
    places = [(key, i) for key, n in zip(rows.item_key.tolist(), rows.lengths.tolist(), strict=True) for i in range(n)]
    return torch.stack(
        [
            layer_norm(dropped(x[r] + bias, dropout, key, i) + residual[r], weight, shift)
            for r, (key, i) in enumerate(places)
        ]
    )


def inputs(rows: int, width: int) -> dict[str, Tensor]:
    return {
        "x": normal(rows, width), "bias": normal(width, seed=1), "residual": normal(rows, width, seed=2),
        "weight": 1 + 0.1 * normal(width, seed=3), "shift": normal(width, seed=4),
    }  # fmt: skip


@pytest.mark.parametrize("dropout", DROPOUTS, ids=["no dropout", "p=0.1"])
@pytest.mark.parametrize(("lengths", "width"), [(LENGTHS, 24), ([3, 1], 101), *((one, 64) for one in ALONE)], ids=str)
def test_against_the_oracle(lengths: list[int], width: int, dropout: Dropout | None) -> None:
    rows = rows_of(lengths)
    check(
        lambda **x: bias_dropout_residual_layernorm(**x, rows=rows, dropout=dropout),
        lambda **x: bias_dropout_residual_layernorm_torch(**x, rows=rows, dropout=dropout),
        lambda **x: oracle(**x, rows=rows, dropout=dropout),
        inputs(rows.total, width),
    )


def test_a_large_mean_does_not_hurt_the_variance() -> None:
    """The squares of a row around 1000 lose the variance in float32; centred values do not."""
    rows, values = rows_of([2, 3]), inputs(5, 64)
    values["residual"] = values["residual"] + 1000
    given = {name: value.float() for name, value in values.items()}
    expected = oracle(**{name: value.double() for name, value in given.items()}, rows=rows, dropout=None)
    found = bias_dropout_residual_layernorm(**given, rows=rows, dropout=None)
    torch.testing.assert_close(found.double(), expected, atol=5e-4, rtol=0)


@pytest.mark.parametrize("dropout", DROPOUTS, ids=["no dropout", "p=0.1"])
def test_gradients(dropout: Dropout | None) -> None:
    rows = rows_of([1, 2])
    gradients_are_right(lambda **x: bias_dropout_residual_layernorm(**x, rows=rows, dropout=dropout), inputs(3, 9))
