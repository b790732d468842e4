"""Saving while the run goes on: each rank copies what it keeps, and a thread writes the copy.

1. `start`: copy the state (the only part that the loop waits for), and hand it to the thread.
2. Every rank's thread writes its files into one temporary folder, forces them to the disk and leaves their fingerprints.
3. When all ranks have said so (`engine.agreement`), rank 0's thread puts the weights together, writes the manifest, renames
   the folder, and removes checkpoints that need not stay.

A save that fails (a full disk) is given up, said, and leaves the checkpoints before it.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.agreement import Said
from engine.checkpoint import (
    CURSOR,
    MANIFEST,
    PREFIX,
    TEMPORARY,
    WEIGHTS,
    Pieces,
    checkpoints,
    fingerprint,
    optimizer_file,
    write_pieces,
)
from engine.cursor import FORMAT, Cursor
from engine.model.published import export_published
from engine.model.vilbert import ViLBERT
from engine.ranks import Ranks
from engine.slices import Kept, named_parameters
from engine.step import Stepper
from pipelines.files import sync

_MASTERS, _LEFT = "masters-{:05d}.safetensors", "written-{:05d}.json"
"""In the temporary folder alone: each rank's piece of the weights, and the fingerprints of its files."""


@dataclass(frozen=True)
class Saved:
    """What became of a save."""

    number: int
    iteration: int
    path: Path | None
    """On rank 0, where it lies; None elsewhere, and where it failed."""
    stalled_s: float
    """How long the loop waited."""
    error: str = ""


class Saver:
    """The saves of one run, one at a time. `keep`: newest checkpoints that stay; `best`: also each task's best one."""

    def __init__(
        self, folder: Path, model: ViLBERT, stepper: Stepper, ranks: Ranks, keep: int = 2, best: bool = False
    ) -> None:
        self._folder, self._model, self._stepper, self._ranks = folder, model, stepper, ranks
        self._keep, self._best = keep, best
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="saver")
        self._copies: dict[str, Tensor] = {}
        self._save: Saved | None = None
        self._writing: Future[None] | None = None
        self._committing: Future[Path] | None = None
        self._number = 0

    @property
    def busy(self) -> bool:
        """Whether a save is under way."""
        return self._save is not None

    def says(self, **more: Any) -> Said:
        """What this rank has to say of its saves, and more."""
        return Said(written=self.written, committed=self.committed, failed=self.failed, **more)

    @property
    def written(self) -> int:
        """The number of the newest save whose files of this rank are complete."""
        if self._save is None:
            return self._number
        done = self._writing is not None and self._writing.done() and self._writing.exception() is None
        return self._save.number if done else self._save.number - 1

    @property
    def failed(self) -> int:
        """The number of the save under way if it failed here; else 0."""
        if self._save is None:
            return 0
        under_way: tuple[Future[None] | Future[Path] | None, ...] = (self._writing, self._committing)
        return (
            self._save.number if any(f is not None and f.done() and f.exception() is not None for f in under_way) else 0
        )

    @property
    def committed(self) -> int:
        """The number of the newest save that is in place; other ranks than 0 know of none."""
        if self._save is None:
            return self._number
        done = self._committing is not None and self._committing.done() and self._committing.exception() is None
        return self._save.number if done else self._save.number - 1

    def start(self, cursor: Cursor) -> None:
        """Begin a save of this moment. Nothing may be under way."""
        assert self._save is None
        began = time.perf_counter()
        self._number += 1
        state = [self._copied("", kept) for kept in self._stepper.state() if self._saves(kept)]
        weights = [self._copied("weights/", kept) for kept in self._stepper.weights() if self._saves(kept)]
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # the copies below were only asked for
        temporary = self._folder / f"{TEMPORARY}{PREFIX}{cursor.iteration:07d}-{self._number}"
        self._temporary = temporary
        text = cursor.to_json()
        self._writing = self._thread.submit(self._write, temporary, state, weights, text)
        self._committing = None
        self._save = Saved(self._number, cursor.iteration, None, time.perf_counter() - began)

    def poll(self, said: Said) -> Saved | None:
        """The save under way once it is over, on all ranks at the same boundary. `said`: what they agreed on."""
        save = self._save
        if save is None:
            return None
        if said.failed >= save.number:
            return self._given_up(save)
        if said.committed >= save.number:
            path = self._committing.result() if self._committing is not None else None
            return self._over(replace(save, path=path))
        if said.written >= save.number and self._ranks.first and self._committing is None:
            self._committing = self._thread.submit(self._commit, self._temporary, save.iteration)
        return None

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=True)

    def _over(self, save: Saved) -> Saved:
        self._save = None
        return save

    def _given_up(self, save: Saved) -> Saved:
        errors = [f.exception() for f in (self._writing, self._committing) if f is not None and f.done()]
        error = next((f"{error}" for error in errors if error is not None), "another rank could not write its part")
        self._thread.submit(
            shutil.rmtree, self._temporary, ignore_errors=True
        ).result()  # after what still writes there
        return self._over(replace(save, error=error))

    def _saves(self, kept: Kept) -> bool:
        return self._ranks.first or not kept.everywhere

    def _copied(self, prefix: str, kept: Kept) -> Kept:
        """A copy in memory that is used again by the next save."""
        copy = self._copies.get(prefix + kept.key)
        if copy is None:
            copy = torch.empty_like(kept.values, device="cpu", pin_memory=kept.values.is_cuda)
            self._copies[prefix + kept.key] = copy
        copy.copy_(kept.values.detach(), non_blocking=True)
        return Kept(kept.key, kept.start, copy)

    def _write(self, temporary: Path, state: list[Kept], weights: list[Kept], cursor: str) -> None:
        rank, world_size = self._ranks.rank, self._ranks.world_size
        temporary.mkdir(parents=True, exist_ok=True)
        names = [optimizer_file(rank, world_size)]
        write_pieces(temporary / names[0], state)
        if world_size > 1:
            write_pieces(temporary / _MASTERS.format(rank), weights)
        if self._ranks.first:
            names.append(CURSOR)
            (temporary / CURSOR).write_text(cursor)
            if world_size == 1:
                names.append(WEIGHTS)
                self._write_weights(temporary, {kept.key: kept.values for kept in weights})
        left = {name: fingerprint(temporary / name) for name in names}
        for name in names:
            sync(temporary / name)
        (temporary / _LEFT.format(rank)).write_text(json.dumps(left))
        sync(temporary / _LEFT.format(rank))
        sync(temporary)

    def _write_weights(self, temporary: Path, flats: dict[str, Tensor]) -> None:
        exact = {named.parameter: flats[named.key] for named in named_parameters(self._model)}
        save_file(export_published(self._model, exact), temporary / WEIGHTS, metadata={"format": "pt"})

    def _commit(self, temporary: Path, iteration: int) -> Path:
        world_size = self._ranks.world_size
        files: dict[str, object] = {}
        for rank in range(world_size):
            left = temporary / _LEFT.format(rank)
            files |= json.loads(left.read_text())
            left.unlink()
        if world_size > 1:
            masters = [temporary / _MASTERS.format(rank) for rank in range(world_size)]
            pieces = Pieces(masters)
            self._write_weights(temporary, {key: pieces.whole(key) for key in sorted(pieces.keys())})
            for path in masters:
                path.unlink()
            files[WEIGHTS] = fingerprint(temporary / WEIGHTS)
            sync(temporary / WEIGHTS)
        manifest = {"format": FORMAT, "world_size": world_size, "files": files}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1))
        sync(temporary / MANIFEST)
        sync(temporary)
        target = _free_name(self._folder, iteration)
        os.rename(temporary, target)
        sync(self._folder)
        self._retire(target)
        return target

    def _retire(self, newest: Path) -> None:
        """Remove all but the newest, and where wanted the one of each task's best score."""
        found = checkpoints(self._folder)
        stay = {newest, *[path for path in found if path != newest][: self._keep - 1]}
        if self._best:
            stay |= set(best_by_task(found).values())
        for path in found:
            if path not in stay:
                shutil.rmtree(path)


def best_by_task(found: list[Path]) -> dict[str, Path]:
    """Of these checkpoints, newest first, the one that holds each task's best validation score; of equal ones the oldest.

    One that has been damaged holds none.
    """
    best: dict[str, tuple[float, Path]] = {}
    for path in found:
        try:
            scores = Cursor.from_json((path / CURSOR).read_text()).scores
        except (OSError, ValueError):
            continue
        for task, score in scores.items():
            if task not in best or score >= best[task][0]:
                best[task] = score, path
    return {task: path for task, (_, path) in best.items()}


def save(folder: Path, model: ViLBERT, stepper: Stepper, cursor: Cursor, keep: int = 1) -> Path:
    """Save in one process, and wait for it. Raises what writing raised; the checkpoints before it stay."""
    saver = Saver(folder, model, stepper, Ranks(), keep)
    try:
        saver.start(cursor)
        while (saved := saver.poll(saver.says())) is None:
            time.sleep(0.001)
    finally:
        saver.close()
    if saved.path is None:
        raise OSError(saved.error)
    return saved.path


def wait(saver: Saver, agree: Callable[[], Said]) -> Saved | None:
    """Wait for the save under way; `agree` gives what all ranks say. None where there is none."""
    while saver.busy:
        saved = saver.poll(agree())
        if saved is not None:
            return saved
        time.sleep(0.005)
    return None


def _free_name(folder: Path, iteration: int) -> Path:
    """A name later than every other of this iteration: nothing complete is ever written over."""
    name = f"{PREFIX}{iteration:07d}"
    taken = [path.name for path in checkpoints(folder) if path.name.startswith(name)]
    if not taken:
        return folder / name
    return folder / f"{name}-{1 + max(int(other.removeprefix(name).lstrip('-') or 0) for other in taken)}"
