"""Weights out of a folder that DeepSpeed's `save_checkpoint` wrote, of any ZeRO stage, without trusting it.

Such a folder is made of pickles, and DeepSpeed's own `zero_to_fp32`, which knows how their pieces go together, loads them
with all that a pickle can do. So every pickle is gone through first, against a list of what those folders need; and while
`zero_to_fp32` runs, torch itself is held to the same list. The scripts that DeepSpeed leaves in the folder are not run.
"""

from __future__ import annotations

import glob
import io
import os
import pickle
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipelines.errors import BadInput
from pipelines.pickles import Allowed, check_pickle
from pipelines.progress import Show

_MODEL, _OPTIMIZER, _LATEST = "*_model_states.pt", "*_optim_states.pt", "latest"
_DEEPSPEED: Allowed = frozenset(
    {
        ("deepspeed.runtime.fp16.loss_scaler", "LossScaler"),
        ("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler"),
        ("deepspeed.runtime.zero.config", "ZeroStageEnum"),
        ("deepspeed.utils.tensor_fragment", "fragment_address"),
    }
)
"""Plain holders of numbers, which the optimizer's files are full of."""
_STORAGES = ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
ALLOWED: Allowed = _DEEPSPEED | {
    ("collections", "OrderedDict"),
    ("torch", "Size"),
    ("torch", "Tensor"),
    ("torch._tensor", "_rebuild_from_type_v2"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch._utils", "_rebuild_tensor_v2"),
    *(("torch", f"{name}Storage") for name in _STORAGES),
    *(("torch", name) for name in ("float32", "float16", "bfloat16")),
}
"""All that DeepSpeed 0.19 puts into the files of stages 0 to 3."""
_LARGEST = 256 * 2**20
"""Bytes of a file's pickle, without the tensors, which lie beside it."""

_FAILURES = (
    ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, NotImplementedError, OSError, RuntimeError,
    TypeError, ValueError, pickle.UnpicklingError,
)  # fmt: skip
"""What DeepSpeed and torch make of files whose parts do not fit."""


def is_zero_folder(path: Path) -> bool:
    """Whether this looks like what `save_checkpoint` made, or like one of its `global_step…` folders."""
    return path.is_dir() and ((path / _LATEST).is_file() or any(path.glob(_MODEL)))


def read_zero_folder(
    path: Path, show: Show = lambda what, done, total: None, say: Callable[[str], None] = lambda message: None
) -> dict[str, Tensor]:
    """The module's weights by name, float32, of the newest step or of a `global_step…` folder itself. Raises BadInput.

    `say` is told where values are not the exact ones.
    """
    step = _step(path)
    if glob.escape(str(step)) != str(step):
        raise BadInput(step, "DeepSpeed takes [, * and ? in a path for patterns", "rename the folder")
    files = sorted(step.glob("*.pt"))
    if not any(step.glob(_MODEL)):
        raise BadInput(step, f"no {_MODEL} in it", "give a folder that engine.save_checkpoint wrote")
    for number, file in enumerate(files):
        show("checking pickles", number, len(files))
        _check(file)
    show("checking pickles", len(files), len(files))
    with _held_to_the_list():
        try:
            found = _consolidated(step) if any(step.glob(_OPTIMIZER)) else _unsharded(step, say)
            return {str(name): value.detach().float() for name, value in found.items()}
        except _FAILURES as error:
            lines = str(error).strip().splitlines() or [""]
            what = f"its parts do not go together ({type(error).__name__}: {lines[0][:200]})"
            raise BadInput(step, what, "truncated, damaged or incomplete? copy it again") from None


def _step(path: Path) -> Path:
    """The folder with the files of one step. `latest` names it, and nothing but a neighbour."""
    latest = path / _LATEST
    if not latest.is_file():
        return path
    tag = latest.read_bytes()[:200].decode(errors="replace").strip()
    if tag in ("", ".", "..") or Path(tag).name != tag or not (path / tag).is_dir():
        raise BadInput(latest, f"names no folder here: {tag!r}", "give the step's own folder")
    return path / tag


def _check(file: Path) -> None:
    """Raises BadInput unless this is torch's archive with one pickle that asks for nothing but `ALLOWED`."""
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
            pickles = [info for info in archive.infolist() if info.filename.endswith(".pkl")]
            if len(set(names)) < len(names) or [Path(info.filename).name for info in pickles] != ["data.pkl"]:
                raise BadInput(file, "not an archive with one pickle, data.pkl", "is it a file of DeepSpeed's?")
            if pickles[0].file_size > _LARGEST:
                raise BadInput(file, f"a pickle of {pickles[0].file_size} bytes", "is it a file of DeepSpeed's?")
            content = archive.read(pickles[0])
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError) as error:
        raise BadInput(file, f"not an archive of torch's ({error})", "truncated or damaged? copy it again") from None
    check_pickle(content, ALLOWED, where=file)


@contextmanager
def _held_to_the_list() -> Iterator[None]:
    """Within it `torch.load` refuses other globals, whatever its caller asks for; DeepSpeed's prints are kept away."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    harmless: list[Any] = [getattr(import_module(module), name) for module, name in sorted(_DEEPSPEED)]
    names = ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
    before = {name: os.environ.pop(name, None) for name in names}
    os.environ[names[0]] = "1"
    try:
        quiet = io.StringIO()
        with torch.serialization.safe_globals(harmless), redirect_stdout(quiet), redirect_stderr(quiet):
            yield
    finally:
        del os.environ[names[0]]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def _consolidated(step: Path) -> dict[str, Tensor]:
    """Stages 1 to 3, or masters of 16-bit weights: the float32 values that the optimizers of all ranks hold."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint as consolidate

    return dict(consolidate(str(step.parent), tag=step.name))


def _unsharded(step: Path, say: Callable[[str], None]) -> dict[str, Tensor]:
    """Stage 0: the module as it is."""
    found = torch.load(min(step.glob(_MODEL)), map_location="cpu", weights_only=True)
    module: Mapping[str, Tensor] = found["module"]
    rounded = sorted({str(value.dtype) for value in module.values()} - {"torch.float32"})
    if rounded:
        say(f"{step}: stage 0 keeps no float32 weights by name; these are the rounded ones ({', '.join(rounded)})")
    return dict(module)
