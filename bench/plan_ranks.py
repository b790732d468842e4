"""Ranks that share this machine: what each gets of it while the others work too, and what an all-reduce between them takes."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

import torch
from torch import distributed

from bench import plan_samples
from bench.memory import total_bytes
from bench.plan_batches import DTYPES
from bench.plan_cpu import CpuRank, Line, Of, Rates
from bench.plan_engine import beyond_plain
from bench.plan_samples import Sample
from bench.timing import cores, device_name
from engine import assembly
from engine.config import RunConfig
from engine.ranks import Ranks
from pipelines.errors import BadInput

PROCESS = 0.5e9
"""Bytes of Python, torch and its libraries: VQA's working memory in bench/results/iterations_batch_16.json less its
activations."""
_SIZES = (1, 1 << 14, 1 << 18, 1 << 21, 1 << 23)
"""Values of the all-reduces that are timed."""
_ROUNDS = 5


@dataclass
class Samples:
    """What was timed."""

    work: list[Sample] = field(default_factory=list)
    """Kernels and steps."""
    reduced: list[Sample] = field(default_factory=list)
    """All-reduces."""
    deepspeed: dict[int, float] = field(default_factory=dict)
    """By ZeRO stage, what DeepSpeed adds to a step."""

    def also(self, more: Samples) -> Samples:
        """Both; of what is no sample, the lesser."""
        least = {stage: min(seconds, more.deepspeed[stage]) for stage, seconds in self.deepspeed.items()}
        return Samples(self.work + more.work, self.reduced + more.reduced, least)


def measure(run: RunConfig, ranks: int, isa: str, stages: Sequence[int], say: Callable[[str], None]) -> Samples:
    """What rank 0 finds while `ranks` processes do the same. BadInput for more ranks than cores."""
    if ranks > cores():
        raise BadInput(f"{ranks} ranks here", f"there are {cores()} cores", "give not more ranks than cores")
    say(f"measuring what {ranks} rank{'s' * (ranks > 1)} can do here, half a minute")
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        pipe, theirs = context.Pipe(duplex=False)
        store, threads = Path(folder) / "store", threads_of(run, ranks)
        processes = [
            context.Process(target=_rank, args=(rank, ranks, threads, run, isa, stages, store, theirs))
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        theirs.close()
        try:
            found: Samples = pipe.recv()
        except EOFError:
            raise RuntimeError("a rank ended before it had measured anything; it said why") from None
        finally:
            for process in processes:
                process.join()
    return found


def threads_of(run: RunConfig, ranks: int) -> int:
    """Of one rank: as the run says, or its share of the cores."""
    return run.threads or max(1, cores() // ranks)


def fitted(run: RunConfig, ranks: int, isa: str, found: Samples, images_per_s: float, of: Of = median) -> CpuRank:
    """A rank with these samples' rates."""
    threads = threads_of(run, ranks)
    title = f"{device_name(torch.device('cpu'))} ({isa or 'torch'}), {threads} thread{'s' * (threads > 1)} a rank"
    reduce = Line.fit(found.reduced) if found.reduced else Line(0, 0, 0)
    return CpuRank(title, Rates.fit(found.work, of), images_per_s, total_bytes() / ranks, reduce, found.deepspeed)


def _rank(
    rank: int, ranks: int, threads: int, run: RunConfig, isa: str, stages: Sequence[int], store: Path, pipe: Connection
) -> None:
    """One process; the first sends what it found."""
    os.environ["LOCAL_RANK"] = str(rank)  # DeepSpeed asks for it
    torch.set_num_threads(threads)
    assembly.use_kernels(run, torch.device("cpu"), lambda line: None)
    dtype = DTYPES[run.precision]
    steps = plan_samples.Steps(run.model, dtype, isa)
    if ranks > 1:
        distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
        distributed.barrier()
    found = Samples([*steps.samples(dtype), *plan_samples.kernels(run.model, dtype), *steps.samples(dtype)])
    if ranks > 1:
        found.reduced = _reduced(dtype)
        found.deepspeed = beyond_plain(
            run, Ranks(rank, ranks, rank, ranks, distributed.new_group(backend="gloo")), stages
        )
    if rank == 0:
        pipe.send(found)
    if ranks > 1:
        distributed.destroy_process_group()


def _reduced(dtype: torch.dtype) -> list[Sample]:
    found = []
    for size in _SIZES:
        x, seconds = torch.zeros(size, dtype=dtype), []
        for _ in range(1 + _ROUNDS):
            distributed.barrier()
            started = time.perf_counter()
            distributed.all_reduce(x)
            seconds.append(time.perf_counter() - started)
        found.append(Sample("reduce", 1, 0, x.nbytes, median(seconds[1:])))
    return found
