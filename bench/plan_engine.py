"""What DeepSpeed adds to a rank's step: hooks, partitions, copies. Measured on a model so narrow that little else is left."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median

import torch
from torch import distributed

from bench import lengths
from bench.batches import draw, pack
from bench.plan_batches import DTYPES
from bench.plan_samples import SMALL, TASKS
from engine import assembly, deepspeed_config
from engine.config import RunConfig
from engine.model.published import PUBLISHED_HEADS
from engine.model.randomness import Randomness
from engine.model.vilbert import ViLBERT
from engine.ranks import Ranks
from engine.step import Stepper
from engine.tasks import load_table
from pipelines.batch import Batch

_ROUNDS, _WARMING = 12, 3


def beyond_plain(run: RunConfig, ranks: Ranks, stages: Sequence[int]) -> dict[int, float]:
    """By ZeRO stage, seconds of a step under DeepSpeed less those of the same step without: medians, in turns. The model has
    the run's depth, so as many tensors. Its few bytes are sent too. All ranks must call it."""
    rows = tuple(load_table().row(name) for name in TASKS)
    row = rows[0]
    small = run.model.model_copy(update=SMALL)
    dtype = DTYPES[run.precision]
    batch = pack(draw(row, lengths.load()[row.name], small, 1, (0, ranks.rank)), dtype)

    def stepper(stage: int | None) -> Stepper:
        config = run.model_copy(update={
            "model": small, "deepspeed": None if stage is None else deepspeed_config.read(f"zero{stage}"),
        })  # fmt: skip
        model = ViLBERT(small, {each.head: PUBLISHED_HEADS[each.head] for each in rows})
        model.initialise(0)
        return assembly.build_stepper(config, rows, model, torch.device("cpu"), ranks, stage is not None)

    found = {}
    for stage in stages:
        pair = stepper(None), stepper(stage)
        times: tuple[list[float], list[float]] = [], []
        for _ in range(_WARMING + _ROUNDS):
            for which, seconds in zip(pair, times, strict=True):
                seconds.append(_seconds(which, row.head, batch))
        plain, sharded = (median(seconds[_WARMING:]) for seconds in times)
        found[stage] = max(sharded - plain, 0.0)
    return found


def _seconds(stepper: Stepper, head: str, batch: Batch) -> float:
    distributed.barrier()
    started = time.perf_counter()
    stepper.step([batch], head, loss_scale=1.0, lr_multiplier=1e-3, random=Randomness(0, 1, training=True))
    return time.perf_counter() - started
