"""The processes of one run: who this one is, and the small things that they tell each other, on the host.

A launcher (`deepspeed`, `torchrun`) says who is who in the environment: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
MASTER_PORT. Without it a process is a run of its own. Tensors of the model travel by DeepSpeed; what this module moves are
host integers, sums of losses and names, through a gloo group of its own that no device waits for.
"""

from __future__ import annotations

import atexit
import os
import sys
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore, Store
from torch.distributed.rendezvous import rendezvous

from pipelines.errors import BadInput

T = TypeVar("T")

_MET: list[int] = []
"""World sizes of the process groups that this process has been in."""


@dataclass(frozen=True)
class Ranks:
    """One process among `world_size`."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """Among those of its machine."""
    local_world_size: int = 1
    side: dist.ProcessGroup | None = None
    """gloo, beside the group that moves tensors; None where there is one process."""
    store: Store | None = None
    """Shared by all: where signs of life are left."""

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks for all."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over ranks of a host tensor, on all of them."""
        if self.side is not None:
            dist.all_reduce(values, group=self.side)
        return values

    def from_first(self, value: T) -> T:
        """What rank 0 has here, on all of them; plain data."""
        values = [value]
        if self.side is not None:
            dist.broadcast_object_list(values, src=0, group=self.side)
        return values[0]

    def gathered(self, value: T) -> list[T]:
        """What each rank has here, on all of them, by rank; plain data."""
        if self.side is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.side)
        return values

    def wait_for_all(self) -> None:
        """Return once every rank has come here."""
        if self.side is not None:
            dist.barrier(group=self.side)


def rank_in_environment() -> int:
    """This process's rank as the launcher says it; 0 without one."""
    return int(os.environ.get("RANK", 0))


def join(timeout_s: float, device: str) -> Ranks:
    """Meet the other processes. Raises BadInput where the environment is incomplete.

    `timeout_s`: after which a collective that another rank does not join is given up. `device`: cuda takes NCCL for tensors.
    """
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size == 1:
        return Ranks()
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise BadInput(f"environment: {name}", f"not set, but WORLD_SIZE is {world_size}",
                           "start with deepspeed or torchrun, which set it")  # fmt: skip
    timeout = timedelta(seconds=timeout_s)
    store, rank, world_size = next(rendezvous("env://", timeout=timeout))
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    _MET.append(world_size)
    side = dist.new_group(backend="gloo", timeout=timeout)
    local = int(
        os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or _counted_locally(side, world_size)
    )
    return Ranks(rank, world_size, int(os.environ["LOCAL_RANK"]), local, side, store)


def join_alone() -> None:
    """A process group of one, for libraries that want one. They keep it, so it stays until the process ends."""
    if not dist.is_initialized():
        os.environ.setdefault("LOCAL_RANK", "0")
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
        _MET.append(1)
        atexit.register(_end)


def joined() -> bool:
    """Whether this process has met others, or pretends to."""
    return dist.is_initialized()


def leave() -> None:
    """Part from the others, in order."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.destroy_process_group()


def finish(code: int) -> NoReturn:
    """End the process with this exit code. In place of `sys.exit` wherever process groups may have been.

    gloo's threads let go of a tensor only after its collective is said to be done. If Python is being taken down by then, the
    whole process aborts (SIGABRT), and the launcher calls a finished run failed. So nothing is taken down: what asked to be
    called at exit is called, and the process ends.
    """
    if not _MET:
        sys.exit(code)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _end() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _counted_locally(side: dist.ProcessGroup | None, world_size: int) -> int:
    hosts: list[Any] = [None] * world_size
    dist.all_gather_object(hosts, os.uname().nodename, group=side)
    return hosts.count(os.uname().nodename)
