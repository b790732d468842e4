"""The ops and their backends by name, for configurations and command lines. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping

BACKENDS = ("triton", "native", "torch")
OPS = (
    "attention",
    "coattention",
    "bias_gelu",
    "bias_dropout_residual_layernorm",
    "region_embedding",
    "soft_label_bce",
    "masked_region_loss",
    "masked_lm_loss",
    "dropout",
    "adamw",
)
"""Ops with an implementation of each kind."""
OTHERS = {"adamw": ("deepspeed", "apex"), "bias_dropout_residual_layernorm": ("apex",)}
"""What other projects have of an op, taken where it is asked for by name, and only then."""
PROJECTION = "projection"
"""Matrix products: a choice like an op's, but cuBLAS's and oneDNN's business, and ours on some CPUs only. Triton has no part in
them; a name for all ops at once leaves them to the rule, unless it is torch."""
CHOICES = (*OPS, PROJECTION)


def parse(text: str) -> dict[str, str]:
    """Backend by op from "torch" (all ops) or "attention=torch,adamw=native". ValueError names what is wrong."""
    text = text.strip()
    if not text:
        return {}
    if "=" not in text:
        return check(dict.fromkeys(CHOICES if text == "torch" else OPS, text))
    pairs = [part.partition("=")[::2] for part in text.split(",")]
    return check({op.strip(): backend.strip() for op, backend in pairs})


def check(overrides: Mapping[str, str]) -> dict[str, str]:
    """The same overrides; ValueError for an op or a backend that does not exist."""
    for op, backend in overrides.items():
        if op not in CHOICES:
            raise ValueError(f"no kernel op is called {op!r} (there are {', '.join(CHOICES)})")
        there_are = (*BACKENDS, *OTHERS.get(op, ()))
        if backend not in there_are:
            raise ValueError(f"{op}: no backend is called {backend!r} (there are {', '.join(there_are)})")
        if backend == "triton" and op == PROJECTION:
            raise ValueError(f"{op} has no triton backend (use torch: on a GPU that is cuBLAS)")
    return dict(overrides)
