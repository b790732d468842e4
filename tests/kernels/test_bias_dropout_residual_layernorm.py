"""Bias, dropout, residual and LayerNorm against loops over rows in float64, on every backend of the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kernels.bias_dropout_residual_layernorm import (
    bias_dropout_residual_layernorm,
    bias_dropout_residual_layernorm_backward,
    bias_dropout_residual_layernorm_forward,
    bias_dropout_residual_layernorm_torch,
)
from kernels.dropout import Dropout, keep_mask_torch, row_tile
from kernels.rows import Rows
from tests.kernels.backends import HERE, bits_of, forced, in_float32
from tests.kernels.oracle import ALONE, LENGTHS, check, gradients_are_right, normal, rows_of
from tests.kernels.philox import keep_row

DROPOUTS = [None, Dropout(0.1, 5, 6, 7)]
SHAPES = [
    (LENGTHS, 24),
    ([3, 1], 101),
    *((one, 64) for one in ALONE),
    ([30, 35], 5),
    ([65], 96),
    ([7], 768),
    ([2], 1024),
    ([256], 24),
    ([306, 1], 64),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=HERE, autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from forced(request.param)


def layer_norm(x: Tensor, weight: Tensor, shift: Tensor) -> Tensor:
    """Of one row; biased variance, eps 1e-12."""
    centred = x - x.sum() / x.numel()
    return centred / ((centred * centred).sum() / x.numel() + 1e-12).sqrt() * weight + shift


def dropped(x: Tensor, dropout: Dropout | None, key: int, row: int) -> Tensor:
    """One row after dropout, by the rule of `tests.kernels.philox`."""
    if dropout is None:
        return x
    d, width = dropout, x.numel()
    keep = torch.from_numpy(keep_row(d.seed, int(d.step), d.site, d.p, key, row, width, row_tile(width)))
    return x * keep.to(x.device) * 65536 / (65536 - round(d.p * 65536))


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


def gradients(
    lengths: list[int], width: int, dropout: Dropout | None, dtype: torch.dtype, in_place: bool = False
) -> list[Tensor]:
    """y, dx, dresidual, dbias, dweight and dshift by the explicit calls; in_place: dresidual in dy's memory, and without
    dropout dx too."""
    rows = rows_of(lengths)
    given = {name: value.to(dtype) for name, value in inputs(rows.total, width).items()}
    y, saved = bias_dropout_residual_layernorm_forward(**given, rows=rows, dropout=dropout)
    dy = normal(rows.total, width, seed=5).to(dtype)
    dresidual = dy if in_place else torch.empty_like(dy)
    dx = dresidual if in_place and dropout is None else torch.empty_like(dy)
    vectors = [torch.full((width,), 9.0, dtype=dtype) for _ in range(3)]
    bias_dropout_residual_layernorm_backward(saved, dy, dx, dresidual, *vectors)
    return [y, dx, dresidual, *vectors]


def checked(lengths: list[int], width: int, dropout: Dropout | None) -> None:
    """By the rule of `tests.kernels.oracle`."""
    rows = rows_of(lengths)
    check(
        lambda **x: bias_dropout_residual_layernorm(**x, rows=rows, dropout=dropout),
        lambda **x: bias_dropout_residual_layernorm_torch(**x, rows=rows, dropout=dropout),
        lambda **x: oracle(**x, rows=rows, dropout=dropout),
        inputs(rows.total, width),
    )


@pytest.mark.parametrize("dropout", DROPOUTS, ids=["no dropout", "p=0.1"])
@pytest.mark.parametrize(("lengths", "width"), SHAPES, ids=str)
def test_against_the_oracle(lengths: list[int], width: int, dropout: Dropout | None) -> None:
    checked(lengths, width, dropout)


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
    op = in_float32(lambda **x: bias_dropout_residual_layernorm(**x, rows=rows, dropout=dropout))
    gradients_are_right(op, inputs(3, 9))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout", DROPOUTS, ids=["no dropout", "p=0.1"])
def test_gradients_may_overwrite_what_they_came_from(dropout: Dropout | None, dtype: torch.dtype) -> None:
    apart, together = (gradients([3, 30], 40, dropout, dtype, in_place) for in_place in (False, True))
    assert all(torch.equal(one, other) for one, other in zip(apart, together, strict=True))


def test_one_implementation_serves_blocks_and_autograd() -> None:
    rows, dropout = rows_of([3, 30]), DROPOUTS[1]
    leaves = {name: value.float().requires_grad_() for name, value in inputs(33, 40).items()}
    y = bias_dropout_residual_layernorm(**leaves, rows=rows, dropout=dropout)
    y.backward(normal(33, 40, seed=5).float())
    found = [y.detach(), *(leaves[name].grad for name in ("x", "residual", "bias", "weight", "shift"))]
    explicit = gradients([3, 30], 40, dropout, torch.float32)
    assert all(torch.equal(one, other) for one, other in zip(found, explicit, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("width", [5, 64, 96, 768, 1024])
def test_the_mask_is_that_of_the_definition(width: int) -> None:
    """What is dropped gets no gradient, and what is kept gets that of the residual, scaled."""
    dropout = Dropout(0.5, 2**32 - 1, 2**31, 2**30)
    rows = rows_of([2, 5])
    _, dx, dresidual, *_ = gradients([2, 5], width, dropout, torch.float32)
    keep = keep_mask_torch(dropout, rows.row_key, rows.row_index, width, row_tile(width))
    assert (dresidual != 0).all()
    assert torch.equal(dx != 0, keep == 1)
    torch.testing.assert_close(dx, dresidual * keep * dropout.scale)


@pytest.mark.parametrize("backend", ["native"], indirect=True)
def test_the_same_bits_on_any_number_of_threads(backend: str) -> None:
    bits_of(lambda: gradients([101, 7], 96, DROPOUTS[1], torch.float32))


def test_no_rows() -> None:
    empty = Rows(torch.zeros(1, dtype=torch.int32), 0, 0, torch.zeros(0, dtype=torch.int64))
    given = {name: value.float() for name, value in inputs(0, 24).items()}
    y, saved = bias_dropout_residual_layernorm_forward(**given, rows=empty, dropout=DROPOUTS[1])
    dx, dresidual = torch.empty(0, 24), torch.empty(0, 24)
    vectors = [torch.full((24,), 9.0) for _ in range(3)]
    bias_dropout_residual_layernorm_backward(saved, torch.empty(0, 24), dx, dresidual, *vectors)
    assert y.shape == (0, 24) and not torch.stack(vectors).any()


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("residual", (4, 24)), ("bias", (25,)), ("x", (6, 24)), ("weight", (1, 24))],
)
def test_what_does_not_fit_is_refused(name: str, wrong: tuple[int, ...]) -> None:
    given = {key: value.float() for key, value in inputs(5, 24).items()} | {name: torch.zeros(wrong)}
    with pytest.raises(ValueError, match="bias_dropout_residual_layernorm: "):
        bias_dropout_residual_layernorm_forward(**given, rows=rows_of([2, 3]), dropout=None)
