"""`Sharded`: the model and its update rule under DeepSpeed. The only file of a run that imports it.

**All parameters are one group.** DeepSpeed flattens a group's parameters in a row, gives each rank a partition of the row,
and reduces and gathers a whole row at a time. θs ∪ θt is kept by slices of the row (`engine.sharded_adamw`): one bucket of
gradients, one gather a step, whatever the number of heads.

**Stage 3 takes the model for one leaf.** Its trace of modules is invalid as soon as another head runs, and blocks share
weights (the word table). The whole model is 268 M parameters, gathered at once in under 0.6 GB of bfloat16. An anchor, an input
that has a gradient, makes DeepSpeed take the leaf's gradients when backward is over.

**Recorded steps** (`engine.graphs`) are for stage 0, where DeepSpeed has no hooks in backward: gradients are reduced after it.

**fp16 and several GPUs have never run here**: DeepSpeed refuses fp16 on this kind of CPU. One rank on an H100 takes the golden
trajectory at every stage.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import Tensor, nn

from engine.deepspeed_config import stage_of
from engine.graphs import Graphs
from engine.losses import outcome
from engine.model.randomness import Randomness
from engine.model.vilbert import ViLBERT
from engine.optimizer import Optimizer, OptimizerSettings
from engine.ranges import span
from engine.ranks import Ranks, join_alone
from engine.sharded_adamw import ShardedAdamW
from engine.slices import Kept, Piece, contiguous_share, named_parameters, share_of_each
from engine.step import StepResult, addends, summed
from pipelines.batch import Batch
from pipelines.errors import BadInput


class _Whole(nn.Module):
    """What DeepSpeed calls forward of: the model, its head and its loss."""

    def __init__(self, model: ViLBERT) -> None:
        super().__init__()
        self.model = model

    def forward(self, anchor: Tensor, batch: Batch, head: str, random: Randomness, share: bool, scale: float) -> Any:
        """(loss to go back from, results of `engine.step.addends`)."""
        loss, results = addends(outcome(self.model, batch, head, random, share), batch)
        return _told_to_all(loss, scale) + anchor, results


def _forward_backward(model: ViLBERT, head: str, scale: float, share: bool, batch: Batch, random: Randomness) -> Tensor:
    """What a graph holds: see `engine.step.forward_backward`."""
    loss, results = addends(outcome(model, batch, head, random, share), batch)
    _told_to_all(loss, scale).backward()
    return results


def _told_to_all(loss: Tensor, scale: float) -> Tensor:
    """loss * scale. One that is not finite makes every gradient so, on whatever rank it is; 0 * loss is nothing otherwise."""
    return loss * (scale + 0 * loss.detach())


class Sharded:
    """See `engine.step.Stepper`."""

    def __init__(
        self,
        model: ViLBERT,
        settings: OptimizerSettings,
        rates: Mapping[str, float],
        exact: Mapping[nn.Parameter, Tensor],
        config: Mapping[str, Any],
        ranks: Ranks,
        device: torch.device,
        share: bool = True,
        graphs: Graphs | None = None,
    ) -> None:
        """`config`: of `engine.deepspeed_config.merged`. `exact`: float32 values of parameters that have been rounded.

        ValueError for `graphs` beyond stage 0.
        """
        self._deepspeed = deepspeed = _deepspeed(device)
        self._model, self._ranks, self._device, self._share = model, ranks, device, share
        self._named, self._rates = named_parameters(model), dict(rates)
        self.base_lr = rates["trunk"]
        self._stage, self.graphs = stage_of(config), graphs
        if graphs and self._stage:
            raise ValueError(f"stage {self._stage} reduces gradients by hooks, which a recorded backward has not")
        whole = _Whole(model)
        if self._stage == 0:
            self._plain: Optimizer | None = Optimizer(model, settings, rates)
            self._plain.take_masters(exact)
            stepped: _Adapter | ShardedAdamW = _Adapter(self._plain)
        else:
            self._plain = None
            if self._stage == 3:
                deepspeed.utils.set_z3_leaf_module(whole, True)
            masters = {named.key: exact[named.parameter].flatten() for named in self._named if named.parameter in exact}
            stepped = self._adamw = ShardedAdamW(
                [named.parameter for named in self._named], settings, self._rates, self._sum
            )
        try:
            self._engine, *_ = deepspeed.initialize(
                model=whole, optimizer=stepped, config=_within(config, model), dist_init_required=False
            )
        except ValidationError as error:
            raise BadInput(f"deepspeed: {error.title}", _first(error), "see DeepSpeed's list of keys") from None
        self._stepped = stepped
        if self._stage > 0:
            self._settle(masters)

    def step(
        self, batches: Sequence[Batch], head: str, *, loss_scale: float, lr_multiplier: float, random: Randomness
    ) -> StepResult:
        """See `Stepper`."""
        # DeepSpeed takes the mean over ranks, and the parts' shares want the sum.
        scale = loss_scale * self._ranks.world_size
        if self.graphs is None:
            results = self._walked(batches, head, random, scale)
        else:
            (batch,) = batches
            results = [self._replayed(self.graphs, batch, head, random, scale)]
        total = summed(results)
        with span("step"):
            grad_norm, skipped = self._update(head, lr_multiplier)
        for block in self._model.blocks():
            block.drop_gradients()
        return StepResult(total[0], total[1], grad_norm, skipped, total[2:])

    def _walked(self, batches: Sequence[Batch], head: str, random: Randomness, scale: float) -> list[Tensor]:
        """Forward and backward of each micro-batch; DeepSpeed reduces gradients as the last backward goes."""
        results = []
        for number, batch in enumerate(batches):
            self._engine.set_gradient_accumulation_boundary(number == len(batches) - 1)
            anchor = torch.zeros((), device=self._device, requires_grad=True)
            with span("copy"):
                batch = batch.to(self._device)
            loss, found = self._engine(anchor, batch, head, random, self._share, scale)
            with span("backward"):
                self._engine.backward(loss)
            results.append(found)
        return results

    def _replayed(self, graphs: Graphs, batch: Batch, head: str, random: Randomness, scale: float) -> Tensor:
        """Forward and backward in one launch; then what gradients there are, of the trunk and this head, are reduced."""
        key = head, scale, self._share
        with span("graph"):
            results = graphs.run(key, batch, random, partial(_forward_backward, self._model, *key))
        with span("reduce"):
            self._engine.set_gradient_accumulation_boundary(True)
            gradients = [named.parameter.grad for named in self._named if named.parameter.grad is not None]
            self._engine.buffered_allreduce_fallback(gradients)
        return results

    def whole(self) -> AbstractContextManager[object]:
        """See `Stepper`."""
        if self._stage < 3:
            return nullcontext()
        return self._deepspeed.zero.GatheredParameters([named.parameter for named in self._named])

    def state(self) -> list[Kept]:
        """See `Stepper`."""
        if self._plain is not None:
            return [Kept(key, 0, tensor, True) for key, tensor in self._plain.state_dict().items()]
        counts = [Kept(f"{unit}/steps", 0, count, True) for unit, count in self._adamw.steps.items()]
        return counts + [
            Kept(f"{piece.of.key}/{kind}", piece.start, piece.within(self._adamw.state[partition][kind]))
            for partition, pieces in self._partitions()
            for piece in pieces
            for kind in ("exp_avg", "exp_avg_sq")
        ]

    def weights(self) -> list[Kept]:
        """See `Stepper`."""
        if self._plain is not None:
            return [Kept(key, 0, value, True) for key, value in self._plain.masters().items()]
        return [
            Kept(piece.of.key, piece.start, piece.within(partition.detach()))
            for partition, pieces in self._partitions()
            for piece in pieces
        ]

    @torch.no_grad()
    def loaded(self) -> None:
        """See `Stepper`."""
        if self._plain is not None:
            self._plain.follow_masters()
            return
        zero = self._engine.optimizer
        if self._stage < 3:
            zero.update_lp_params()
            return
        for number in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(number)

    def _update(self, head: str, lr_multiplier: float) -> tuple[Tensor, Tensor]:
        """(grad_norm, skipped) of one optimizer step."""
        self._stepped.begin(head, lr_multiplier)
        self._engine.step()
        if getattr(self._engine.optimizer, "overflow", False):  # DeepSpeed looked, and skipped the step
            return torch.full((), float("inf"), device=self._device), torch.ones((), device=self._device)
        return self._stepped.grad_norm, self._stepped.skipped

    def _settle(self, exact: Mapping[str, Tensor]) -> None:
        """Learn what this rank's partitions hold, and give their masters what rounding took from the parameters."""
        zero, ranks = self._engine.optimizer, self._ranks
        if self._stage < 3:
            share = int(zero.partition_size[0])
            partitions = [zero.single_partition_of_fp32_groups[0]]
            pieces = [contiguous_share(self._named, ranks.rank * share, share)]
            in_order = zero.round_robin_bit16_groups[0]
            if [id(parameter) for parameter in in_order] != [id(named.parameter) for named in self._named]:
                raise RuntimeError("DeepSpeed has put the parameters in another order (round_robin_gradients)")
        else:
            by_parameter = {id(named.parameter): named for named in self._named}
            partitions = list(zero.fp32_partitioned_groups_flat)
            pieces = [
                share_of_each([by_parameter[id(parameter)] for parameter in group], ranks.rank, ranks.world_size)
                for group in zero.fp16_groups
            ]
        own_norm = self._stage < 3 and not zero.compute_grad_norm
        self._adamw.settle(partitions, pieces, None if own_norm else lambda: zero._global_grad_norm)
        for kept in self.weights():
            if kept.key in exact:
                kept.values.copy_(exact[kept.key][kept.start : kept.start + kept.values.numel()])

    def _partitions(self) -> list[tuple[Tensor, list[Piece]]]:
        return self._adamw.partitions

    def _sum(self, values: Tensor) -> None:
        dist.all_reduce(values)


class _Adapter(torch.optim.Optimizer):
    """Our optimizer as one of torch's, whose gradients DeepSpeed reduces and whose step it calls (stage 0)."""

    def __init__(self, optimizer: Optimizer) -> None:
        parameters = [parameter for unit in optimizer.units.values() for parameter in unit.parameters]
        super().__init__([{"params": parameters}], {"lr": 0.0})
        self._optimizer, self._head, self._multiplier = optimizer, "", 1.0
        self.grad_norm = self.skipped = torch.zeros(())

    def begin(self, head: str, lr_multiplier: float) -> None:
        """The next step is of the trunk and this head."""
        self._head, self._multiplier = head, lr_multiplier

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """See `Optimizer.step`; what is not finite is in the gradients."""
        nothing = torch.zeros((), device=self.param_groups[0]["params"][0].device)
        self.grad_norm, self.skipped = self._optimizer.step(self._head, self._multiplier, nothing)


def _first(error: ValidationError) -> str:
    """The first thing that DeepSpeed finds wrong in its configuration."""
    found = error.errors()[0]
    return f"{'.'.join(map(str, found['loc']))}: {found['msg']}"


def _within(config: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """The same, with a bucket of no more values than the model has: DeepSpeed allocates it whole, 2 GB where it has its way."""
    zero = dict(config.get("zero_optimization", {}))
    if "reduce_bucket_size" in zero:
        zero["reduce_bucket_size"] = min(int(zero["reduce_bucket_size"]), sum(p.numel() for p in model.parameters()))
    return {**config, "zero_optimization": zero}


def _deepspeed(device: torch.device) -> Any:
    """The package, with what it would do on import or start put right."""
    if find_spec("deepspeed") is None:
        raise BadInput(
            "backend: deepspeed", "DeepSpeed is not installed", "make setup, or one process and backend: plain"
        )
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    # It calls collectives by names that torch is about to drop, and torch says so at every step.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(os.environ.get("DS_LOG_LEVEL", "error").upper())  # it tells of every buffer
    logging.getLogger("DeepSpeed").propagate = False
    # A C++ extension that only inference uses, compiled for 20 s at the first start on a CPU.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    join_alone()
    deepspeed.init_distributed(dist_init_required=False)
    return deepspeed
