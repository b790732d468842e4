"""The published AdamW over flat partitions, of which one step changes the trunk's values and those of one head (θs ∪ θt).

DeepSpeed flattens all parameters in a row and gives each rank a partition of them. There a head is no tensor of its own, so
the update rule is kept by slices: values of heads that did not run are not touched, nor are their moments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from engine.optimizer import OptimizerSettings, corrected
from engine.slices import Piece, Run, runs
from kernels.adamw import adamw, square_sum


class ShardedAdamW(torch.optim.Optimizer):
    """What `deepspeed.initialize` is given. It steps the float32 partitions that DeepSpeed puts into its groups.

    Before each step `begin` says which head ran. Until `settle` has told what a partition holds, nothing can be stepped.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        settings: OptimizerSettings,
        rates: Mapping[str, float],
        total: Callable[[Tensor], None],
    ) -> None:
        """`rates`: the base rate of each unit. `total` sums a tensor over the ranks, in place."""
        super().__init__([{"params": list(parameters)}], {"lr": rates["trunk"]})
        self.settings, self.rates = settings, dict(rates)
        self.steps = {unit: torch.zeros(1, dtype=torch.int64) for unit in rates}
        """How often each unit was stepped, on the host."""
        self.partitions: list[tuple[Tensor, list[Piece]]] = []
        self.grad_norm = self.skipped = torch.zeros(())
        """Of the last step, on the device, float32."""
        self._total = total
        self._norm: Callable[[], Any] | None = None
        self._runs: dict[int, list[Run]] = {}
        self._active: frozenset[str] = frozenset()
        self._multiplier = 1.0

    def settle(
        self, partitions: Sequence[Tensor], pieces: Sequence[list[Piece]], norm: Callable[[], Any] | None = None
    ) -> None:
        """From here on these are the partitions (float32, flat), and this is what they hold. Moments become zeros.

        `norm` gives the whole gradient's norm where somebody else takes it (negative if it is not finite); otherwise it is
        taken here, once a step, of the one partition that there is.
        """
        self.partitions, self._norm = list(zip(partitions, pieces, strict=True)), norm
        for partition, held in self.partitions:
            self._runs[id(partition)] = list(runs(held))
            self.state[partition] = {
                name: torch.zeros_like(partition, requires_grad=False) for name in ("exp_avg", "exp_avg_sq")
            }

    def begin(self, head: str, lr_multiplier: float) -> None:
        """The next step is of the trunk and this head."""
        self._multiplier = lr_multiplier
        zero_filled = self.settings.update == "zero_filled"
        others = {unit for unit, steps in self.steps.items() if steps} if zero_filled else set()
        self._active = frozenset({"trunk", head} | others)
        for unit in self._active:
            self.steps[unit] += 1

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step what lies in the groups now; DeepSpeed calls this once a partition."""
        for group in self.param_groups:
            for partition in group["params"]:
                if partition.grad is not None:
                    self._judge(partition, partition.grad)
                    self._step(partition, partition.grad)

    def _judge(self, partition: Tensor, gradient: Tensor) -> None:
        """A step whose gradient is not finite, on any rank, is skipped on all. Nothing is read on the host."""
        if self._norm is None:
            square = torch.zeros((), device=partition.device)
            for run in self._runs[id(partition)]:
                if run.unit in self._active:
                    square += square_sum(gradient[run.offset : run.offset + run.length])
            self._total(square)
            norm = square.sqrt()
        else:
            norm = torch.as_tensor(self._norm(), device=partition.device)
        self.grad_norm = norm.float()
        self.skipped = (~(torch.isfinite(self.grad_norm) & (self.grad_norm >= 0))).float()

    def _step(self, partition: Tensor, gradient: Tensor) -> None:
        s, state = self.settings, self.state[partition]
        for run in self._runs[id(partition)]:
            if run.unit not in self._active:
                continue
            lr, eps, share = corrected(s, self.rates[run.unit] * self._multiplier, int(self.steps[run.unit]))
            at = slice(run.offset, run.offset + run.length)
            adamw(
                gradient[at], partition.detach()[at], state["exp_avg"][at], state["exp_avg_sq"][at], None,
                lr=lr, betas=s.betas, eps=eps, weight_decay=s.weight_decay * share if run.decays else 0.0,
                skipped=self.skipped,
            )  # fmt: skip
