"""The ops that a profile tells apart: where each is called, and how much work a call is.

Work is counted from shapes, as in `bench.kernel_case`: bytes are the least possible, each input read once and each output
written once; FLOPs are those of products, two for a multiplication and an addition. What torch computes beside these ops
is counted as it passes through torch's dispatcher (`bench.profile_count`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from bench.kernel_case import bytes_of
from kernels.rows import Rows


@dataclass(frozen=True)
class Cost:
    """The least work of a call."""

    bytes: int = 0
    flops: int = 0
    cold: int = 0
    """Of the bytes, those of weights, their gradients and the optimizer's state: what a step passes through but once, so that
    caches hold them only where they hold all of them."""

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.bytes + other.bytes, self.flops + other.flops, self.cold + other.cold)


Arguments = Mapping[str, Any]
Kept = dict[int, Any]
"""What a forward leaves for counting its backward, by the identity of what it gave it."""
Count = Callable[[Arguments, Any, Kept], Cost]
"""(arguments of the call by name, its result, what forwards have left) -> the work of it."""


@dataclass(frozen=True)
class Op:
    """`owner` is a module, or a class of a module; a function of a module is also found where others have imported it."""

    name: str
    owner: str
    attribute: str
    work: Count | None
    """None: counted by the torch ops within it."""
    key: str | None = None
    """The attribute is a table of functions, and this is the function's key."""


def _bytes(*tensors: Tensor | None) -> int:
    return bytes_of(*(x for x in tensors if x is not None))


def _project(a: Arguments, y: Tensor, _: Kept) -> Cost:
    return Cost(_bytes(a["x"], a["w"], a["bias"], y), 2 * len(a["x"]) * a["w"].numel(), _bytes(a["w"]))


def _input_gradient(a: Arguments, dx: Tensor, _: Kept) -> Cost:
    """With a `dx` that is added to, it is read as well."""
    return Cost(_bytes(a["dy"], a["w"], a["dx"], dx), 2 * len(a["dy"]) * a["w"].numel(), _bytes(a["w"]))


def _weight_gradient(a: Arguments, _: None, __: Kept) -> Cost:
    moved = _bytes(a["dy"], a["x"], a["out"], a["bias_out"])
    return Cost(moved, 2 * len(a["dy"]) * a["out"].numel(), _bytes(a["out"]))


def _gelu_product(a: Arguments, out: Tensor, _: Kept) -> Cost:
    moved = _bytes(a["x"], a["w"], a["bias"], a["y"], out)
    return Cost(moved, 2 * len(a["x"]) * a["w"].numel(), _bytes(a["w"]))


def _gelu_gradient_product(a: Arguments, out: Tensor, _: Kept) -> Cost:
    """`inner` is read, and overwritten by the activation."""
    moved = _bytes(a["dy"], a["w"], a["bias"], a["inner"], a["inner"], out)
    return Cost(moved, 2 * len(a["dy"]) * a["w"].numel(), _bytes(a["w"]))


def attending(q: Rows, k: Rows, width: int, size: int) -> tuple[Cost, Cost]:
    """(forward, backward) of one direction: q, k, v and the context; and these, their gradients, and scores made again."""
    product = 2 * int((q.lengths * k.lengths).sum()) * width
    of_q, of_k = (rows.total * width * size for rows in (q, k))
    return Cost(2 * of_q + 2 * of_k, 2 * product), Cost(3 * of_q + 4 * of_k, 5 * product)


def _attention(a: Arguments, result: tuple, kept: Kept) -> Cost:
    q, saved = a["q"], result[-1]
    forward, kept[id(saved)] = attending(a["q_rows"], a["k_rows"], q.shape[1], q.element_size())
    return forward


def _coattention(a: Arguments, result: tuple, kept: Kept) -> Cost:
    q, text, image = a["text"][0], a["text_rows"], a["image_rows"]
    there, back = (attending(*rows, q.shape[1], q.element_size()) for rows in ((text, image), (image, text)))
    kept[id(result[-1])] = there[1] + back[1]
    return there[0] + back[0]


def _of_forward(a: Arguments, _: None, kept: Kept) -> Cost:
    work: Cost = kept.pop(id(a["saved"]))
    return work


def _layernorm(a: Arguments, result: tuple, _: Kept) -> Cost:
    return Cost(_bytes(*(a[name] for name in ("x", "bias", "residual", "weight", "shift")), result[0]))


def _layernorm_gradient(a: Arguments, _: None, __: Kept) -> Cost:
    """x, residual and dy to two gradients of their size; three vectors, two of them also read: bias and weight."""
    vectors = _bytes(a["dbias"], a["dweight"], a["dshift"])
    return Cost(_bytes(a["dy"]) * 3 + _bytes(a["dx"], a["dresidual"]) + vectors + _bytes(a["dbias"], a["dweight"]))


def _gelu(a: Arguments, y: Tensor, _: Kept) -> Cost:
    return Cost(_bytes(a["x"], a["bias"], y))


def _gelu_gradient(a: Arguments, _: None, __: Kept) -> Cost:
    return Cost(_bytes(*(a[name] for name in ("dy", "x", "bias", "dx", "dbias", "y"))))


_EMBEDDED = ("x", "feature_bias", "boxes", "location_weight", "location_bias", "weight", "shift")


def _region_embedding(a: Arguments, y: Tensor, _: Kept) -> Cost:
    """Boxes have five values: as many multiplications a value."""
    return Cost(_bytes(*(a[name] for name in _EMBEDDED), y), 10 * y.numel())


def _region_embedding_gradient(a: Arguments, gradients: tuple, _: Kept) -> Cost:
    dy, inputs = a["dy"], a["ctx"].saved_tensors[: len(_EMBEDDED)]
    return Cost(_bytes(dy, *inputs, *(x for x in gradients if isinstance(x, Tensor))), 20 * dy.numel())


def _drop(a: Arguments, y: Tensor, _: Kept) -> Cost:
    return Cost(0 if a["dropout"] is None else _bytes(a["x"], y))


def _drop_gradient(a: Arguments, gradients: tuple, _: Kept) -> Cost:
    return Cost(_bytes(a["dy"], gradients[0]))


def _answers(a: Arguments, _: tuple, __: Kept) -> Cost:
    return Cost(_bytes(*(a[name] for name in ("logits", "offsets", "labels", "scores"))))


def _answers_gradient(_: Arguments, gradients: tuple, __: Kept) -> Cost:
    return Cost(2 * _bytes(gradients[0]))


def _adamw(a: Arguments, _: None, __: Kept) -> Cost:
    """Master and moments are read and written."""
    moved = _bytes(a["gradient"], a["weights"]) + 2 * _bytes(a["master"], a["exp_avg"], a["exp_avg_sq"])
    return Cost(moved, cold=moved)


def _square_sum(a: Arguments, _: Tensor, __: Kept) -> Cost:
    moved = _bytes(a["gradient"])
    return Cost(moved, cold=moved)


def _add_rows(a: Arguments, _: None, __: Kept) -> Cost:
    """The whole table is written."""
    return Cost(_bytes(a["table"], a["ids"], a["rows"]), cold=_bytes(a["table"]))


OPS: tuple[Op, ...] = (
    Op("projection", "kernels.projection", "project", _project),
    Op("projection: input gradient", "kernels.projection", "input_gradient", _input_gradient),
    Op("projection: weight gradient", "kernels.projection", "weight_gradient", _weight_gradient),
    Op("projection + GELU", "kernels.projection", "NATIVE", _gelu_product, "gelu_forward"),
    Op("projection + GELU: gradient", "kernels.projection", "NATIVE", _gelu_gradient_product, "gelu_gradient"),
    Op("attention", "kernels.attention", "attention_forward", _attention),
    Op("attention: gradient", "kernels.attention", "attention_backward", _of_forward),
    Op("co-attention", "kernels.coattention", "coattention_forward", _coattention),
    Op("co-attention: gradient", "kernels.coattention", "coattention_backward", _of_forward),
    Op("dropout + residual + LayerNorm", "kernels.bias_dropout_residual_layernorm",
       "bias_dropout_residual_layernorm_forward", _layernorm),
    Op("dropout + residual + LayerNorm: gradient", "kernels.bias_dropout_residual_layernorm",
       "bias_dropout_residual_layernorm_backward", _layernorm_gradient),
    Op("GELU", "kernels.bias_gelu", "bias_gelu_forward", _gelu),
    Op("GELU: gradient", "kernels.bias_gelu", "bias_gelu_backward", _gelu_gradient),
    Op("region embedding", "kernels.region_embedding", "region_embedding", _region_embedding),
    Op("region embedding: gradient", "kernels.region_embedding._Function", "backward", _region_embedding_gradient),
    Op("dropout", "kernels.dropout", "drop", _drop),
    Op("dropout: gradient", "kernels.dropout._Drop", "backward", _drop_gradient),
    Op("answers' loss", "kernels.soft_label_bce", "soft_label_bce", _answers),
    Op("answers' loss: gradient", "kernels.soft_label_bce._Native", "backward", _answers_gradient),
    Op("answers' loss: gradient", "kernels.soft_label_bce._Triton", "backward", _answers_gradient),
    Op("masked rows' loss", "kernels.masked_rows", "masked_rows_loss", None),
    Op("word table: gradient", "engine.model.flat", "add_rows", _add_rows),
    Op("AdamW", "kernels.adamw", "adamw", _adamw),
    Op("gradient norm", "kernels.adamw", "square_sum", _square_sum),
)  # fmt: skip

COLLECTIVES = ("all_reduce", "reduce_scatter_tensor", "all_gather_into_tensor", "reduce_scatter_fn", "allgather_fn")
"""Of torch.distributed, and of DeepSpeed in front of it: phase `reduce`. What one of them leaves under way is not seen."""
