"""The published AdamW by other projects' fused optimizers, for whoever chooses one by name: `kernels: {adamw: deepspeed}`.

Their rule decays beside the step; without bias correction and under the numbers of `kernels.adamw.decay_first` it is the
published one. They read float32 gradients and write no rounded weights, so both casts are passes of their own; and they know no
flag that holds a step back, so the host reads ours, for which a GPU has to finish first.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

_steppers = WeakTensorKeyDictionary()
"""Master -> the optimizer that steps it."""


def _deepspeed(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    adam = import_module("deepspeed.ops.adam")
    if parameters[0].is_cuda:
        return adam.FusedAdam(parameters, bias_correction=False, adam_w_mode=True)
    return adam.DeepSpeedCPUAdam(parameters, bias_correction=False, adamw_mode=True)


def _apex(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return import_module("apex.optimizers").FusedAdam(parameters, bias_correction=False, adam_w_mode=True)


OTHERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {"deepspeed": _deepspeed, "apex": _apex}


def step(
    name: str,
    gradient: Tensor,
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    weights: Tensor | None,
    skipped: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One step by the optimizer of this name. Tensors as in `kernels.adamw.adamw`; lr and weight_decay of a rule that decays
    beside the step."""
    if skipped.item():
        return
    optimizer = _stepper(name, master, exp_avg, exp_avg_sq)
    (group,) = optimizer.param_groups
    group.update(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
    (parameter,) = group["params"]
    parameter.grad = gradient.to(master.dtype)
    optimizer.step()
    parameter.grad = None
    if weights is not None:
        weights.copy_(master)


def _stepper(name: str, master: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> torch.optim.Optimizer:
    """The optimizer of a master, working on our moments."""
    known = _steppers.setdefault(master, {})
    if name not in known:
        parameter = nn.Parameter(master, requires_grad=False)
        optimizer = OTHERS[name]([parameter])
        optimizer.state[parameter] = {"step": 0}
        known[name] = optimizer
    (state,) = known[name].state.values()
    state.update(exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)  # whatever moments this call brings
    return known[name]
