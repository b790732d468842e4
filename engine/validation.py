"""Scoring a model on a split: the exact mean over all examples, in evaluation mode, on one rank or many."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from engine.losses import outcome
from engine.model.randomness import Randomness
from engine.model.vilbert import ViLBERT
from engine.ranks import Ranks
from engine.tasks import LOSS_PARTS
from pipelines.batch import Batch

_UNIT = 2**40
"""Scores are summed in integers of this fraction: such a sum depends neither on its order nor on who adds what."""
_PARTS = max(map(len, LOSS_PARTS.values()))


class Interrupted(Exception):
    """A stop was asked for in the middle of a validation; nothing was decided."""


@dataclass(frozen=True)
class Validated:
    """Means over a split's examples. Batches count by their examples, so a mean within a batch may weigh some more."""

    score: float
    """In [0, 1], exact to 1e-12, and the same for any number of ranks."""
    loss: float
    parts: tuple[float, ...]
    """Of a loss that is a sum."""


@torch.inference_mode()
def validate(
    model: ViLBERT,
    batches: Iterable[Batch],
    head: str,
    device: torch.device,
    share: bool = True,
    stop_asked: Callable[[], bool] = lambda: False,
    ranks: Ranks | None = None,
    rounds: int | None = None,
) -> Validated:
    """Scores and losses in evaluation mode, over the batches of all ranks.

    Every rank gives its own batches, and all go through `rounds` rounds (none: as many as this rank has batches), so that they
    ask in step. Raises `Interrupted` between two rounds once `stop_asked()`; ValueError for no batch at all.
    """
    ranks = ranks or Ranks()
    score, examples, n_parts = 0, 0, 0
    losses = torch.zeros(1 + _PARTS, dtype=torch.float64)
    for batch in _rounds(batches, rounds):
        if stop_asked():
            raise Interrupted
        if batch is None:
            continue
        found = outcome(model, batch.to(device), head, Randomness(), share)
        score += int((found.score.double() * _UNIT).round().long().sum())
        n_parts = len(found.parts)
        losses[: 1 + n_parts] += torch.stack((found.loss, *found.parts)).double().cpu() * batch.examples
        examples += batch.examples
    score, examples, holders = ranks.sum(torch.tensor([score, examples, int(examples > 0)])).tolist()
    if not examples:
        raise ValueError("no example to validate on")
    loss, *parts, n_parts = ranks.sum(torch.cat((losses / examples, torch.tensor([n_parts / holders])))).tolist()
    return Validated(score / _UNIT / examples, loss, tuple(parts[: round(n_parts)]))


def _rounds(batches: Iterable[Batch], rounds: int | None) -> Iterator[Batch | None]:
    """The batches, and None in the rounds for which there is none left."""
    mine = iter(batches)
    if rounds is None:
        yield from mine
        return
    for _ in range(rounds):
        yield next(mine, None)
