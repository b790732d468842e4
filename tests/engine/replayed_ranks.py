"""Two ranks under DeepSpeed's stage 0, with recorded steps and without: `torchrun … -m tests.engine.replayed_ranks DATA OUT`.

A recorder that repeats the work stands in for a GPU's. Rank 0 writes what differs to OUT, as JSON.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from engine.assembly import Parts, assemble
from engine.graphs import Graphs
from engine.model.randomness import Randomness
from engine.ranks import Ranks, join, leave
from engine.sharded import Sharded
from pipelines.buckets import Grid
from tests.engine.repeater import Repeater
from tests.engine.small_run import configure
from tests.pipelines.small import build

STEPS = 4


def trained(data: Path, ranks: Ranks, recorded: bool) -> tuple[Parts, list[Tensor]]:
    """A few steps of every task, each batch twice; losses and norms of them all."""
    parts = assemble(
        configure(data, "device=cpu", "deepspeed=zero0", "precision=bfloat16", "kernels=torch"), ranks=ranks
    )
    stepper, found = parts.stepper, []
    assert isinstance(stepper, Sharded)
    if recorded:
        stepper.graphs = Graphs(parts.model, parts.device, Repeater(parts.model))
    for step in range(STEPS):
        for task in parts.tasks.values():
            batch = dataclasses.replace(task.train, grid=Grid.fitting(16))(2 * (step % 2) + ranks.rank)
            random = Randomness(3, step, training=True)
            result = stepper.step([batch], task.row.head, loss_scale=1.5, lr_multiplier=0.1, random=random)
            found += [result.loss, result.grad_norm, result.skipped]
    if stepper.graphs is not None:
        assert stepper.graphs.counters.replays > 0
    return parts, found


def main() -> None:
    data, out = map(Path, sys.argv[1:])
    with TemporaryDirectory() as own:
        build(Path(own))  # the reader serves examples from this process's memory
    ranks = join(60, "cpu")
    (eager, expected), (recorded, found) = (trained(data, ranks, recorded) for recorded in (False, True))
    # DeepSpeed fills gradients that never came with zeros, which the sum of squares meets in another order.
    differs = [
        f"result {i}"
        for i, pair in enumerate(zip(expected, found, strict=True))
        if not torch.allclose(*pair, rtol=1e-6)
    ]
    pairs = zip(
        eager.stepper.state() + eager.stepper.weights(),
        recorded.stepper.state() + recorded.stepper.weights(),
        strict=True,
    )
    differs += [one.key for one, other in pairs if not torch.equal(one.values, other.values)]
    everybody = ranks.gathered({"differs": differs, "loss": [float(x) for x in found[::3]]})
    if ranks.first:
        out.write_text(json.dumps(everybody))
    leave()


if __name__ == "__main__":
    main()
