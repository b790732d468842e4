"""Checkpoints: complete or absent, verified before use, readable by the authors' code and by any number of ranks.

A checkpoint is a folder `iteration-<n>` (`iteration-<n>-<k>` where a stop and a regular save meet):

    weights.safetensors                    all weights in float32, in the published layout
    optimizer-<rank>-of-<ranks>.safetensors   what each rank kept of the optimizer's state, flat pieces with their places
    cursor.json                            all else that a run must remember
    manifest.json                          every file with its size and SHA-256, written last

The folder is filled under another name and renamed (`engine.saving`), so a killed save leaves nothing that looks like a
checkpoint. The pieces are of float32 tensors whose places do not depend on the number of ranks, nor on who sharded them: a run
continues on more ranks, on fewer, at another ZeRO stage, or without DeepSpeed. `engine.convert` makes checkpoints of no ranks:
weights alone, to begin from.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.cursor import FORMAT, Cursor
from engine.model.published import flats_of_published
from engine.model.vilbert import ViLBERT
from engine.slices import Kept, units
from engine.step import Stepper
from pipelines.errors import BadInput

PREFIX, TEMPORARY = "iteration-", ".tmp-"
WEIGHTS, CURSOR, MANIFEST = "weights.safetensors", "cursor.json", "manifest.json"


def optimizer_file(rank: int, world_size: int) -> str:
    """Name of the file with what one rank kept."""
    return f"optimizer-{rank:05d}-of-{world_size:05d}.safetensors"


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first, verified or not."""
    found = [path for path in folder.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).replace("-", "").isdigit()]
    return sorted(found, key=lambda path: tuple(map(int, path.name.removeprefix(PREFIX).split("-"))), reverse=True)


def newest_valid(folder: Path) -> tuple[Path, list[str]]:
    """The newest checkpoint that verifies, and one line per newer one that does not. Raises BadInput if none does."""
    refused = []
    for path in checkpoints(folder):
        try:
            verify(path)
        except BadInput as error:
            refused.append(str(error))
        else:
            return path, refused
    raise BadInput(folder, "no usable checkpoint" + "".join(f"; {line}" for line in refused), "start a new run")


def verify(path: Path) -> None:
    """Check every file's size and SHA-256 against the manifest. Raises BadInput naming the file."""
    files = _manifest(path)
    for name, expected in files.items():
        if not (path / name).is_file() or fingerprint(path / name) != expected:
            raise BadInput(path / name, "is not what the manifest says", "the checkpoint is damaged")


def _manifest(path: Path) -> dict[str, Any]:
    """Fingerprints by file name, of all files that this version reads."""
    where = path / MANIFEST
    try:
        manifest = json.loads(where.read_text())
        version, files, world_size = manifest["format"], dict(manifest["files"]), int(manifest["world_size"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(where, f"not readable: {error}", "the checkpoint is incomplete") from None
    if version != FORMAT:
        raise BadInput(path, f"checkpoint format {version}, this version reads {FORMAT}")
    wanted = {WEIGHTS, CURSOR, *(optimizer_file(rank, world_size) for rank in range(world_size))}
    if files.keys() != wanted:
        names = ", ".join(sorted(wanted ^ files.keys()))
        raise BadInput(where, f"files of {world_size} ranks do not fit: {names}", "the checkpoint is damaged")
    return files


def load(path: Path, model: ViLBERT, stepper: Stepper) -> Cursor:
    """Put a verified checkpoint into model and optimizer, bit for bit, whatever made it. BadInput for one of another run."""
    try:
        state = Pieces([path / name for name in _manifest(path) if name.startswith("optimizer-")])
        if not state.keys():
            raise BadInput(path, "holds weights alone", "begin a run with it: initial_weights")
        ours, theirs = (sorted({key.partition("/")[0] for key in keys}) for keys in (units(model), state.keys()))
        if ours != theirs:
            raise ValueError(f"it has the heads {', '.join(theirs)}, the run {', '.join(ours)}")
        for kept in stepper.state():
            state.fill(kept)
        flats = flats_of_published(model, load_file(path / WEIGHTS), path)
        for kept in stepper.weights():
            kept.values.copy_(flats[kept.key][kept.start : kept.start + kept.values.numel()])
        stepper.loaded()
        return Cursor.from_json((path / CURSOR).read_text())
    except (KeyError, ValueError, RuntimeError, SafetensorError) as error:
        raise BadInput(
            path, f"does not belong to this run: {error}", "resume with the run's own configuration"
        ) from None


def weights(path: Path) -> dict[str, Tensor]:
    """Verified weights in the published layout: of a checkpoint folder, or of a run folder's newest checkpoint."""
    if (path / "checkpoints").is_dir():
        path, _ = newest_valid(path / "checkpoints")
    verify(path)
    return load_file(path / WEIGHTS)


def write_pieces(path: Path, kept: Sequence[Kept]) -> None:
    """Write what one rank kept; each tensor's place among its flat whole is in the file's metadata."""
    starts = {one.key: one.start for one in kept}
    save_file({one.key: one.values for one in kept}, path, metadata={"starts": json.dumps(starts)})


class Pieces:
    """Flat tensors whose pieces lie in several files."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Raises BadInput for a file that `write_pieces` did not write."""
        self._places: defaultdict[str, list[tuple[int, int, Any]]] = defaultdict(list)
        for path in paths:
            file = safe_open(path, framework="pt")
            try:
                starts: Mapping[str, int] = json.loads(file.metadata()["starts"])
                for key in file.keys():  # noqa: SIM118 (not a mapping)
                    length = file.get_slice(key).get_shape()[0]
                    self._places[key].append((int(starts[key]), length, file))
            except (KeyError, TypeError, ValueError) as error:
                raise BadInput(path, f"not the state of a rank: {error}", "the checkpoint is damaged") from None

    def keys(self) -> list[str]:
        """Every tensor that has a piece."""
        return list(self._places)

    def numel(self, key: str) -> int:
        """Values of the whole."""
        return max(start + length for start, length, _ in self._places[key])

    def fill(self, wanted: Kept) -> None:
        """Write the piece's values, from wherever they lie. ValueError where some lie nowhere."""
        first, last = wanted.start, wanted.start + wanted.values.numel()
        at = first
        for start, length, file in sorted(self._places.get(wanted.key, []), key=lambda place: place[:2]):
            stop = min(start + length, last)
            if start <= at < stop:
                wanted.values[at - first : stop - first].copy_(file.get_slice(wanted.key)[at - start : stop - start])
                at = stop
        if at < last:
            raise ValueError(f"{wanted.key} has no values {at} to {last}")

    def whole(self, key: str) -> Tensor:
        """The whole tensor, flat float32."""
        values = torch.empty(self.numel(key))
        self.fill(Kept(key, 0, values))
        return values


def fingerprint(path: Path) -> dict[str, object]:
    """What the manifest says of a file."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def remove_unfinished(folder: Path) -> None:
    """Remove what killed saves left. Nobody may be saving here."""
    for left in folder.glob(f"{TEMPORARY}*"):
        shutil.rmtree(left)
