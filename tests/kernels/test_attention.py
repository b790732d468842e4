"""Self-attention against loops over items and heads in float64, on every backend of the device."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels.attention import HEAD_SHIFT, attention, attention_backward, attention_forward, attention_torch
from kernels.dropout import ATTENTION_TILE, Dropout
from kernels.rows import Rows
from tests.kernels import oracle
from tests.kernels.backends import HERE, bits_of, forced, in_float32
from tests.kernels.oracle import ALONE, LENGTHS, check, gradients_are_right, normal, rows_of
from tests.kernels.philox import keep_row

HEADS, WIDTH = 2, 16
DROPOUTS = [None, Dropout(0.1, 5, 6, 7), Dropout(0.5, 2**32 - 1, 2**32 - 2, 1)]
DROPPED = ["no dropout", "p=0.1", "p=0.5"]


@pytest.fixture(params=HERE, autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from forced(request.param)


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
                mask = keep(dropout, key, head, q1 - q0, k1 - k0).to(q.device)
                probabilities = probabilities * mask * dropout.scale
            of_heads.append(probabilities @ v[k0:k1, columns])
        contexts.append(torch.cat(of_heads, 1))
    return torch.cat(contexts)


def keep(dropout: Dropout, key: int, head: int, queries: int, width: int) -> Tensor:
    """[queries, width] of one item and head: rows are counted through the heads, columns cut into tiles of 64."""
    rows = [(head << HEAD_SHIFT) + row for row in range(queries)]
    d = dropout
    masks = [keep_row(d.seed, int(d.step), d.site, d.p, key, row, width, ATTENTION_TILE) for row in rows]
    return torch.stack([torch.from_numpy(mask) for mask in masks]).double()


def projections(q_rows: Rows, k_rows: Rows, width: int = WIDTH) -> dict[str, Tensor]:
    rows = {"q": q_rows, "k": k_rows, "v": k_rows}
    return {name: normal(of.total, width, seed=i) for i, (name, of) in enumerate(rows.items())}


def check_attention(
    q_rows: Rows, k_rows: Rows, dropout: Dropout | None, heads: int = HEADS, width: int = WIDTH
) -> None:
    def given(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda **inputs: function(**inputs, q_rows=q_rows, k_rows=k_rows, heads=heads, dropout=dropout)

    check(given(attention), given(attention_torch), given(attention_oracle), projections(q_rows, k_rows, width))


def in_one_dtype(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """From here on `check` is about this dtype alone."""
    within = {torch.float32: 1e-6, torch.float16: 5e-3, torch.bfloat16: 4e-2}
    monkeypatch.setattr(oracle, "WITHIN", {dtype: within[dtype]})


def mask_shown(rows: Rows, dropout: Dropout, dtype: torch.dtype, width: int = 128) -> tuple[Tensor, Tensor]:
    """The mask as the context shows it, and as the gradient of v does, both [rows, HEADS, width].

    All scores are equal; key j is the unit vector j, and so is the gradient of query j's context. So a context is 0 in
    column j where key j was dropped, and the gradient of key j's v in column i where query i dropped it.
    """
    unit = torch.eye(width, dtype=dtype, device=rows.cu_seqlens.device)[rows.row_index].repeat(1, HEADS)
    zeros = torch.zeros_like(unit)
    context, saved = attention_forward(zeros, zeros, unit, rows, rows, HEADS, dropout)
    dq, dk, dv = (torch.empty_like(unit) for _ in range(3))
    attention_backward(saved, unit, dq, dk, dv)
    return (context.view(-1, HEADS, width) != 0), (dv.view(-1, HEADS, width) != 0)


def check_mask(lengths: list[int], dropout: Dropout, dtype: torch.dtype) -> None:
    """Bit for bit, forward and backward."""
    rows = rows_of(lengths)
    forward, backward = mask_shown(rows, dropout, dtype)
    for item, (key, length) in enumerate(zip(rows.item_key.tolist(), lengths, strict=True)):
        at = slice(*rows.cu_seqlens[item : item + 2].tolist())
        for head in range(HEADS):
            expected = keep(dropout, key, head, length, length).bool().to(forward.device)
            assert torch.equal(forward[at, head, :length], expected)
            assert torch.equal(backward[at, head, :length], expected.T)


@pytest.mark.parametrize("dropout", DROPOUTS, ids=DROPPED)
@pytest.mark.parametrize("lengths", [LENGTHS, *ALONE, [9, 9, 9]], ids=str)
def test_against_the_oracle(lengths: list[int], dropout: Dropout | None) -> None:
    rows = rows_of(lengths)
    check_attention(rows, rows, dropout)


@pytest.mark.parametrize("dropout", DROPOUTS, ids=DROPPED)
def test_fewer_queries_than_keys(dropout: Dropout | None) -> None:
    """Row 0 of every item alone, as the last layer of a pooled head asks."""
    rows = rows_of(LENGTHS)
    check_attention(rows.first, rows, dropout)


@pytest.mark.parametrize("head_dim", [1, 5, 24, 64, 128])
def test_widths_of_a_head(head_dim: int) -> None:
    rows = rows_of([3, 70, 1])
    check_attention(rows, rows, DROPOUTS[1], heads=2, width=2 * head_dim)


def test_long_items() -> None:
    rows = rows_of([256, 1, 306])
    check_attention(rows, rows, DROPOUTS[1])


def test_in_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    in_one_dtype(monkeypatch, torch.float16)
    rows = rows_of([1, 63, 101])
    check_attention(rows, rows, DROPOUTS[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dropout", DROPOUTS[1:], ids=DROPPED[1:])
@pytest.mark.parametrize("lengths", [[1, 31, 8], [64, 3], [101, 65]], ids=str)
def test_the_mask_is_that_of_the_definition(lengths: list[int], dropout: Dropout, dtype: torch.dtype) -> None:
    check_mask(lengths, dropout, dtype)


def test_the_step_may_be_on_the_device() -> None:
    """As a captured CUDA graph needs it."""
    rows = rows_of([5, 33])
    q, k, v = (x.float() for x in projections(rows, rows).values())
    assert DROPOUTS[1] is not None
    on_device = replace(DROPOUTS[1], step=torch.tensor([6], device=q.device))
    told = attention(q, k, v, rows, rows, HEADS, DROPOUTS[1])
    assert torch.equal(attention(q, k, v, rows, rows, HEADS, on_device), told)


def test_row_0_alone_is_row_0_of_all() -> None:
    rows, dropout = rows_of(LENGTHS), DROPOUTS[1]
    q, k, v = (x.float() for x in projections(rows, rows).values())
    whole = attention(q, k, v, rows, rows, HEADS, dropout)
    first = attention(q[rows.starts], k, v, rows.first, rows, HEADS, dropout)
    torch.testing.assert_close(first, whole[rows.starts], rtol=0, atol=1e-6)


def test_an_item_does_not_see_its_neighbours() -> None:
    rows, dropout = rows_of([5, 70, 3]), DROPOUTS[1]
    q, k, v = (x.float() for x in projections(rows, rows).values())
    together = attention(q, k, v, rows, rows, HEADS, dropout)[5:75]
    alone = Rows(torch.tensor([0, 70], dtype=torch.int32, device=q.device), 70, 70, rows.item_key[1:2])
    torch.testing.assert_close(
        attention(q[5:75], k[5:75], v[5:75], alone, alone, HEADS, dropout), together, rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("dropout", DROPOUTS[:2], ids=DROPPED[:2])
def test_gradients(dropout: Dropout | None) -> None:
    rows = rows_of([1, 3, 2])
    inputs = {name: value[:, :4] for name, value in projections(rows, rows).items()}
    gradients_are_right(in_float32(lambda q, k, v: attention(q, k, v, rows, rows, 2, dropout)), inputs)


def test_gradients_are_written_in_place() -> None:
    """Into columns of one packed gradient, and nowhere else; the same bits as through autograd."""
    rows, dropout = rows_of([3, 70]), DROPOUTS[1]
    packed = torch.cat([x.bfloat16() for x in projections(rows, rows).values()], 1).requires_grad_()
    q, k, v = packed.chunk(3, 1)
    upstream = normal(rows.total, WIDTH, seed=7).bfloat16()
    context = attention(q, k, v, rows, rows, HEADS, dropout)
    context.backward(upstream)
    again, saved = attention_forward(q.detach(), k.detach(), v.detach(), rows, rows, HEADS, dropout)
    assert torch.equal(again, context)
    around = torch.full((rows.total, 3 * WIDTH + 2), 7.0, dtype=torch.bfloat16, device=packed.device)
    dq, dk, dv = around[:, 1:-1].chunk(3, 1)
    attention_backward(saved, upstream, dq, dk, dv)
    assert packed.grad is not None and torch.equal(around[:, 1:-1], packed.grad)
    assert torch.equal(around[:, [0, -1]], torch.full_like(around[:, :2], 7.0))


def results(lengths: list[int]) -> list[Tensor]:
    """The context, and the gradients of q, k and v."""
    rows = rows_of(lengths)
    leaves = [x.bfloat16().requires_grad_() for x in projections(rows, rows).values()]
    q, k, v = leaves
    context = attention(q, k, v, rows, rows, HEADS, DROPOUTS[1])
    context.backward(normal(rows.total, WIDTH, seed=7).bfloat16())
    return [context, *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def test_the_same_bits_on_any_number_of_threads() -> None:
    bits_of(lambda: results([33, 1, 70, 101]))


def test_a_context_dies_with_its_last_user() -> None:
    """What is kept for backward does not keep the output alive in a cycle, which only the collector would find."""
    rows = rows_of([3, 2])
    q, k, v = (x.float().requires_grad_() for x in projections(rows, rows).values())
    gc.disable()
    try:
        context = attention(q, k, v, rows, rows, HEADS)
        last = weakref.ref(context)
        del context
        assert last() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("backend", [name for name in HERE if name != "torch"], indirect=True)
def test_what_does_not_fit_is_refused(backend: str) -> None:
    """Kernels would read or write past an end."""
    rows = rows_of([3, 2])
    q, k, v = (x.float() for x in projections(rows, rows).values())
    for wrong, said in (
        ((q[:4], k, v, rows, rows, 2), "q has 4 rows, its items have 5"),
        ((q, k, v, rows, rows_of([5]), 2), "2 items ask, 1 items answer"),
        ((q, k[:, :8], v, rows, rows, 2), "widths 16, 8 and 16"),
        ((q, k, v, rows, rows, 3), "3 heads do not fit"),
        ((q, k.bfloat16(), v, rows, rows, 2), "differ in type"),
    ):
        with pytest.raises(ValueError, match=said):
            attention_forward(*wrong, None)
    _, saved = attention_forward(q, k, v, rows, rows, 2, None)
    for dk in (torch.empty(5, 8), torch.empty(5, 16, dtype=torch.bfloat16), torch.empty(16, 5).t()):
        with pytest.raises(ValueError, match="dk should be"):
            attention_backward(saved, q, torch.empty_like(q), dk.to(q.device), torch.empty_like(v))
