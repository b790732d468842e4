"""The update rule θs ∪ θt (paper Algorithm 1) over few flat parameters: the published AdamW (`kernels.adamw`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.model.flat import FlatBlock
from engine.model.vilbert import ViLBERT
from engine.slices import of_unit, units
from kernels import huge_pages
from kernels.adamw import square_sum
from kernels.adamw_many import Together


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW as published. `update`: "live" leaves heads that did not run alone (their moments too), "zero_filled" steps
    every head that has ever run, with zero gradients, as the authors' code does. `bias_correction`: moments are divided by
    what they lack at first, as in pretraining (spec section 2.1); a skipped step counts as one."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    weight_decay: float = 0.01
    update: str = "live"
    bias_correction: bool = False
    clip: float = 0.0
    """Largest norm of a step's whole gradient, which is scaled down to it; 0: as it comes."""


class Optimizer:
    """Steps the trunk whole and, of the heads, the one that ran. Parameters in bfloat16 get float32 master copies."""

    def __init__(
        self,
        model: ViLBERT,
        settings: OptimizerSettings,
        rates: Mapping[str, float],
    ) -> None:
        """`rates`: the rate of each unit: `trunk`, and every head."""
        self.settings = settings
        self.units = {name: _Unit(name, module, settings, rates[name]) for name, module in units(model).items()}

    def step(self, head: str, lr_multiplier: float, loss: Tensor) -> tuple[Tensor, Tensor]:
        """One update after `backward`. Returns (grad_norm, skipped), both on the device, float32 scalars.

        Trunk parameters without a gradient count as zeros. Where the loss or any gradient is not finite, nothing changes
        and `skipped` is 1; the decision stays on the device.
        """
        stepped = [self.units["trunk"], self.units[head]]
        if self.settings.update == "zero_filled":
            stepped += [unit for name, unit in self.units.items() if name not in ("trunk", head) and unit.started]
        grad_norm = torch.cat([part for unit in stepped for part in unit.square_sums()]).sum().sqrt()
        skipped = (~torch.isfinite(grad_norm + loss.detach())).float()
        if self.settings.clip:
            gradients = [gradient for unit in stepped for gradient in unit.gradients()]
            torch._foreach_mul_(gradients, clip_factor(grad_norm, self.settings.clip))
        for unit in stepped:
            unit.step(lr_multiplier, skipped)
        return grad_norm, skipped

    def take_masters(self, exact: Mapping[nn.Parameter, Tensor]) -> None:
        """Start the float32 masters from what each parameter was before it was rounded to bfloat16."""
        for unit in self.units.values():
            unit.take_masters(exact)

    def masters(self) -> dict[str, Tensor]:
        """The float32 weights by unit and parameter name: masters, or the parameters themselves."""
        return {f"{unit}/{name}": value for unit, of in self.units.items() for name, value in of.weights().items()}

    @torch.no_grad()
    def follow_masters(self) -> None:
        """Round the masters into the bfloat16 parameters again, after somebody has written into them."""
        for unit in self.units.values():
            for parameter, master in zip(unit.parameters, unit.masters, strict=True):
                if master.data_ptr() != parameter.data_ptr():
                    parameter.copy_(master)

    def state_dict(self) -> dict[str, Tensor]:
        """Moments by unit and parameter name, and each unit's count of steps; plain tensors, for safetensors, not copies."""
        return {f"{name}/{key}": value for name, unit in self.units.items() for key, value in unit.state().items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Bit for bit what `state_dict` gave; KeyError for a state of other parameters."""
        for key, tensor in self.state_dict().items():
            tensor.copy_(state[key])


class _Unit:
    """What is stepped together: the trunk, or one head. Matrices decay, vectors do not."""

    def __init__(self, unit: str, module: nn.Module, settings: OptimizerSettings, lr: float) -> None:
        self.lr, self.settings = lr, settings
        self.blocks = [block for block in module.modules() if isinstance(block, FlatBlock)]
        named = of_unit(unit, module)
        self.names = [one.name for one in named]
        self.parameters = [one.parameter for one in named]
        for parameter in self.parameters:
            huge_pages.move(parameter.detach())
        self.masters = [
            huge_pages.empty_like(parameter, torch.float32).copy_(parameter.detach())
            if self._has_master(parameter)
            else parameter.detach()
            for parameter in self.parameters
        ]
        self.exp_avg = [huge_pages.empty_like(master).zero_() for master in self.masters]
        self.exp_avg_sq = [huge_pages.empty_like(master).zero_() for master in self.masters]
        weights = [parameter.detach() if self._has_master(parameter) else None for parameter in self.parameters]
        self.decays = [one.decays for one in named]
        self._together = Together(self.masters, self.exp_avg, self.exp_avg_sq, weights, self.decays)
        self.steps = torch.zeros(1, dtype=torch.int64)
        self._zeros: Tensor | None = None

    def gradients(self) -> list[Tensor]:
        """The gradients that arrived."""
        return [parameter.grad for parameter in self.parameters if parameter.grad is not None]

    def square_sums(self) -> list[Tensor]:
        """See `Together.square_sums`; of the gradients that arrived. On a GPU the zeros of those that did not are read as well:
        one launch is worth more than they cost."""
        arrived = self.gradients()
        if len(arrived) == len(self.parameters) or self.parameters[0].is_cuda:
            return self._together.square_sums(self._filled())
        return [square_sum(gradient).reshape(1) for gradient in arrived]

    @torch.no_grad()
    def step(self, lr_multiplier: float, skipped: Tensor) -> None:
        """AdamW on every parameter, with zeros where no gradient arrived; then the gradients are dropped."""
        s = self.settings
        self.steps += 1
        lr, eps, share = corrected(s, self.lr * lr_multiplier, int(self.steps))
        self._together.step(
            self._filled(), lr=lr, betas=s.betas, eps=eps, weight_decay=s.weight_decay * share, skipped=skipped
        )
        for block in self.blocks:
            block.drop_gradients()

    @property
    def started(self) -> bool:
        """Whether it was ever stepped."""
        return bool(self.steps)

    def weights(self) -> dict[str, Tensor]:
        """The float32 values by parameter name."""
        return dict(zip(self.names, self.masters, strict=True))

    def state(self) -> dict[str, Tensor]:
        """Moments by parameter name, and the count of steps; the tensors, not copies."""
        tensors: dict[str, Tensor] = {"steps": self.steps}
        for name, exp_avg, exp_avg_sq in zip(self.names, self.exp_avg, self.exp_avg_sq, strict=True):
            tensors |= {f"{name}/exp_avg": exp_avg, f"{name}/exp_avg_sq": exp_avg_sq}
        return tensors

    @torch.no_grad()
    def take_masters(self, exact: Mapping[nn.Parameter, Tensor]) -> None:
        """See `Optimizer.take_masters`."""
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if self._has_master(parameter):
                master.copy_(exact[parameter])

    def _filled(self) -> list[Tensor]:
        """A gradient of every parameter, zeros where none arrived."""
        return [
            parameter.grad if parameter.grad is not None else self._zeros_like(parameter)
            for parameter in self.parameters
        ]

    def _zeros_like(self, parameter: nn.Parameter) -> Tensor:
        """Zeros of a parameter's shape; one piece of memory serves all."""
        if self._zeros is None:
            self._zeros = parameter.new_zeros(max(other.numel() for other in self.parameters)).detach()
        return self._zeros[: parameter.numel()]

    @staticmethod
    def _has_master(parameter: nn.Parameter) -> bool:
        return parameter.dtype is not torch.float32


def corrected(settings: OptimizerSettings, lr: float, steps: int) -> tuple[float, float, float]:
    """(rate, eps, factor of the decay) with which the rule without bias correction does step number `steps` with it.

    m / (1 - beta1^t) over sqrt(v / (1 - beta2^t)) + eps is m times a factor over sqrt(v) + eps times another.
    """
    if not settings.bias_correction or lr == 0:
        return lr, settings.eps, 1.0
    first, second = (1 - beta**steps for beta in settings.betas)
    return lr * second**0.5 / first, settings.eps * second**0.5, first / second**0.5


def clip_factor(grad_norm: Tensor, clip: float) -> Tensor:
    """What a gradient of this norm is multiplied by, at most 1: a device scalar, by torch's rule (`clip_grad_norm_`)."""
    return (clip / (grad_norm + 1e-6)).clamp(max=1.0)
