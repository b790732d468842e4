"""`python -m engine.convert SRC DST`: weights from one form into another, float32, under the published names.

SRC
  run or checkpoint     a run folder (its newest checkpoint that verifies), or one checkpoint of it
  .safetensors, .bin    a file in the published layout, as this engine or the authors write it (560 keys, full size)
  ZeRO folder           what DeepSpeed's engine.save_checkpoint wrote at stage 0 to 3 (with a file `latest`, or a
                        global_step... folder itself), of a module under the published names
DST, by its suffix or --to
  .safetensors, .bin    a file; .bin is what the authors' code loads
  no suffix             a checkpoint folder of weights alone, with a manifest: what initial_weights of a run takes

A ZeRO folder is made of pickles. All are gone through before anything is loaded, and one that asks for more than tensors
and DeepSpeed's few plain classes is refused: nothing of its own runs. Moments and counters are not converted. Nor is
anything divided for N ranks, for nothing needs it: a run resumes from its checkpoint on any number of ranks as it is.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from engine import checkpoint
from engine.checkpoint import CURSOR, MANIFEST, WEIGHTS, fingerprint
from engine.cursor import FORMAT, Cursor
from engine.house import check_imports
from engine.model.layout import in_published_layout
from engine.model.published import TIED, WORDS, read_state
from engine.zero_folder import is_zero_folder, read_zero_folder
from pipelines.errors import BadInput
from pipelines.files import sync
from pipelines.progress import Show, progress_on_stderr

State = Mapping[str, Tensor]


class Converted(NamedTuple):
    """What went from one place to the other."""

    tensors: int
    values: int
    """Tied ones once."""


def convert(
    source: Path,
    target: Path,
    form: str | None = None,
    verify: bool = False,
    show: Show = lambda what, done, total: None,
    say: Callable[[str], None] = lambda message: None,
) -> Converted:
    """Write the weights of `source` to `target`. Raises BadInput; what is at `target` is then what was there before.

    `form`: a key of `FORMS`; by default the suffix of `target` says it. `verify`: read `target` back and compare every bit; a
    `target` that is there already is then only compared.
    """
    form = form or target.suffix.lstrip(".") or "checkpoint"
    if form not in FORMS:
        raise BadInput(target, f"no form for the suffix {target.suffix}", f"--to one of {', '.join(FORMS)}")
    there = target.exists()
    if there and not verify:
        raise BadInput(target, "exists already", "remove it, choose another name, or compare with --verify")
    if not there and not target.absolute().parent.is_dir():
        raise BadInput(target.parent, "no such folder", "make it first")
    state = read(source, show, say)
    if not there:
        show("writing", 0, 1)
        write_whole(FORMS[form], state, target)
        show("writing", 1, 1)
    if verify:
        _compare(state, read(target, show, say), target, show)
    return Converted(len(state), sum(value.numel() for key, value in state.items() if key != TIED))


def read(source: Path, show: Show, say: Callable[[str], None]) -> dict[str, Tensor]:
    """The weights of any of the forms, float32, under the published names. Raises BadInput."""
    show("reading", 0, 1)
    if (source / "checkpoints").is_dir():
        path, refused = checkpoint.newest_valid(source / "checkpoints")
        for line in refused:
            say(f"checkpoint refused: {line}")
        say(f"{source}: its newest checkpoint is {path.name}")
        state = checkpoint.weights(path)
    elif (source / MANIFEST).is_file():
        state = checkpoint.weights(source)
    elif is_zero_folder(source):
        state = read_zero_folder(source, show, say)
    elif source.is_dir():
        raise BadInput(source, "neither a run, nor a checkpoint, nor a ZeRO folder", "give one of these, or a file")
    else:
        state = read_state(source)
    state = in_published_layout(state, source)
    show("reading", 1, 1)
    return state


def write_safetensors(state: State, path: Path) -> None:
    """A file. Tied tensors are written twice: the format knows no other way."""
    alone = _own_memory(state)
    if TIED in alone:
        alone[TIED] = alone[TIED].clone()
    save_file(alone, path, metadata={"format": "pt"})


def _bin(state: State, path: Path) -> None:
    """A plain state dict, as the authors' code wants it; tied tensors are one."""
    torch.save(_own_memory(state), path)


def _checkpoint(state: State, path: Path) -> None:
    """A checkpoint of no ranks: nothing of an optimizer, the cursor of a run that has not begun."""
    path.mkdir()
    write_safetensors(state, path / WEIGHTS)
    (path / CURSOR).write_text(Cursor().to_json())
    files = {name: fingerprint(path / name) for name in (WEIGHTS, CURSOR)}
    (path / MANIFEST).write_text(json.dumps({"format": FORMAT, "world_size": 0, "files": files}, indent=1))


FORMS: dict[str, Callable[[State, Path], None]] = {
    "safetensors": write_safetensors,
    "bin": _bin,
    "checkpoint": _checkpoint,
}


def _own_memory(state: State) -> dict[str, Tensor]:
    """The same tensors, none of them a part of a larger memory, which a file would keep whole; tied ones stay one."""
    own = {
        key: value.clone() if value.untyped_storage().nbytes() > value.nbytes else value for key, value in state.items()
    }
    return own | ({TIED: own[WORDS]} if TIED in own else {})


def write_whole(form: Callable[[State, Path], None], state: State, target: Path) -> None:
    """Let `form` write a file or folder under another name first; nothing half written ever bears the name asked for."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        form(state, temporary)
        for path in [*temporary.glob("*"), temporary]:
            sync(path)
        os.rename(temporary, target)
        sync(target.absolute().parent)
    except BaseException:
        shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink(missing_ok=True)
        raise


def _compare(state: State, other: State, where: Path, show: Show) -> None:
    """Raises BadInput unless both hold the same bits."""
    if state.keys() != other.keys():
        names = ", ".join(sorted(state.keys() ^ other.keys())[:6])
        raise BadInput(where, f"not the same keys: {names}", "it holds another model")
    for number, (key, value) in enumerate(state.items(), 1):
        if value.shape != other[key].shape or not torch.equal(value.view(torch.int32), other[key].view(torch.int32)):
            raise BadInput(f"{where}: {key}", "differs", "it holds other weights, or is damaged")
        show("comparing", number, len(state))


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m engine.convert", description=__doc__, epilog="Exit codes: 0 done, 2 bad input, 130 interrupted.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("source", metavar="SRC", type=Path)
    parser.add_argument("target", metavar="DST", type=Path)
    parser.add_argument("--to", choices=[*FORMS], help="what DST becomes; by default its suffix says it")
    parser.add_argument(
        "--verify", action="store_true", help="compare DST with SRC bit for bit; if it is there already, only that"
    )
    arguments = parser.parse_args(argv)
    try:
        check_imports()
        with progress_on_stderr() as show:
            done = convert(
                arguments.source, arguments.target, arguments.to, arguments.verify, show,
                lambda message: print(message, file=sys.stderr),
            )  # fmt: skip
    except (BadInput, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was left behind", file=sys.stderr)
        return 130
    same = "; every bit compared" if arguments.verify else ""
    print(f"{arguments.target}: {done.tensors} tensors, {done.values:,} values{same}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
