"""Small runs by any backend, on any number of ranks, to be compared with each other."""

from __future__ import annotations

import json
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from engine import checkpoint
from engine.assembly import Parts, assemble
from engine.config import config_hash
from engine.console import Console
from engine.cursor import Cursor, Window
from engine.journal import Journal
from engine.loop import Listener, Loop
from engine.ranks import Ranks
from engine.reporting import Reporter
from tests.engine.small_run import configure

PLAIN = "plain"
RUN = ["logging.every=1", "max_iterations=4", "device=cpu", "validation.max_examples=16"]
STEPS = 4 * 5


class Losses(Listener):
    """Remembers what every step gave, and every score."""

    def __init__(self) -> None:
        self.steps: list[list[Any]] = []
        self.scores: list[list[Any]] = []

    def window(self, iteration: int, task: str, window: Window, *_: object) -> None:
        self.steps.append([iteration, task, window.loss, window.score, window.grad_norm])

    def validated(self, iteration: int, task: str, found: Any, *_: object) -> None:
        self.scores.append([iteration, task, found.score])


def of(backend: str) -> list[str]:
    """The overrides that name it: `plain`, or a ZeRO stage."""
    return ["backend=plain"] if backend == PLAIN else [f"deepspeed=zero{backend}"]


def runs(ranks: Ranks, data: str, folder: str, backends: list[str], *more: str) -> dict[str, Any]:
    """On one rank, a whole run of each backend: losses, scores, cursor and bytes of state."""
    found = {}
    for backend in backends:
        parts = assemble(configure(Path(data), *RUN, *of(backend), *more), ranks=ranks)
        losses, cursor = Losses(), Cursor()
        assert Loop(parts, cursor, Path(folder) / f"{backend}-{ranks.world_size}", losses).run()
        found[backend] = {
            "steps": losses.steps, "scores": losses.scores, "cursor": json.loads(cursor.to_json()), **state_bytes(parts),
        }  # fmt: skip
    return found


def state_bytes(parts: Parts) -> dict[str, int]:
    """Bytes of moments and float32 masters that this rank keeps, and of those that there are."""
    kept = [*parts.stepper.state(), *parts.stepper.weights()]
    with parts.stepper.whole():
        values = sum(parameter.numel() for parameter in parts.model.parameters())
    mine = sum(one.values.nbytes for one in kept if not one.key.endswith("/steps"))
    return {"bytes": mine, "all_bytes": 3 * 4 * values}


def journalled(
    ranks: Ranks, data: str, folder: str, backend: str, more: list[str], stop_after: int | None = None
) -> list[int]:
    """Train, or go on where the folder has a checkpoint, with a journal; [whether it is done, the iteration].

    `stop_after`: rank 0 alone asks for a stop once it has passed so many boundaries.
    """
    parts = assemble(configure(Path(data), *of(backend), *more), ranks=ranks)
    cursor, run = Cursor(config_hash=config_hash(parts.config)), Path(folder)
    run.mkdir(exist_ok=True, parents=True)
    resumed = bool(ranks.from_first(checkpoint.checkpoints(run / "checkpoints")))
    if resumed:
        path, _ = ranks.from_first(checkpoint.newest_valid(run / "checkpoints"))
        cursor = checkpoint.load(path, parts.model, parts.stepper)
    passed = [0]

    def stop_asked() -> bool:
        passed[0] += 1
        return ranks.first and stop_after is not None and passed[0] > stop_after

    with ExitStack() as stack:
        listener = Listener()
        if ranks.first:
            journal = stack.enter_context(Journal(run, keep=cursor.covers if resumed else None))
            listener = Reporter(parts, journal, Console("quiet"), cursor)
        done = Loop(parts, cursor, run / "checkpoints", listener, stop_asked).run()
    return [int(done), cursor.iteration]


def state(run: Path) -> dict[str, Tensor]:
    """The newest checkpoint's weights, moments and counts of steps, whole, whoever kept them."""
    path, refused = checkpoint.newest_valid(run)
    assert not refused
    pieces = checkpoint.Pieces(sorted(path.glob("optimizer-*")))
    counts = load_file(sorted(path.glob("optimizer-*"))[0])
    whole = {key: counts[key] if key.endswith("/steps") else pieces.whole(key) for key in pieces.keys()}  # noqa: SIM118
    return whole | load_file(path / "weights.safetensors")


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    """Whether no bit differs."""
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def furthest(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest difference of a tensor, in norms of it; at least a hundredth of the largest norm of its kind.

    The gradient of a key's bias, and of what all options get, is zero: what is there is rounding alone. So those biases are
    left out, and small tensors are compared with their like.
    """
    assert ours.keys() == theirs.keys()
    theirs = {key: value for key, value in theirs.items() if not re.search(r"\.key\d?\.bias$", key)}
    norms = {key: float(value.double().norm()) for key, value in theirs.items()}
    largest: dict[str, float] = {}
    for key, norm in norms.items():
        largest[_kind(key)] = max(norm, largest.get(_kind(key), 0.0))
    return max(
        float((ours[key].double() - theirs[key].double()).norm()) / max(norms[key], 1e-2 * largest[_kind(key)])
        for key in theirs
    )


def _kind(key: str) -> str:
    last = key.rpartition("/")[2]
    return last if last in ("exp_avg", "exp_avg_sq", "steps") else "weights"


def relative(ours: list[list[Any]], theirs: list[list[Any]]) -> float:
    """Largest relative difference of the losses of two runs, whose steps must be the same ones."""
    assert [row[:2] for row in ours] == [row[:2] for row in theirs]
    return max(abs(a[2] - b[2]) / abs(b[2]) for a, b in zip(ours, theirs, strict=True))
