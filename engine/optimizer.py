"""The update rule θs ∪ θt (paper Algorithm 1) over few flat parameters.

The published AdamW (spec section 4.4), which divides by no bias correction and decays after the step:

    m = β1 m + (1 − β1) g,   v = β2 v + (1 − β2) g²,   θ ← θ − lr m / (√v + eps),   θ ← θ − lr λ θ

is torch's fused AdamW, which decays before the step, under other numbers: with the step counter pinned where both bias
corrections are exactly 1, lr' = lr (1 − lr λ) and λ' = lr λ / lr' give the same update.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.model.flat import FlatBlock
from engine.model.vilbert import ViLBERT

_NO_CORRECTION_STEP = 1e9
"""1 − β ** 1e9 is exactly 1, and adding 1 to a float32 of this size changes nothing."""


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW as published. `update`: "live" leaves heads that did not run alone (their moments too), "zero_filled" steps
    every head that has ever run, with zero gradients, as the authors' code does."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    weight_decay: float = 0.01
    update: str = "live"


class Optimizer:
    """Steps the trunk whole and, of the heads, the one that ran. Parameters in bfloat16 get float32 master copies."""

    def __init__(
        self,
        model: ViLBERT,
        settings: OptimizerSettings,
        base_lr: float,
        head_lr: float | Mapping[str, float] | None = None,
    ) -> None:
        """`head_lr`: one rate for all heads, or one by head name (base_lr where it says nothing)."""
        self.settings = settings
        self.units = {"trunk": _Unit(model.trunk, settings, base_lr)}
        for name, head in model.heads.items():
            lr = head_lr.get(name, base_lr) if isinstance(head_lr, Mapping) else head_lr
            self.units[name] = _Unit(head, settings, base_lr if lr is None else lr)
        if model.pretraining is not None:
            self.units["pretraining"] = _Unit(model.pretraining, settings, base_lr)
        self._started: set[str] = set()

    def step(self, head: str, lr_multiplier: float, loss: Tensor) -> tuple[Tensor, Tensor]:
        """One update after `backward`. Returns (grad_norm, skipped), both on the device, float32 scalars.

        Trunk parameters without a gradient count as zeros. Where the loss or any gradient is not finite, nothing changes
        and `skipped` is 1; the decision stays on the device.
        """
        units = [self.units["trunk"], self.units[head]]
        if self.settings.update == "zero_filled":
            self._started.add(head)
            units = [unit for name, unit in self.units.items() if name == "trunk" or name in self._started]
        gradients = [gradient for unit in units for gradient in unit.gradients()]
        norms = torch.stack(torch._foreach_norm([gradient.float() for gradient in gradients]))
        grad_norm = norms.norm()
        skipped = (~torch.isfinite(grad_norm + loss.detach())).float()
        for unit in units:
            unit.step(lr_multiplier, skipped)
        return grad_norm, skipped

    def take_masters(self, exact: Mapping[nn.Parameter, Tensor]) -> None:
        """Start the float32 masters from what each parameter was before it was rounded to bfloat16."""
        for unit in self.units.values():
            unit.take_masters(exact)

    def masters(self) -> dict[nn.Parameter, Tensor]:
        """The float32 master of every bfloat16 parameter."""
        return {
            parameter: master
            for unit in self.units.values()
            for parameter, master in zip(unit.parameters, unit.masters, strict=True)
            if master is not parameter
        }

    def state_dict(self) -> dict[str, Tensor]:
        """Moments and masters by unit and parameter name; plain tensors, for safetensors."""
        state = {f"{name}/{key}": value for name, unit in self.units.items() for key, value in unit.state().items()}
        for name in sorted(self._started):
            state[f"{name}/started"] = torch.ones(1)
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Bit for bit what `state_dict` gave; KeyError for a state of other parameters."""
        self._started = {key.partition("/")[0] for key in state if key.endswith("/started")}
        for name, unit in self.units.items():
            unit.load({key.partition("/")[2]: value for key, value in state.items() if key.startswith(f"{name}/")})


class _Unit:
    """What is stepped together: the trunk, or one head. Two groups: matrices decay, vectors do not."""

    def __init__(self, module: nn.Module, settings: OptimizerSettings, lr: float) -> None:
        self.lr, self.settings = lr, settings
        blocks = [(name, block) for name, block in module.named_modules() if isinstance(block, FlatBlock)]
        self.names = [f"{name}.{kind}".lstrip(".") for kind in ("matrices", "vectors") for name, _ in blocks]
        matrices, vectors = [block.matrices for _, block in blocks], [block.vectors for _, block in blocks]
        self.parameters: list[nn.Parameter] = matrices + vectors
        self.masters = [
            parameter if parameter.dtype is torch.float32 else nn.Parameter(parameter.detach().float())
            for parameter in self.parameters
        ]
        self._zeros: dict[int, Tensor] = {}
        groups = [
            {"params": self.masters[: len(matrices)], "weight_decay": settings.weight_decay},
            {"params": self.masters[len(matrices) :], "weight_decay": 0.0},
        ]
        self.adamw = torch.optim.AdamW(groups, lr=lr, betas=settings.betas, eps=settings.eps, fused=True)
        for master in self.masters:
            self.adamw.state[master] = {
                "step": torch.tensor(_NO_CORRECTION_STEP, dtype=torch.float32, device=master.device),
                "exp_avg": torch.zeros_like(master),
                "exp_avg_sq": torch.zeros_like(master),
            }

    def gradients(self) -> list[Tensor]:
        """The gradient of every parameter, zeros where none arrived; left on the parameters for `step`."""
        for i, parameter in enumerate(self.parameters):
            if parameter.grad is None:
                if i not in self._zeros:
                    self._zeros[i] = torch.zeros_like(parameter)
                parameter.grad = self._zeros[i]
        return [parameter.grad for parameter in self.parameters]  # type: ignore[misc]

    @torch.no_grad()
    def step(self, lr_multiplier: float, skipped: Tensor) -> None:
        lr = self.lr * lr_multiplier
        matrices, vectors = self.adamw.param_groups
        decayed = lr * (1 - lr * self.settings.weight_decay)
        matrices["lr"], vectors["lr"] = decayed, lr
        matrices["weight_decay"] = lr * self.settings.weight_decay / decayed if decayed else 0.0
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if master is not parameter:
                assert parameter.grad is not None
                master.grad = parameter.grad.float()
        self.adamw.found_inf = skipped  # type: ignore[attr-defined]  # torch's fused step changes nothing where it is 1
        self.adamw.step()
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if master is not parameter:
                parameter.copy_(master)
                master.grad = None
            parameter.grad = None

    def state(self) -> dict[str, Tensor]:
        tensors = {}
        for name, parameter, master in zip(self.names, self.parameters, self.masters, strict=True):
            tensors[f"{name}/exp_avg"] = self.adamw.state[master]["exp_avg"]
            tensors[f"{name}/exp_avg_sq"] = self.adamw.state[master]["exp_avg_sq"]
            if master is not parameter:
                tensors[f"{name}/master"] = master.detach()
        return tensors

    @torch.no_grad()
    def take_masters(self, exact: Mapping[nn.Parameter, Tensor]) -> None:
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if master is not parameter:
                master.copy_(exact[parameter])

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        for key, tensor in self.state().items():
            tensor.copy_(state[key])
