"""What this CPU's kernels take on the model's shapes, and whole steps of a model as wide and not as deep: some seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from torch import Tensor

from bench import lengths
from bench.batches import draw, pack
from bench.plan_cost import UPDATE_BYTES
from bench.plan_count import Counted
from bench.plan_model import Model
from engine.model.config import ModelConfig
from engine.model.published import PUBLISHED_HEADS
from engine.model.randomness import Randomness
from engine.model.vilbert import ViLBERT
from engine.optimizer import Optimizer, OptimizerSettings
from engine.slices import units
from engine.step import forward_backward
from engine.tasks import TaskRow, load_table
from kernels import huge_pages
from kernels.attention import attention_backward, attention_forward
from kernels.bias_dropout_residual_layernorm import (
    bias_dropout_residual_layernorm_backward,
    bias_dropout_residual_layernorm_forward,
)
from kernels.dropout import Dropout
from kernels.feed_forward import feed_forward_backward, feed_forward_forward
from kernels.projection import input_gradient, project, weight_gradient
from kernels.rows import Rows
from pipelines.batch import Batch

ROWS = (24, 96, 384, 1536)
"""Of the runs that kernels are measured on."""
_NARROW, _MORE_ROWS = 512, 6144
"""Models of layers that are this narrow see more rows in a step."""
_LAYERS = 4
"""So many layers take turns, so that none is found in a cache that a step would have flushed."""
_LENGTHS = (12, 101)
"""Rows of texts and of images."""
_SHALLOW = {
    "num_hidden_layers": 2, "v_num_hidden_layers": 2, "t_biattention_id": (1,), "v_biattention_id": (1,),
}  # fmt: skip
"""The model that whole steps are measured on: every kind of block, few of each."""
SMALL = {
    "vocab_size": 600, "hidden_size": 96, "intermediate_size": 96, "v_hidden_size": 96, "v_intermediate_size": 96,
    "bi_hidden_size": 96, "num_attention_heads": 4, "v_num_attention_heads": 4, "bi_num_attention_heads": 4,
}  # fmt: skip
"""So small that what its update takes is what a tensor takes, however few its values."""
TASKS = ("snli_ve", "refcoco")
"""One whose head reads pooled rows, and one whose head reads regions."""
_EXAMPLES, _MORE_EXAMPLES = (1, 4, 16), 64
_ROUNDS = 3


@dataclass(frozen=True)
class Sample:
    """One timed run."""

    kind: str
    calls: int
    flops: float
    bytes: float
    seconds: float
    counted: Counted | None = None
    """Of a whole step, in place of the numbers before."""


def kernels(config: ModelConfig, dtype: torch.dtype) -> list[Sample]:
    """Kernels alone, on the model's widths; seconds. Of the threads that torch has now."""
    found: list[Sample] = []
    widths = {
        (config.hidden_size, config.num_attention_heads, config.intermediate_size),
        (config.v_hidden_size, config.v_num_attention_heads, config.v_intermediate_size),
    }
    p = config.hidden_dropout_prob
    dropout = Dropout(p, 0, 1, 0) if p else None
    for width, heads, inner in sorted(widths):
        layers = [_Layer(width, inner, dtype) for _ in range(_LAYERS)]
        for rows in (*ROWS, _MORE_ROWS) if width < _NARROW else ROWS:
            found.append(_products(layers, rows))
            found.append(_layernorm(layers[0], rows, dropout))
            found += [_attention(width, heads, rows, length, dtype, dropout) for length in _LENGTHS]
    return found + _other(dtype)


class Steps:
    """Whole steps of a model as wide as a configuration's and not as deep, forward and backward apart from the update."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, isa: str) -> None:
        self._rows = [load_table().row(name) for name in TASKS]
        heads = {row.head: PUBLISHED_HEADS[row.head] for row in self._rows}
        self._examples = (*_EXAMPLES, _MORE_EXAMPLES) if config.hidden_size < _NARROW else _EXAMPLES
        sizes = [config.model_copy(update=_SHALLOW)]
        if config.hidden_size >= _NARROW:
            sizes.append(sizes[0].model_copy(update=SMALL))
        self._models = []
        for size in sizes:
            model = ViLBERT(size, heads)
            model.initialise(0)
            optimizer = Optimizer(model.to(dtype), OptimizerSettings(), dict.fromkeys(units(model), 1e-5))
            self._models.append((size, model, optimizer, Model(size, heads, dtype, isa)))

    def samples(self, dtype: torch.dtype) -> list[Sample]:
        """One pass; a second or two. What the small model's steps take says nothing of wide ones: only its update counts.

        No step follows one like it: in a run other tasks, and the packing of batches, have had the caches in between.
        """
        cases = [
            _Case(place == 0, size, model, optimizer, twin, row, examples)
            for place, (size, model, optimizer, twin) in enumerate(self._models)
            for examples in (self._examples if place == 0 else self._examples[:1])
            for row in self._rows
        ]
        times: list[list[tuple[float, float]]] = [[] for _ in cases]
        for _ in range(1 + _ROUNDS):
            for case, seconds in zip(cases, times, strict=True):
                seconds.append(case.step(dtype))
        found = []
        for case, seconds in zip(cases, times, strict=True):
            step, update = (median(each) for each in zip(*seconds[1:], strict=True))
            counted = case.twin.count(case.batch(dtype), case.row.head)
            tensors = len(list(case.model.trunk.parameters()))
            found.append(Sample("adamw", tensors, 0, counted.gradients * UPDATE_BYTES["bfloat16"], update))
            if case.wide:
                found.append(Sample("steps", 0, 0, 0, step, counted))
        return found


@dataclass(frozen=True)
class _Case:
    """Steps of one size."""

    wide: bool
    size: ModelConfig
    model: ViLBERT
    optimizer: Optimizer
    twin: Model
    row: TaskRow
    examples: int

    def batch(self, dtype: torch.dtype) -> Batch:
        return pack(draw(self.row, lengths.load()[self.row.name], self.size, self.examples, (0, 0)), dtype)

    def step(self, dtype: torch.dtype) -> tuple[float, float]:
        """Seconds of forward and backward, and of the update."""
        batch = self.batch(dtype)
        started = time.perf_counter()
        results = forward_backward(self.model, self.row.head, 1.0, True, batch, Randomness(0, 1, training=True))
        half = time.perf_counter()
        self.optimizer.step(self.row.head, 1e-3, results[0])
        return half - started, time.perf_counter() - half


class _Layer:
    """Weights of a transformer layer, and memory for their gradients."""

    def __init__(self, width: int, inner: int, dtype: torch.dtype) -> None:
        def matrix(rows: int, columns: int) -> Tensor:
            return huge_pages.empty_like(torch.empty(rows, columns, dtype=dtype)).normal_(0, 0.02)

        self.width, self.inner = width, inner
        self.w = {"qkv": matrix(3 * width, width), "out": matrix(width, width)}
        self.w |= {"up": matrix(inner, width), "down": matrix(width, inner)}
        self.g = {name: huge_pages.empty_like(w).zero_() for name, w in self.w.items()}
        self.bias, self.dbias = torch.zeros(inner, dtype=dtype), torch.zeros(inner, dtype=dtype)
        self.vectors = [torch.ones(width, dtype=dtype) for _ in range(6)]


def _products(layers: Sequence[_Layer], rows: int) -> Sample:
    """All products of a layer, forward and backward, GELU included."""
    width, inner, dtype = layers[0].width, layers[0].inner, layers[0].bias.dtype
    x, dqkv = torch.randn(rows, width).to(dtype), torch.randn(rows, 3 * width).to(dtype)

    def run() -> None:
        for layer in layers:
            w, g = layer.w, layer.g
            project(x, w["qkv"])
            project(x, w["out"])
            _, activated = feed_forward_forward(x, w["up"], layer.bias, w["down"])
            feed_forward_backward(
                x, x, activated, w["up"], layer.bias, w["down"], torch.zeros_like(x), g["up"], layer.dbias, g["down"]
            )
            weight_gradient(x, x, g["out"])
            input_gradient(x, w["out"])
            weight_gradient(dqkv, x, g["qkv"])
            input_gradient(dqkv, w["qkv"])

    shapes = [(rows, 3 * width, width), (rows, width, width), (rows, inner, width), (rows, width, inner)]
    flops = sum(3 * 2 * m * n * k for m, n, k in shapes)
    moved = sum(3 * (m * n + n * k + m * k) for m, n, k in shapes) * dtype.itemsize
    n = len(layers)
    return Sample("products", 12 * n, n * flops, n * moved, _seconds(run))


def _layernorm(layer: _Layer, rows: int, dropout: Dropout | None) -> Sample:
    width, dtype = layer.width, layer.bias.dtype
    x, residual, dy, dx = (torch.randn(rows, width).to(dtype) for _ in range(4))
    bias, weight, shift, dbias, dweight, dshift = layer.vectors
    items = _rows(rows, rows)
    items.row_key, items.row_index  # noqa: B018 - kept from layer to layer

    def run() -> None:
        for _ in range(_LAYERS):
            _, saved = bias_dropout_residual_layernorm_forward(x, bias, residual, weight, shift, items, dropout)
            bias_dropout_residual_layernorm_backward(saved, dy, dx, residual, dbias, dweight, dshift)

    return Sample("layernorm", 2 * _LAYERS, 0, _LAYERS * 8 * rows * width * dtype.itemsize, _seconds(run))


def _attention(width: int, heads: int, rows: int, length: int, dtype: torch.dtype, dropout: Dropout | None) -> Sample:
    """Items of `length` rows, each reading itself."""
    items = _rows(rows, length)
    qkv, dqkv = (torch.randn(rows, 3 * width).to(dtype) for _ in range(2))
    dcontext = torch.randn(rows, width).to(dtype)
    q, k, v = qkv.split(width, 1)

    def run() -> None:
        for _ in range(_LAYERS):
            _, saved = attention_forward(q, k, v, items, items, heads, dropout)
            attention_backward(saved, dcontext, *dqkv.split(width, 1))

    flops = _LAYERS * 7 * 2 * rows * rows * width // items.n
    return Sample("attention", 2 * _LAYERS, flops, _LAYERS * 12 * rows * width * dtype.itemsize, _seconds(run))


def _rows(rows: int, length: int) -> Rows:
    items = max(rows // length, 1)
    ends = torch.linspace(0, rows, items + 1).round().int()
    return Rows(ends, rows, int(ends.diff().max()), torch.arange(items))


def _other(dtype: torch.dtype) -> list[Sample]:
    """Small ops of torch with autograd's nodes; and large ones, which copy."""
    small = torch.ones(16, 16, requires_grad=True)

    def chain() -> None:
        x = small
        for _ in range(20):
            x = x * 1.5
        x.sum().backward()

    found = [Sample("other", 42, 0, 42 * 2 * small.nbytes, _seconds(chain))]
    for rows in (1000, 8000):
        large, order = torch.zeros(rows, 1024, dtype=dtype), torch.randperm(rows)
        found.append(Sample("other", 1, 0, 2 * large.nbytes, _seconds(partial(large.index_select, 0, order))))
    return found


def _seconds(run: Callable[[], object]) -> float:
    """Median of some calls, after one."""
    run()
    found = []
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        run()
        found.append(time.perf_counter() - started)
    return median(found)
