"""Self-attention against loops over items and heads in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.attention import HEAD_SHIFT, attention, attention_torch
from kernels.dropout import ATTENTION_TILE, Dropout
from kernels.rows import Rows
from tests.kernels.oracle import ALONE, LENGTHS, check, gradients_are_right, normal, rows_of
from tests.kernels.philox import keep_row

HEADS, WIDTH = 2, 16
DROPOUTS = [None, Dropout(0.1, 5, 6, 7), Dropout(0.5, 2**32 - 1, 2**32 - 2, 1)]


def attention_oracle(
    q: Tensor, k: Tensor, v: Tensor, q_rows: Rows, k_rows: Rows, heads: int, dropout: Dropout | None = None
) -> Tensor:
    """One item and one head at a time."""
    width = q.shape[1] // heads
    contexts = []
    for item, key in enumerate(q_rows.item_key.tolist()):
        (q0, q1), (k0, k1) = (rows.cu_seqlens[item : item + 2].tolist() for rows in (q_rows, k_rows))
        of_heads = []
        for head in range(heads):
            columns = slice(head * width, (head + 1) * width)
            scores = q[q0:q1, columns] @ k[k0:k1, columns].T / width**0.5
            probabilities = scores.exp() / scores.exp().sum(1, keepdim=True)
            if dropout is not None:
                probabilities = probabilities * keep(dropout, key, head, q1 - q0, k1 - k0) * dropout.scale
            of_heads.append(probabilities @ v[k0:k1, columns])
        contexts.append(torch.cat(of_heads, 1))
    return torch.cat(contexts)


def keep(dropout: Dropout, key: int, head: int, queries: int, width: int) -> Tensor:
    """[queries, width] of one item and head: rows are counted through the heads, columns cut into tiles of 64."""
    rows = [(head << HEAD_SHIFT) + row for row in range(queries)]
    d = dropout
    masks = [keep_row(d.seed, d.step, d.site, d.p, key, row, width, ATTENTION_TILE) for row in rows]
    return torch.stack([torch.from_numpy(mask) for mask in masks]).double()


def projections(q_rows: Rows, k_rows: Rows) -> dict[str, Tensor]:
    rows = {"q": q_rows, "k": k_rows, "v": k_rows}
    return {name: normal(of.total, WIDTH, seed=i) for i, (name, of) in enumerate(rows.items())}


@pytest.mark.parametrize("dropout", DROPOUTS, ids=["no dropout", "p=0.1", "p=0.5"])
@pytest.mark.parametrize("lengths", [LENGTHS, *ALONE, [9, 9, 9]], ids=str)
def test_against_the_oracle(lengths: list[int], dropout: Dropout | None) -> None:
    rows = rows_of(lengths)
    more = {"q_rows": rows, "k_rows": rows, "heads": HEADS, "dropout": dropout}
    check(
        lambda **inputs: attention(**inputs, **more),  # type: ignore[arg-type]
        lambda **inputs: attention_torch(**inputs, **more),  # type: ignore[arg-type]
        lambda **inputs: attention_oracle(**inputs, **more),  # type: ignore[arg-type]
        projections(rows, rows),
    )


@pytest.mark.parametrize("dropout", DROPOUTS, ids=["no dropout", "p=0.1", "p=0.5"])
def test_fewer_queries_than_keys(dropout: Dropout | None) -> None:
    """Row 0 of every item alone, as the last layer of a pooled head asks."""
    rows = rows_of(LENGTHS)
    more = {"q_rows": rows.first, "k_rows": rows, "heads": HEADS, "dropout": dropout}
    check(
        lambda **inputs: attention(**inputs, **more),  # type: ignore[arg-type]
        lambda **inputs: attention_torch(**inputs, **more),  # type: ignore[arg-type]
        lambda **inputs: attention_oracle(**inputs, **more),  # type: ignore[arg-type]
        projections(rows.first, rows),
    )


def test_row_0_alone_is_row_0_of_all() -> None:
    rows, dropout = rows_of(LENGTHS), DROPOUTS[1]
    q, k, v = projections(rows, rows).values()
    whole = attention(q, k, v, rows, rows, HEADS, dropout)
    first = attention(q[rows.starts], k, v, rows.first, rows, HEADS, dropout)
    torch.testing.assert_close(first, whole[rows.starts], rtol=0, atol=1e-6)


def test_an_item_does_not_see_its_neighbours() -> None:
    rows, dropout = rows_of([5, 70, 3]), DROPOUTS[1]
    q, k, v = projections(rows, rows).values()
    together = attention(q, k, v, rows, rows, HEADS, dropout)[5:75]
    alone = Rows(torch.tensor([0, 70], dtype=torch.int32), 70, 70, rows.item_key[1:2])
    torch.testing.assert_close(
        attention(q[5:75], k[5:75], v[5:75], alone, alone, HEADS, dropout), together, rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("dropout", DROPOUTS[:2], ids=["no dropout", "p=0.1"])
def test_gradients(dropout: Dropout | None) -> None:
    rows = rows_of([1, 3, 2])
    inputs = {name: value[:, :4] for name, value in projections(rows, rows).items()}
    gradients_are_right(lambda q, k, v: attention(q, k, v, rows, rows, 2, dropout), inputs)
