"""A GPU as `bench/hardware.yaml` describes it. What comes of it is a projection."""

from __future__ import annotations

from dataclasses import dataclass

from bench.plan_cost import UPDATE_BYTES, Work
from bench.plan_count import Counted, Product
from bench.plan_hardware import Efficiencies, Gpu

_TILE = 128
"""Rows and columns of a product that a multiprocessor has at a time."""
_SPLIT = 512
"""Terms of a sum that are worth a block of its own, where a product has fewer tiles than the GPU multiprocessors."""
_OPTIMIZER_LAUNCHES = 12
"""Squares and update of trunk and head, whatever the number of tensors (`kernels.adamw_many`), and what decides to skip."""


@dataclass(frozen=True)
class GpuRank:
    """One GPU of nodes of `per_node`. `images_per_s`: what one thread of a host fills batches with, measured elsewhere."""

    gpu: Gpu
    efficiencies: Efficiencies
    per_node: int
    images_per_s: float

    measured = False

    @property
    def title(self) -> str:
        return self.gpu.title

    @property
    def overlap(self) -> float:
        return self.efficiencies.overlap.value

    @property
    def memory(self) -> float:
        return self.gpu.memory

    def work(self, counted: Counted, graphs: bool) -> Work:
        """Kernels one after the other; none is shorter than `kernel`. Without graphs the host has to ask for each."""
        e, g = self.efficiencies, self.gpu
        shortest, bandwidth = e.kernel.value, e.elementwise.value * g.bandwidth
        others = sum(n for kind, n in counted.calls.items() if kind not in ("products", "attention"))
        moved = sum(n for kind, n in counted.bytes.items() if kind != "attention")
        attention = max(
            counted.bytes["attention"] / bandwidth, counted.attention_flops / (e.attention.value * g.bf16_flops)
        )
        return Work(
            products=sum(self.product(product) for product in counted.products),
            attention=max(attention, counted.calls["attention"] * shortest),
            elementwise=max(moved / bandwidth, others * shortest),
            host=0.0 if graphs else counted.launches * e.launch.value,
        )

    def product(self, product: Product) -> float:
        """One matrix product: arithmetic on the tiles that a last, part-filled round leaves idle too, or its bytes."""
        e, g = self.efficiencies, self.gpu
        tiles = -(-product.m // _TILE) * -(-product.n // _TILE)
        tiles *= max(1, min(product.k // _SPLIT, g.multiprocessors // tiles))
        rounds = -(-tiles // g.multiprocessors)
        used = tiles / (rounds * g.multiprocessors)
        arithmetic = product.flops / (used * e.products.value * g.bf16_flops)
        moved = product.bytes / (e.adamw.value * g.bandwidth)  # weights stream as AdamW's state does
        return max(arithmetic, moved, e.kernel.value)

    def update(self, values: int, tensors: int) -> float:
        """See `Machine`."""
        e = self.efficiencies
        moved = values * UPDATE_BYTES["bfloat16"] / (e.adamw.value * self.gpu.bandwidth)
        return max(moved, _OPTIMIZER_LAUNCHES * e.launch.value)

    def travel(self, sent: float, ranks: int, collectives: int, both_ways: bool) -> float:
        """Within nodes over NVLink, then between them each GPU's own share, as NCCL's rings over one adapter a GPU do."""
        e, g = self.efficiencies, self.gpu
        within = min(ranks, self.per_node)
        nodes = -(-ranks // self.per_node)
        seconds = (within - 1) / within * sent / (e.nvlink.value * g.nvlink)
        seconds += (nodes - 1) / nodes * sent / within / (e.network.value * g.network)
        levels = (within > 1) + (nodes > 1)
        return (2 if both_ways else 1) * seconds + collectives * levels * e.collective.value

    def agree(self, work: Work) -> float:
        """It is the host's: a GPU that is behind its host does not wait for it."""
        return self.efficiencies.agreement.value if work.host >= work.device else 0.0

    def engine(self, stage: int) -> float:
        """Not known for GPUs' hosts: `bench.hooks` says what it takes on a CPU's rank."""
        return 0.0

    def load(self, images: int, sent: int, threads: int) -> float:
        """Packing and copying to the device go on side by side."""
        copied = sent / (self.efficiencies.host_to_device.value * self.gpu.host_to_device)
        return max(images / (self.images_per_s * threads), copied)
