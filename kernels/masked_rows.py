"""What the losses of masked rows share: rows projected to many classes, each compared with a target, in bounded memory.

    loss = (1 / m) Σ_r Σ_c t_rc (log t_rc − log softmax(h_r W ᵀ + b)_c)

The target is a distribution [m, C] (masked regions), or a label [m], which is the distribution that has all its mass on one
class (masked words: the divergence is then the cross-entropy). With top_r = max_c z_rc and mass_r = Σ_c t_rc,

    loss_r = Σ_c t (log t − (z − top)) + mass · log Σ_c exp(z − top),        dz = mass · softmax(z) − t

so logits need not be stored, and what has their size is made for a chunk of rows at a time:

- Triton (`masked_rows_triton.py`): a program computes one tile of logits and leaves four numbers a row of it; a second kernel
  puts those together in order. Backward computes the tiles again, writes dz for a chunk of rows, and leaves the rest to two
  plain products. Where rows are few (`KEPT_LOGITS`) forward keeps the logits, and backward overwrites them with dz. A second
  backward makes them again.
- Native: logits of a chunk of rows are overwritten by their dz, which goes into the gradients at once, in forward: no product
  is done twice. Backward scales them. A second backward through the same graph makes them again.

Both give the same bits every time: sums over rows and classes have a fixed order, and there are no atomics.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import masked_rows_triton
from kernels.backends import choose
from kernels.masked_rows_triton import Kept, RowResults
from kernels.native_library import dtype_code, library, pointer
from kernels.projection import weight_gradient


class MaskedRows(NamedTuple):
    """hidden [m, width], or [n, width] with `rows`; weight [classes, width]; bias [classes]; target [m, classes] or
    int64 [m]."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    target: Tensor
    rows: Tensor | None

    @property
    def n_masked(self) -> int:
        """m."""
        return self.target.shape[0]

    def part(self, chunk: slice) -> MaskedRows:
        """The same for some of the masked rows; views only."""
        if self.rows is None:
            return self._replace(hidden=self.hidden[chunk], target=self.target[chunk])
        return self._replace(rows=self.rows[chunk], target=self.target[chunk])

    def gathered(self) -> Tensor:
        """hidden of the masked rows alone."""
        return self.hidden if self.rows is None else self.hidden.index_select(0, self.rows)


def _chunks(count: int, size: int) -> Iterator[slice]:
    return (slice(first, min(first + size, count)) for first in range(0, count, size))


# Triton

KEPT_LOGITS = 0.5
"""The Triton forward keeps the logits of fewer masked rows than this times the width, if a backward can follow. 0: never, and
no more logits exist at a time than `_DLOGITS_BYTES`. Shapes alone decide: the device is not waited for.

At 0.5, writing and reading them takes as many bytes as reading the weight once more to make them anew. With fewer rows they
save bytes and a product. Until the end of backward they take less than half of the weight's memory."""

_DLOGITS_BYTES = 2**26
"""Most memory that dlogits take in the Triton backward: some 20,000 rows of regions, 1,000 of words."""


class _Triton(torch.autograd.Function):
    """Gradients are made in backward, from logits that forward has kept or that are computed again."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, rows: Tensor | None, recording: bool
    ) -> Tensor:
        x = MaskedRows(hidden, weight, bias, target, rows)
        keep = recording and any(ctx.needs_input_grad) and x.n_masked < KEPT_LOGITS * hidden.shape[1]
        of_rows, kept = masked_rows_triton.row_results(x, keep)
        ctx.save_for_backward(*x, *of_rows)
        ctx.kept, ctx.keeps = kept, kept is not None
        return of_rows.loss.sum() / max(x.n_masked, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        x, of_rows = MaskedRows(*ctx.saved_tensors[:5]), RowResults(*ctx.saved_tensors[5:])
        kept, ctx.kept = ctx.kept, None
        if ctx.keeps and kept is None:  # an earlier backward through this graph has overwritten them
            _, kept = masked_rows_triton.row_results(x, keep=True)
        gradients = _computed_again(x, of_rows, dloss) if kept is None else _from_kept(x, of_rows, kept, dloss)
        del kept  # its memory is free when the gradient of all rows is made
        found = gradients.finished(x, ctx.needs_input_grad, scattered=masked_rows_triton.scattered)
        return (*found, None, None, None)


def _from_kept(x: MaskedRows, of_rows: RowResults, kept: Kept, dloss: Tensor) -> _Gradients:
    m = x.n_masked
    gradients = _Gradients(x, m)
    dlogits = masked_rows_triton.kept_gradients(x.target, of_rows, kept, dloss, 1 / m, gradients.bias)
    gradients.add_products(slice(0, m), kept.hidden, dlogits, x.weight)
    return gradients


def _computed_again(x: MaskedRows, of_rows: RowResults, dloss: Tensor) -> _Gradients:
    m, classes = x.n_masked, len(x.weight)
    stride = masked_rows_triton.stride_of(classes)
    step = masked_rows_triton.TILES[x.hidden.dtype].rows
    size = max(_DLOGITS_BYTES // (stride * x.hidden.element_size() * step), 1) * step
    memory = x.hidden.new_empty((min(size, m), stride))
    gradients = _Gradients(x, size)
    for chunk in _chunks(m, size):
        part = x.part(chunk)
        dlogits = memory[: part.n_masked, :classes]
        masked_rows_triton.logit_gradients(part, of_rows.part(chunk), dloss, 1 / m, dlogits, gradients.bias)
        gradients.add_products(chunk, part.gathered(), dlogits, x.weight)
    return gradients


# Native

_ROW_BYTES = 1024
"""Bytes that one column of a chunk of logits takes: 256 rows of float32, 512 of bfloat16. Fewer save memory, but the weight's
gradient is read and written once a chunk."""


class _Native(torch.autograd.Function):
    """Gradients are made in forward, where logits are at hand."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, rows: Tensor | None, recording: bool
    ) -> Tensor:
        x = MaskedRows(hidden, weight, bias, target, rows)
        ctx.save_for_backward(*x)
        ctx.gradients = _Gradients(x, _native_rows(x)) if recording and any(ctx.needs_input_grad) else None
        return _native_pass(x, ctx.gradients)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        x = MaskedRows(*ctx.saved_tensors)
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:  # an earlier backward through this graph has used them up
            gradients = _Gradients(x, _native_rows(x))
            _native_pass(x, gradients)
        return (*gradients.finished(x, ctx.needs_input_grad, dloss / max(x.n_masked, 1)), None, None, None)


def _native_rows(x: MaskedRows) -> int:
    return _ROW_BYTES // x.hidden.element_size()


def _native_pass(x: MaskedRows, gradients: _Gradients | None) -> Tensor:
    """The loss; adds the gradients of m * loss where they are wanted."""
    losses = torch.empty(x.n_masked)
    size = _native_rows(x)
    memory = x.hidden.new_empty((min(size, x.n_masked), len(x.weight)))
    for chunk in _chunks(x.n_masked, size):
        part = x.part(chunk)
        hidden = part.gathered()
        logits = torch.mm(hidden, x.weight.t(), out=memory[: part.n_masked])
        _compare(logits, part, losses[chunk], gradients)
        if gradients is not None:
            gradients.add_products(chunk, hidden, logits, x.weight)
    return (losses.sum(dtype=torch.float64) / max(x.n_masked, 1)).float()


def _compare(logits: Tensor, x: MaskedRows, losses: Tensor, gradients: _Gradients | None) -> None:
    """losses [rows] of logits without bias. With gradients, logits become dlogits, whose column sums go to the bias."""
    arguments = [dtype_code(logits), *logits.shape, pointer(logits), pointer(x.bias)]
    outputs = [gradients is not None, pointer(losses), pointer(gradients.bias if gradients else None)]
    if x.target.dtype is torch.int64:
        library().stopgo_cross_entropy_rows(*arguments, pointer(x.target), 1.0, *outputs)
    else:
        library().stopgo_divergence_rows(*arguments, dtype_code(x.target), pointer(x.target), 1.0, *outputs)


# Both


def _scattered(source: Tensor, rows: Tensor, n: int) -> Tensor:
    """[n, width]: row rows[i] is row i of source, the others are 0."""
    return source.new_zeros((n, source.shape[1])).index_copy_(0, rows, source)


class _Gradients:
    """The gradients of hidden, weight and bias, while chunks of at most `size` rows are added to them."""

    def __init__(self, x: MaskedRows, size: int) -> None:
        self._hidden = x.hidden.new_empty((x.n_masked, x.hidden.shape[1]))
        # A sum over several chunks is kept in float32.
        summed = torch.float32 if x.n_masked > size else x.weight.dtype
        self._weight = (torch.empty_like if x.n_masked else torch.zeros_like)(x.weight, dtype=summed)
        self.bias = torch.zeros_like(x.bias, dtype=torch.float32)

    def add_products(self, chunk: slice, hidden: Tensor, dlogits: Tensor, weight: Tensor) -> None:
        """dlogits W and dlogitsᵀ h of a chunk of rows; the first chunk comes first."""
        torch.mm(dlogits, weight, out=self._hidden[chunk])
        first = chunk.start == 0
        if first and self._weight.dtype is hidden.dtype:
            weight_gradient(dlogits, hidden, self._weight)
        elif self._weight.dtype is hidden.dtype:
            self._weight.addmm_(dlogits.t(), hidden)
        else:
            for classes in _chunks(len(weight), _ADDED_CLASSES if weight.device.type == "cpu" else len(weight)):
                product = torch.empty_like(weight[classes])
                weight_gradient(dlogits[:, classes], hidden, product)
                (self._weight[classes].copy_ if first else self._weight[classes].add_)(product)

    def finished(
        self,
        x: MaskedRows,
        needed: Sequence[bool],
        factor: Tensor | None = None,
        scattered: Callable[[Tensor, Tensor, int], Tensor] = _scattered,
    ) -> tuple[Tensor | None, ...]:
        """Those of (hidden, weight, bias) that are needed, times a scalar, in their dtypes. Uses them up."""
        hidden = _scaled(self._hidden, factor, x.hidden.dtype) if needed[0] else None
        if hidden is not None and x.rows is not None:
            hidden = scattered(hidden, x.rows, len(x.hidden))
        weight = _scaled(self._weight, factor, x.weight.dtype) if needed[1] else None
        bias = _scaled(self.bias, factor, x.bias.dtype) if needed[2] else None
        return hidden, weight, bias


_ADDED_CLASSES = 256
"""On a CPU, products that are added to a float32 sum come in parts of so many classes: they take little memory, and stay in the
cache. On a GPU more launches would cost more than they save."""


def _scaled(x: Tensor, factor: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x * factor in another dtype; in place where it can be."""
    return (x if factor is None else x.mul_(factor)).to(dtype)


_FUNCTIONS = {"triton": _Triton, "native": _Native}


def masked_rows_loss(
    op: str,
    reference: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    rows: Tensor | None,
) -> Tensor:
    """The loss under the backend that `op` uses; `reference` is its plain torch one, of gathered rows. ValueError or
    IndexError for inputs that do not fit each other."""
    _check(hidden, weight, bias, target, rows)
    backend = choose(op, hidden)
    if backend == "torch":
        return reference(hidden if rows is None else hidden.index_select(0, rows), weight, bias, target)
    inputs = [x if x is None else x.contiguous() for x in (hidden, weight, bias, target, rows)]
    loss: Tensor = _FUNCTIONS[backend].apply(*inputs, torch.is_grad_enabled())
    return loss


def _check(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, rows: Tensor | None) -> None:
    """The kernels read through bare pointers: what does not fit must not reach them."""
    classes, width = weight.shape
    m = len(hidden) if rows is None else len(rows)
    labels = target.dtype is torch.int64
    if hidden.shape[1:] != (width,) or bias.shape != (classes,) or target.shape != ((m,) if labels else (m, classes)):
        shapes = [tuple(x.shape) for x in (hidden, weight, bias, target)]
        raise ValueError(f"hidden, weight, bias and target do not fit each other: {shapes}, {m} masked rows")
    if not hidden.dtype == weight.dtype == bias.dtype:
        raise ValueError(f"one dtype for hidden, weight and bias, not {hidden.dtype}, {weight.dtype}, {bias.dtype}")
    if not labels and target.dtype not in masked_rows_triton.TILES:
        raise ValueError(f"a target of {target.dtype} is neither a distribution nor labels (int64)")
    if rows is not None and rows.dtype is not torch.int64:
        raise ValueError(f"rows are int64, not {rows.dtype}")
    if labels and m and target.device.type == "cpu" and not 0 <= int(target.min()) <= int(target.max()) < classes:
        raise IndexError(f"a label lies outside of the {classes} classes")
