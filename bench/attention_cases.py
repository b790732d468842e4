"""Attention over one stream, and co-attention over both: with dropout as trained, and without, which torch's fused kernel
for CPUs asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from torch import Tensor

from bench import kernel_peers as peers
from bench.kernel_case import STREAMS, Call, Case, Function, Maker, Setting, Work, describe, dropout
from kernels.attention import attention
from kernels.coattention import coattention
from kernels.dropout import Dropout
from kernels.rows import Rows

_BRIDGE_WIDTH, _BRIDGE_HEADS = 1024, 8


def attention_cases(setting: Setting, make: Maker) -> Iterator[Case]:
    for stream, rows in make.streams(setting):
        width, heads, _ = STREAMS[stream]
        leaves = make.heads(rows, width)
        for p in _rates(setting):
            flash = partial(peers.flash_attention, q_rows=rows, k_rows=rows, heads=heads, p=p)
            others: dict[str, Callable[[], Call]] = {
                "torch": partial(_padded, peers.eager_attention, leaves, rows, heads, p),
                "sdpa": partial(_padded, peers.sdpa_attention, leaves, rows, heads, p),
                "flash_attn": partial(Call, flash, leaves),
            }
            ours = Call(partial(_attend, rows=rows, heads=heads, dropout=dropout(p, rows)), leaves)
            work = _work(rows, rows, width, leaves[0].element_size())
            shape, longest = describe(stream, rows, width, p), rows.max_seqlen
            yield Case("attention", setting.task, shape, make.dtype, work, ours, others, longest)


def coattention_cases(setting: Setting, make: Maker) -> Iterator[Case]:
    (_, text), (_, image) = make.streams(setting)
    rows, width = (text, image), _BRIDGE_WIDTH
    leaves = (*make.heads(text, width), *make.heads(image, width))
    size = leaves[0].element_size()
    ways = _work(text, image, width, size), _work(image, text, width, size)
    work = {mode: ways[0][mode] + ways[1][mode] for mode in ways[0]}
    for p in _rates(setting):
        others: dict[str, Callable[[], Call]] = {
            "torch": partial(_padded_bridge, peers.eager_attention, leaves, rows, p),
            "sdpa": partial(_padded_bridge, peers.sdpa_attention, leaves, rows, p),
            "flash_attn": partial(Call, partial(_flash_bridge, rows=rows, p=p), leaves),
        }
        shape = f"{describe('text', text, width)}; {describe('image', image, width, p)}"
        ours = Call(partial(_bridge, rows=rows, p=p), leaves)
        yield Case("coattention", setting.task, shape, make.dtype, work, ours, others, text.max_seqlen)


def _rates(setting: Setting) -> list[float]:
    return list(dict.fromkeys((setting.p, 0.0)))


def _work(q_rows: Rows, k_rows: Rows, width: int, size: int) -> dict[str, Work]:
    """Backward reads q, k, v and the context's gradient, makes the scores again, writes three gradients."""
    product = 2 * int((q_rows.lengths * k_rows.lengths).sum()) * width
    q, k = (rows.total * width * size for rows in (q_rows, k_rows))
    forward, backward = Work(2 * q + 2 * k, 2 * product), Work(3 * q + 4 * k, 5 * product)
    return {"forward": forward, "backward": backward, "both": forward + backward}


def _attend(q: Tensor, k: Tensor, v: Tensor, rows: Rows, heads: int, dropout: Dropout | None) -> Tensor:
    return attention(q, k, v, rows, rows, heads, dropout)


def _padded(function: Function, leaves: tuple[Tensor, ...], rows: Rows, heads: int, p: float) -> Call:
    bias = peers.padding_bias(rows, leaves[0].dtype)
    return Call(partial(function, bias=bias, heads=heads, p=p), tuple(_padded_leaf(x, rows) for x in leaves))


def _padded_leaf(x: Tensor, rows: Rows) -> Tensor:
    return peers.padded(x.detach(), rows).requires_grad_()


def _bridge(*leaves: Tensor, rows: tuple[Rows, Rows], p: float) -> tuple[Tensor, Tensor]:
    qt, kt, vt, qi, ki, vi = leaves
    return coattention((qt, kt, vt), (qi, ki, vi), *rows, _BRIDGE_HEADS, dropout(p, rows[0]), dropout(p, rows[0], 1))


def _padded_bridge(one_way: Function, leaves: tuple[Tensor, ...], rows: tuple[Rows, Rows], p: float) -> Call:
    text, image = rows
    text_bias, image_bias = (peers.padding_bias(of, leaves[0].dtype) for of in rows)

    def both_ways(
        qt: Tensor, kt: Tensor, vt: Tensor, qi: Tensor, ki: Tensor, vi: Tensor
    ) -> tuple[Tensor | tuple[Tensor, ...], ...]:
        return (
            one_way(qt, ki, vi, bias=image_bias, heads=_BRIDGE_HEADS, p=p),
            one_way(qi, kt, vt, bias=text_bias, heads=_BRIDGE_HEADS, p=p),
        )

    of = (text,) * 3 + (image,) * 3
    return Call(both_ways, tuple(_padded_leaf(x, r) for x, r in zip(leaves, of, strict=True)))  # type: ignore[arg-type]


def _flash_bridge(*leaves: Tensor, rows: tuple[Rows, Rows], p: float) -> tuple[Tensor, Tensor]:
    (qt, kt, vt, qi, ki, vi), (text, image) = leaves, rows
    return (
        peers.flash_attention(qt, ki, vi, text, image, _BRIDGE_HEADS, p),
        peers.flash_attention(qi, kt, vt, image, text, _BRIDGE_HEADS, p),
    )
