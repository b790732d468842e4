"""The update rule θs ∪ θt (paper Algorithm 1) over few flat parameters: the published AdamW (`kernels.adamw`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.model.flat import FlatBlock
from engine.model.vilbert import PRETRAINING, ViLBERT
from kernels import huge_pages
from kernels.adamw import adamw, square_sum


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
            self.units[PRETRAINING] = _Unit(model.pretraining, settings, base_lr)
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
        squares = [square_sum(gradient) for unit in units for gradient in unit.gradients()]
        grad_norm = torch.stack(squares).sum().sqrt()
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
            if parameter.dtype is not torch.float32
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
    """What is stepped together: the trunk, or one head. Matrices decay, vectors do not."""

    def __init__(self, module: nn.Module, settings: OptimizerSettings, lr: float) -> None:
        self.lr, self.settings = lr, settings
        named = [(name, block) for name, block in module.named_modules() if isinstance(block, FlatBlock)]
        self.blocks = [block for _, block in named]
        self.names = [f"{name}.{kind}".lstrip(".") for kind in ("matrices", "vectors") for name, _ in named]
        matrices, vectors = [block.matrices for block in self.blocks], [block.vectors for block in self.blocks]
        self.parameters: list[nn.Parameter] = matrices + vectors
        self.decay = [settings.weight_decay] * len(matrices) + [0.0] * len(vectors)
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
        self.steps = torch.zeros(1, dtype=torch.int64)
        self._zeros: Tensor | None = None

    def gradients(self) -> list[Tensor]:
        """The gradients that arrived."""
        return [parameter.grad for parameter in self.parameters if parameter.grad is not None]

    @torch.no_grad()
    def step(self, lr_multiplier: float, skipped: Tensor) -> None:
        """AdamW on every parameter, with zeros where no gradient arrived; then the gradients are dropped."""
        s = self.settings
        self.steps += 1
        lr, eps, share = self._corrected(self.lr * lr_multiplier)
        states = zip(self.parameters, self.masters, self.exp_avg, self.exp_avg_sq, self.decay, strict=True)
        for parameter, master, exp_avg, exp_avg_sq, decay in states:
            gradient = self._zeros_like(parameter) if parameter.grad is None else parameter.grad
            weights = parameter.detach() if self._has_master(parameter) else None
            adamw(
                gradient, master, exp_avg, exp_avg_sq, weights,
                lr=lr, betas=s.betas, eps=eps, weight_decay=decay * share, skipped=skipped,
            )  # fmt: skip
        for block in self.blocks:
            block.drop_gradients()

    def _corrected(self, lr: float) -> tuple[float, float, float]:
        """(rate, eps, factor of the decay) with which the rule without bias correction does the step with it.

        m / (1 - beta1^t) over sqrt(v / (1 - beta2^t)) + eps is m times a factor over sqrt(v) + eps times another.
        """
        s = self.settings
        if not s.bias_correction or lr == 0:
            return lr, s.eps, 1.0
        first, second = (1 - beta ** int(self.steps) for beta in s.betas)
        return lr * second**0.5 / first, s.eps * second**0.5, first / second**0.5

    def state(self) -> dict[str, Tensor]:
        """Moments and masters by parameter name, and where it matters the count of steps; the tensors, not copies."""
        tensors: dict[str, Tensor] = {"steps": self.steps} if self.settings.bias_correction else {}
        states = zip(self.names, self.parameters, self.masters, self.exp_avg, self.exp_avg_sq, strict=True)
        for name, parameter, master, exp_avg, exp_avg_sq in states:
            tensors |= {f"{name}/exp_avg": exp_avg, f"{name}/exp_avg_sq": exp_avg_sq}
            if self._has_master(parameter):
                tensors[f"{name}/master"] = master
        return tensors

    @torch.no_grad()
    def take_masters(self, exact: Mapping[nn.Parameter, Tensor]) -> None:
        """See `Optimizer.take_masters`."""
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if self._has_master(parameter):
                master.copy_(exact[parameter])

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Bit for bit what `state` gave."""
        for key, tensor in self.state().items():
            tensor.copy_(state[key])

    def _zeros_like(self, parameter: nn.Parameter) -> Tensor:
        """Zeros of a parameter's shape; one piece of memory serves all."""
        if self._zeros is None:
            self._zeros = parameter.new_zeros(max(other.numel() for other in self.parameters)).detach()
        return self._zeros[: parameter.numel()]

    @staticmethod
    def _has_master(parameter: nn.Parameter) -> bool:
        return parameter.dtype is not torch.float32
