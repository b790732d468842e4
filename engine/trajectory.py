"""The golden folder's trajectory: rounds over its batches by the loop's own step, plainly or under DeepSpeed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from engine import deepspeed_config
from engine.golden import GoldenTask
from engine.model.randomness import Randomness
from engine.model.vilbert import ViLBERT
from engine.optimizer import Optimizer, OptimizerSettings
from engine.ranks import Ranks
from engine.slices import units
from engine.step import Plain, Stepper
from kernels.backends import interpreting
from pipelines.batch import Batch


def stages() -> tuple[int | None, ...]:
    """Who can step it here: nobody but us (None), and DeepSpeed at each ZeRO stage where it is installed.

    Not in Triton's interpreter, which takes a quarter of an hour for each, and runs the same kernels in all of them.
    """
    return (None, 0, 1, 2, 3) if find_spec("deepspeed") and not interpreting() else (None,)


def stepper(
    model: ViLBERT,
    rule: Mapping[str, Any],
    stage: int | None,
    ranks: Ranks | None = None,
    dtype: torch.dtype = torch.float32,
) -> Stepper:
    """The trajectory's optimizer, plain (no stage) or under DeepSpeed; the float32 model is brought to `dtype`."""
    exact = {} if dtype is torch.float32 else {p: p.detach().clone() for p in model.parameters()}
    model.to(dtype)
    settings = OptimizerSettings(betas=tuple(rule["betas"]), eps=rule["eps"], weight_decay=rule["weight_decay"])
    rates = dict.fromkeys(units(model), rule["lr"])
    device = next(model.parameters()).device
    if stage is None:
        optimizer = Optimizer(model, settings, rates)
        optimizer.take_masters(exact)
        return Plain(model, optimizer, device)
    from engine.sharded import Sharded  # DeepSpeed takes seconds to import

    ranks = ranks or Ranks()
    config = deepspeed_config.merged(
        deepspeed_config.read(f"zero{stage}"), precision=str(dtype).removeprefix("torch."), clip=0.0,
        world_size=ranks.world_size, device=device.type,
    )  # fmt: skip
    return Sharded(model, settings, rates, exact, config, ranks, device)


def run(
    model: ViLBERT, stepper: Stepper, rule: Mapping[str, Any], batches: Mapping[str, Batch], tasks: Iterable[GoldenTask]
) -> tuple[Tensor, dict[str, Tensor]]:
    """(this rank's addends of the losses along the way, float32 [steps]; `norm/<name>` of the weights afterwards, float64)."""
    heads = {task.name: task.head for task in tasks}
    losses = [
        stepper.step(
            [batches[name]], heads[name], loss_scale=rule["loss_scale"][name], lr_multiplier=1.0, random=Randomness()
        ).loss
        for name in rule["order"]
    ]
    with stepper.whole():
        return torch.stack(losses), {
            f"norm/{name}": after.detach().double().norm() for name, after in model.published()
        }
