"""Checkpoints: complete or absent, verified before use, readable by the authors' code.

A checkpoint is a folder `iteration-<n>` (`iteration-<n>-<k>` where a stop and a regular save meet):
`weights.safetensors` (the published layout), `optimizer.safetensors`, `cursor.json`, and `manifest.json`, which names
every file with its size and SHA-256 and is written last. The folder is filled under another name and renamed, so a
killed save leaves nothing that looks like a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from engine.cursor import FORMAT, Cursor
from engine.model.published import export_published, load_published
from engine.model.vilbert import ViLBERT
from engine.optimizer import Optimizer
from pipelines.errors import BadInput

_PREFIX, _TEMPORARY = "iteration-", ".tmp-"
_FILES = ("weights.safetensors", "optimizer.safetensors", "cursor.json")


def save(folder: Path, model: ViLBERT, optimizer: Optimizer, cursor: Cursor, keep: int) -> Path:
    """Write a checkpoint into `folder`, then remove all but the newest `keep`. A failure leaves the older ones."""
    folder.mkdir(parents=True, exist_ok=True)
    target = _free_name(folder, cursor.iteration)
    temporary = folder / f"{_TEMPORARY}{target.name}"
    for left in folder.glob(f"{_TEMPORARY}*"):  # by a killed process
        shutil.rmtree(left)
    temporary.mkdir()
    try:
        save_file(
            export_published(model, optimizer.masters()), temporary / "weights.safetensors", metadata={"format": "pt"}
        )
        save_file({k: v.contiguous() for k, v in optimizer.state_dict().items()}, temporary / "optimizer.safetensors")
        (temporary / "cursor.json").write_text(cursor.to_json())
        files = {name: _fingerprint(temporary / name) for name in _FILES}
        (temporary / "manifest.json").write_text(json.dumps({"format": FORMAT, "files": files}, indent=1))
        for name in (*_FILES, "manifest.json"):
            _sync(temporary / name)
        _sync(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    os.rename(temporary, target)
    _sync(folder)
    for old in [path for path in checkpoints(folder) if path != target][keep - 1 :]:
        shutil.rmtree(old)
    return target


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first, verified or not."""
    found = [path for path in folder.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).replace("-", "").isdigit()]
    return sorted(found, key=lambda path: tuple(map(int, path.name.removeprefix(_PREFIX).split("-"))), reverse=True)


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
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        version, files = manifest["format"], dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(path / "manifest.json", f"not readable: {error}", "the checkpoint is incomplete") from None
    if version != FORMAT:
        raise BadInput(path, f"checkpoint format {version}, this version reads {FORMAT}")
    for name in _FILES:
        if name not in files:
            raise BadInput(path / "manifest.json", f"does not name {name}", "the checkpoint is damaged")
        if not (path / name).is_file() or _fingerprint(path / name) != files[name]:
            raise BadInput(path / name, "is not what the manifest says", "the checkpoint is damaged")


def load(path: Path, model: ViLBERT, optimizer: Optimizer) -> Cursor:
    """Put a verified checkpoint into model and optimizer, bit for bit. Raises BadInput for one of another run."""
    load_published(model, load_file(path / "weights.safetensors"), path)
    try:
        optimizer.load_state_dict(load_file(path / "optimizer.safetensors"))
        return Cursor.from_json((path / "cursor.json").read_text())
    except (KeyError, ValueError, RuntimeError) as error:
        raise BadInput(
            path, f"does not belong to this run: {error}", "resume with the run's own configuration"
        ) from None


def _free_name(folder: Path, iteration: int) -> Path:
    """A name later than every other of this iteration: nothing complete is ever written over."""
    name = f"{_PREFIX}{iteration:07d}"
    taken = [path.name for path in checkpoints(folder) if path.name.startswith(name)]
    if not taken:
        return folder / name
    return folder / f"{name}-{1 + max(int(other.removeprefix(name).lstrip('-') or 0) for other in taken)}"


def _fingerprint(path: Path) -> dict[str, object]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def weights(path: Path) -> dict[str, torch.Tensor]:
    """Verified weights in the published layout: of a checkpoint folder, or of a run folder's newest checkpoint."""
    if (path / "checkpoints").is_dir():
        path, _ = newest_valid(path / "checkpoints")
    verify(path)
    return load_file(path / "weights.safetensors")
