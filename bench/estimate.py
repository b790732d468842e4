"""How long a comparison will take: arithmetic from layer sizes and this machine's rates, mended by what has been measured.

Rough by design (within a factor of two before the first step has run); nothing that is reported comes from here.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch

from bench.lengths import TaskLengths
from engine.model.config import ModelConfig
from engine.tasks import TaskRow

OURS = "ours"

_OVERHEAD = {OURS: 0.5, "authors": 0.5, "stock": 3.0, "stock_graphs": 1.0}
"""Time outside of products, over the time in them."""
START_S = 10
"""A provider's process: imports, weights."""
_UPDATE_NS = {OURS: 1.0, "authors": 3.0, "stock": 1.0, "stock_graphs": 1.0}
"""Nanoseconds of the update per parameter."""
_DTYPES = {"authors": torch.float32, "stock": torch.bfloat16, "stock_graphs": torch.bfloat16}


def gemm_rates(device: torch.device, size: int = 1024, seconds: float = 0.2) -> dict[torch.dtype, float]:
    """Operations per second of a square product in float32 and bfloat16: the fastest of those that fit into the time."""
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(size, size, device=device).to(dtype)
        best, ended = float("inf"), time.perf_counter() + seconds
        while best == float("inf") or time.perf_counter() < ended:
            started = time.perf_counter()
            torch.mm(a, a)
            if device.type == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - started)
        rates[dtype] = 2 * size**3 / best
    return rates


def step_flops(config: ModelConfig, text_rows: float, region_rows: float, all_heads: bool) -> float:
    """Multiplications and additions of one step's products, attention's left out. `all_heads`: as the published forward."""
    c = config
    d, v, b = c.hidden_size, c.v_hidden_size, c.bi_hidden_size
    text = c.num_hidden_layers * (4 * d * d + 2 * d * c.intermediate_size)
    text += c.n_bridges * (4 * d * b + 2 * d * c.intermediate_size)
    region = c.v_feature_size * v + c.v_num_hidden_layers * (4 * v * v + 2 * v * c.v_intermediate_size)
    region += c.n_bridges * (4 * v * b + 2 * v * c.v_intermediate_size)
    forward_backward = 3 * 2 * (text_rows * text + region_rows * region)
    if not all_heads:
        return forward_backward
    return forward_backward + 2 * (text_rows * (d * d + d * c.vocab_size) + region_rows * (v * v + v * c.v_target_size))


def parameters(config: ModelConfig) -> float:
    """About how many values the model has."""
    return step_flops(config, 1, 1, all_heads=True) / 6 + config.vocab_size * config.hidden_size


@dataclass
class Estimate:
    """Seconds of steps to come."""

    config: ModelConfig
    precision: torch.dtype
    batch: int
    rates: dict[torch.dtype, float]
    lengths: dict[str, TaskLengths]
    _measured: dict[str, list[float]] = field(default_factory=dict)

    def step_s(self, provider: str, row: TaskRow) -> float:
        """One step of a provider, by arithmetic and by how far that was off for this provider so far."""
        factors = self._measured.get(provider, [1.0])
        return self._arithmetic(provider, row) * sum(factors) / len(factors)

    def learn(self, provider: str, row: TaskRow, seconds: float) -> None:
        """A step has been measured."""
        self._measured.setdefault(provider, []).append(seconds / self._arithmetic(provider, row))

    def task_s(self, row: TaskRow, providers: list[str], rounds: int) -> float:
        """All steps of a task: two to warm up and `rounds` of each provider; our counts and the products beside ours."""
        seconds = sum(self.step_s(provider, row) * (2 + rounds) for provider in providers)
        return seconds + self.step_s(OURS, row) * (4 + 2 * rounds)

    def _arithmetic(self, provider: str, row: TaskRow) -> float:
        pairs = self.batch * (4 if row.loss == "options" else row.images)
        lengths = self.lengths[row.name]
        if provider == OURS:
            flops = step_flops(
                self.config, pairs * lengths.texts.mean, pairs * (101 + lengths.boxes.mean), all_heads=False
            )
        else:
            flops = step_flops(self.config, pairs * (row.max_tokens + 1), pairs * row.max_regions, all_heads=True)
        products = flops / self.rates[_DTYPES.get(provider, self.precision)]
        return products * (1 + _OVERHEAD[provider]) + _UPDATE_NS[provider] * 1e-9 * parameters(self.config)
