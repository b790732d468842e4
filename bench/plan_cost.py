"""Seconds of a step from what was counted of it, on a machine whose rates are known, with other ranks to wait for.

step = max(forward and backward, host) + exposed communication + update, or what its data takes if that is longer
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from bench.plan_count import Counted

BACKWARD_SHARE = 2 / 3
"""Of forward and backward: each product of forward has two in backward."""

STAGES = {
    0: "gradients all-reduced, everything else on every rank",
    1: "optimizer state divided: gradients reduce-scattered, weights all-gathered",
    2: "gradients divided too",
    3: "weights divided too, gathered in forward and again in backward",
}

UPDATE_BYTES = {"bfloat16": 28, "float32": 28}
"""Read and written for each value that AdamW steps: gradient 2, master, moments 4 + 4 + 4 twice, weight 2; or gradient 4 and
the other three twice."""


@dataclass(frozen=True)
class Work:
    """Seconds of forward and backward, by kind; `host`: of the host that asks for it, where it works ahead of a device."""

    products: float
    attention: float
    elementwise: float
    host: float = 0.0

    @property
    def seconds(self) -> float:
        return max(self.device, self.host)

    @property
    def device(self) -> float:
        """Of the device alone."""
        return self.products + self.attention + self.elementwise


class Machine(Protocol):
    """What one rank runs on, and what lies between ranks."""

    @property
    def title(self) -> str:
        """What it is called."""

    @property
    def measured(self) -> bool:
        """Whether its rates were measured where it is."""

    @property
    def overlap(self) -> float:
        """Share of backward behind which gradients can travel."""

    @property
    def memory(self) -> float:
        """Bytes a rank may hold."""

    def work(self, counted: Counted, graphs: bool) -> Work:
        """Forward and backward."""

    def update(self, values: int, tensors: int) -> float:
        """AdamW on so many values in so many tensors, and the norm of as many gradients."""

    def travel(self, sent: float, ranks: int, collectives: int, both_ways: bool) -> float:
        """`sent` bytes reduce-scattered or gathered over all ranks, or `both_ways`: all-reduced."""

    def agree(self, work: Work) -> float:
        """The step's tiny all-reduce on the CPU's group, as far as the step waits for it."""

    def engine(self, stage: int) -> float:
        """What DeepSpeed adds to a step at this stage."""

    def load(self, images: int, sent: int, threads: int) -> float:
        """A batch read, packed and copied to where it is used, while the step before it runs."""


@dataclass(frozen=True)
class Communication:
    """Seconds of a step's collectives, and of these what nothing hides."""

    sent: float
    """Bytes that a rank sends, over all collectives."""
    seconds: float
    exposed: float


@dataclass(frozen=True)
class Step:
    """One task's step on every rank of a configuration, as predicted."""

    task: str
    batch: int
    """Examples over all ranks."""
    per_rank: int
    """Examples of the rank that has most."""
    flops: int
    launches: int
    images: int
    work: Work
    update: float
    communication: Communication
    load: float
    engine: float = 0.0
    """What DeepSpeed adds to it on the host."""

    @property
    def computing(self) -> float:
        """Without waiting for data."""
        return self.work.seconds + self.communication.exposed + self.update + self.engine

    @property
    def seconds(self) -> float:
        return max(self.computing, self.load)

    @property
    def waiting(self) -> float:
        """For data."""
        return self.seconds - self.computing

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {
            "seconds": self.seconds,
            "iterations_per_s": 1 / self.seconds,
            "samples_per_s": self.batch / self.seconds,
            "forward_backward": self.work.seconds,
            "waiting": self.waiting,
            "exposed_share": self.communication.exposed / self.seconds,
            "images_per_s_needed": self.images / self.computing,
        }


@dataclass(frozen=True)
class Layout:
    """What a run is, beside its batches: what its parameters are and how ranks share them."""

    ranks: int
    stage: int
    precision: str
    trunk: int
    """Values of the trunk."""
    heads: Mapping[str, int]
    """Values of each head."""
    trunk_tensors: int
    graphs: bool = False
    data_threads: int = 1
    largest: int = 0
    """Values of the largest parameter: what stage 3 has to gather whole, twice for the one behind it."""
    bucket: float = 120e6
    """Bytes of gradients that travel together."""

    @property
    def element_size(self) -> int:
        return 2 if self.precision == "bfloat16" else 4

    @property
    def buckets(self) -> int:
        """In so many parts gradients travel, the last of them when backward is over."""
        return max(1, math.ceil(self.trunk * self.element_size / self.bucket))

    @property
    def parameters(self) -> int:
        """Values of everything."""
        return self.trunk + sum(self.heads.values())


def communicate(machine: Machine, layout: Layout, stepped: int, work: Work) -> Communication:
    """What a step that updates `stepped` values sends. Stages 1 to 3 end in the weights that other ranks updated, which the
    next forward needs; stage 3 has them gathered while layers run, twice."""
    if layout.ranks == 1:
        return Communication(0.0, 0.0, 0.0)
    n, size = layout.ranks, stepped * layout.element_size
    share = (n - 1) / n * size
    backward = BACKWARD_SHARE * work.seconds
    forward = work.seconds - backward
    reduce = machine.travel(size, n, layout.buckets, both_ways=layout.stage == 0)
    hidden = min(machine.overlap * backward, reduce * (1 - 1 / layout.buckets))
    agree = machine.agree(work)
    if layout.stage == 0:
        return Communication(2 * share, reduce + agree, reduce - hidden + agree)
    gather = machine.travel(size, n, layout.buckets, both_ways=False)
    if layout.stage < 3:
        return Communication(2 * share, reduce + gather + agree, reduce - hidden + gather + agree)
    room = max(machine.overlap * backward - hidden, 0.0)
    behind = min(machine.overlap * forward, gather) + min(room, gather)
    return Communication(3 * share, reduce + 2 * gather + agree, reduce - hidden + 2 * gather - behind + agree)


def step(machine: Machine, layout: Layout, task: str, head: str, batch: int, per_rank: int, counted: Counted) -> Step:
    """`counted`: of the rank that has most to do; the others wait for it."""
    work = machine.work(counted, layout.graphs)
    stepped = layout.trunk + layout.heads[head]
    divided = 1 if layout.stage == 0 else layout.ranks
    return Step(
        task=task,
        batch=batch,
        per_rank=per_rank,
        flops=counted.flops,
        launches=counted.launches,
        images=counted.images,
        work=work,
        update=machine.update(-(-stepped // divided), layout.trunk_tensors),
        communication=communicate(machine, layout, stepped, work),
        load=machine.load(counted.images, counted.batch_bytes, layout.data_threads),
        engine=machine.engine(layout.stage) if layout.ranks > 1 else 0.0,
    )
