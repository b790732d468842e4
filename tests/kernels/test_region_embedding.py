"""The image stream's input against loops over rows in float64, on every backend of the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.dropout import Dropout, keep_mask_torch, row_tile
from kernels.region_embedding import region_embedding, region_embedding_torch
from kernels.rows import Rows
from tests.kernels.backends import HERE, bits_of, forced, in_float32
from tests.kernels.oracle import ALONE, LENGTHS, check, drawn, gradients_are_right, normal, rows_of
from tests.kernels.test_bias_dropout_residual_layernorm import dropped, layer_norm

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


@pytest.fixture(params=HERE, autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from forced(request.param)


def oracle(
    x: Tensor,
    feature_bias: Tensor,
    location_weight: Tensor,
    location_bias: Tensor,
    weight: Tensor,
    shift: Tensor,
    boxes: Tensor,
    rows: Rows,
    dropout: Dropout | None,
) -> Tensor:
    """Boxes come in x's precision, as the weights that they meet have it."""
    out = []
    for r, (item, place) in enumerate(zip(rows.row_item.tolist(), rows.row_index.tolist(), strict=True)):
        located = sum(location_weight[:, i] * boxes[r, i].double() for i in range(5))
        z = x[r] + feature_bias + located + location_bias
        out.append(dropped(layer_norm(z, weight, shift), dropout, int(rows.item_key[item]), place))
    return torch.stack(out)


def inputs(rows: int, width: int) -> dict[str, Tensor]:
    vectors = ("feature_bias", "location_bias", "shift")
    return {
        "x": normal(rows, width),
        "location_weight": normal(width, 5, seed=1),
        "weight": 1 + 0.1 * normal(width, seed=2),
        **{name: normal(width, seed=3 + i) for i, name in enumerate(vectors)},
    }


def boxes_of(rows: int) -> Tensor:
    """float32 [rows, 5], of values that bfloat16 has too."""
    return drawn(torch.rand, rows, 5, seed=1).bfloat16().float()


def checked(lengths: list[int], width: int, dropout: Dropout | None) -> None:
    """By the rule of `tests.kernels.oracle`."""
    rows = rows_of(lengths)
    others: dict[str, Any] = {"boxes": boxes_of(rows.total), "rows": rows, "dropout": dropout}
    check(
        lambda **x: region_embedding(**x, **others),
        lambda **x: region_embedding_torch(**x, **others),
        lambda **x: oracle(**x, **others),
        inputs(rows.total, width),
    )


def results(lengths: list[int], width: int, dropout: Dropout | None) -> list[Tensor]:
    """y and the gradients of all inputs, float32."""
    rows = rows_of(lengths)
    leaves = {name: value.float().requires_grad_() for name, value in inputs(rows.total, width).items()}
    y = region_embedding(**leaves, boxes=boxes_of(rows.total), rows=rows, dropout=dropout)
    return [y.detach(), *torch.autograd.grad(y, list(leaves.values()), normal(*y.shape, seed=8).float())]


@pytest.mark.parametrize("dropout", DROPOUTS, ids=["no dropout", "p=0.1"])
@pytest.mark.parametrize(("lengths", "width"), SHAPES, ids=str)
def test_against_the_oracle(lengths: list[int], width: int, dropout: Dropout | None) -> None:
    checked(lengths, width, dropout)


@pytest.mark.parametrize("dropout", DROPOUTS, ids=["no dropout", "p=0.1"])
def test_gradients(dropout: Dropout | None) -> None:
    rows, boxes = rows_of([1, 2]), torch.rand(3, 5)

    def op(location_weight: Tensor, **x: Tensor) -> Tensor:
        return region_embedding(**x, location_weight=location_weight, boxes=boxes, rows=rows, dropout=dropout)

    gradients_are_right(in_float32(op), inputs(3, 9))


@pytest.mark.parametrize("width", [5, 64, 96, 768, 1024])
def test_the_mask_is_that_of_the_definition(width: int) -> None:
    dropout = Dropout(0.5, 2**32 - 1, 2**31, 2**30)
    rows = rows_of([2, 5])
    keep = keep_mask_torch(dropout, rows.row_key, rows.row_index, width, row_tile(width))
    dropped_y, plain_y = (results([2, 5], width, d)[0] for d in (dropout, None))
    assert torch.equal(dropped_y != 0, (keep == 1) & (plain_y != 0))
    torch.testing.assert_close(dropped_y, plain_y * keep * dropout.scale)


@pytest.mark.parametrize("backend", ["native"], indirect=True)
def test_the_same_bits_on_any_number_of_threads(backend: str) -> None:
    bits_of(lambda: results([130, 7], 96, DROPOUTS[1]))


def test_no_rows() -> None:
    empty = Rows(torch.zeros(1, dtype=torch.int32), 0, 0, torch.zeros(0, dtype=torch.int64))
    leaves = {name: value.float().requires_grad_() for name, value in inputs(0, 24).items()}
    y = region_embedding(**leaves, boxes=torch.zeros(0, 5), rows=empty, dropout=DROPOUTS[1])
    y.backward(torch.empty(0, 24))
    assert y.shape == (0, 24)
    assert all(leaf.grad is not None and not leaf.grad.any() for leaf in leaves.values())


@pytest.mark.parametrize("backend", ["native"], indirect=True)
@pytest.mark.parametrize(
    ("name", "wrong"),
    [("boxes", (5, 4)), ("boxes", (4, 5)), ("location_weight", (5, 24)), ("shift", (25,)), ("x", (4, 24))],
)
def test_what_does_not_fit_is_refused(name: str, wrong: tuple[int, ...], backend: str) -> None:
    given: dict[str, Any] = {key: value.float() for key, value in inputs(5, 24).items()} | {"boxes": boxes_of(5)}
    with pytest.raises(ValueError, match="region_embedding: "):
        region_embedding(**(given | {name: torch.zeros(wrong)}), rows=rows_of([2, 3]))
