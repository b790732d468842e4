"""The image stream's input against loops over rows in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.dropout import Dropout
from kernels.region_embedding import region_embedding, region_embedding_torch
from kernels.rows import Rows
from tests.kernels.oracle import ALONE, LENGTHS, check, gradients_are_right, normal, rows_of
from tests.kernels.test_bias_dropout_residual_layernorm import dropped, layer_norm

DROPOUTS = [None, Dropout(0.1, 5, 6, 7)]


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


@pytest.mark.parametrize("dropout", DROPOUTS, ids=["no dropout", "p=0.1"])
@pytest.mark.parametrize(("lengths", "width"), [(LENGTHS, 24), ([3, 1], 101), *((one, 64) for one in ALONE)], ids=str)
def test_against_the_oracle(lengths: list[int], width: int, dropout: Dropout | None) -> None:
    rows = rows_of(lengths)
    boxes = torch.rand(rows.total, 5, generator=torch.Generator().manual_seed(1)).bfloat16().float()
    check(
        lambda **x: region_embedding(**x, boxes=boxes, rows=rows, dropout=dropout),
        lambda **x: region_embedding_torch(**x, boxes=boxes, rows=rows, dropout=dropout),
        lambda **x: oracle(**x, boxes=boxes, rows=rows, dropout=dropout),
        inputs(rows.total, width),
    )


@pytest.mark.parametrize("dropout", DROPOUTS, ids=["no dropout", "p=0.1"])
def test_gradients(dropout: Dropout | None) -> None:
    rows, boxes = rows_of([1, 2]), torch.rand(3, 5)
    gradients_are_right(lambda **x: region_embedding(**x, boxes=boxes, rows=rows, dropout=dropout), inputs(3, 9))
