"""What counts as a read, and whose it is."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore

from bench.host_counts import HostCounts

X = torch.arange(4.0)

READS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.any()),
    "if": lambda x: 1 if x.sum() > 0 else 0,
    "float": lambda x: float(x[0]),
    "int": lambda x: int(x[0]),
    "index": lambda x: [0, 1, 2][x.long()[1]],
    "slice": lambda x: x[: x.long()[1]],
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "to a name": lambda x: x.to("cpu"),
    "to a device": lambda x: x.to(device=torch.device("cpu")),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 1),
    "masked_select": lambda x: x.masked_select(x > 1),
    "mask": lambda x: x[x > 1],
    "mask put": lambda x: x.clone().index_put_((x > 1,), torch.tensor(0.0)),
    "unique": lambda x: x.unique(),
    "equal": lambda x: torch.equal(x, x + 1),
    "allclose": lambda x: torch.allclose(x, x),
    "lengths": lambda x: x.repeat_interleave(x.long()),
    "format": lambda x: f"{x[0]:.2f}",
}
NOTHING: dict[str, Callable[[Tensor], object]] = {
    "arithmetic": lambda x: (x * 2 + 1).softmax(0).argmax(),
    "index": lambda x: x[torch.tensor([0, 2])],
    "slice": lambda x: x[1:3],
    "where": lambda x: torch.where(x > 1, x, 0),
    "dtype": lambda x: x.to(torch.bfloat16),
    "lengths known": lambda x: x.repeat_interleave(torch.tensor([1, 0, 2, 1]), output_size=4),
    "numpy, which only host memory has": lambda x: x.numpy(),
    "shape": lambda x: x.shape[0] + len(x),
}


@pytest.mark.parametrize("name", READS)
def test_what_waits_is_a_read(name: str) -> None:
    counts = HostCounts()
    with counts, counts.phase("step"):
        READS[name](X)
    (entry,) = counts.of("step")
    assert entry and {seen.kind for seen in entry} == {"read"}
    assert all(seen.who.startswith("tests/bench/test_host_counts.py:") and not seen.theirs for seen in entry)


@pytest.mark.parametrize("name", NOTHING)
def test_what_does_not_wait_is_none(name: str) -> None:
    counts = HostCounts()
    with counts:
        NOTHING[name](X)
    assert not counts.seen


def test_counters_on_the_host_are_no_reads() -> None:
    steps = torch.ones(2)
    counts = HostCounts([steps])
    with counts:
        assert int(steps[0]) == 1 and steps.tolist() == [1, 1]
        assert not counts.seen
        float(X[0])
        assert len(counts.seen) == 1


def test_another_thread_is_not_seen() -> None:
    counts = HostCounts()
    with counts, ThreadPoolExecutor(1) as thread:
        thread.submit(lambda: (X.cpu(), X.tolist(), float(X[0]))).result()
    assert not counts.seen


class _Reading(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> Tensor:
        return dx * dx.sum().item()


def test_backward_and_hooks_are_seen_and_methods_are_put_back() -> None:
    weight = torch.ones(2, requires_grad=True)

    def hook(parameter: Tensor) -> None:
        assert parameter.grad is not None and bool(parameter.grad.sum())

    weight.register_post_accumulate_grad_hook(hook)
    before, counts = Tensor.cpu, HostCounts()
    with counts, counts.phase("outer"), counts.phase("inner"):
        _Reading.apply(weight).sum().backward()
    assert [seen.who.rpartition(":")[2] for seen in counts.of("inner")[0]] == ["backward", "hook"]
    assert counts.of("outer") == [[]] and Tensor.cpu is before


def test_collectives_by_kind_bytes_and_group() -> None:
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        side, counts = dist.new_group(backend="gloo"), HostCounts()
        counts.name_group(side, "side")
        with counts:
            dist.all_reduce(torch.ones(8, dtype=torch.int64), group=side)
            dist.all_gather_into_tensor(torch.empty(4), torch.empty(4))
            dist.barrier()
        found = [(seen.kind, seen.bytes, seen.group) for seen in counts.seen if seen.kind != "read"]
        assert found[:2] == [("allreduce", 64, "side"), ("allgather_base", 16, "")]
        assert found[2][0] == "barrier"
    finally:
        dist.destroy_process_group()
