"""Import and export of the authors' checkpoint layout (spec section 1.9), strictly: no key is lost, none is guessed."""

from __future__ import annotations

import pickle
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from engine.model.config import ModelConfig
from engine.model.flat import is_scale
from engine.model.heads import HeadSpec
from engine.model.vilbert import ViLBERT
from engine.slices import named_parameters
from pipelines.errors import BadInput

PUBLISHED_HEADS = {
    "vil_prediction": HeadSpec("answers", 3129),
    "vil_prediction_gqa": HeadSpec("answers", 1533),
    "vil_logit": HeadSpec("match", 1),
    "vision_logit": HeadSpec("regions", 1),
    "vil_binary_prediction": HeadSpec("paired_classes", 2),
    "vil_tri_prediction": HeadSpec("classes", 3),
}
"""The paper's six task heads with their published sizes."""

WORDS = "bert.embeddings.word_embeddings.weight"
TIED = "cls.predictions.decoder.weight"
_LISTED = 6


def published_shapes(config: ModelConfig, heads: Mapping[str, HeadSpec]) -> dict[str, tuple[int, ...]]:
    """Every key of the published layout and its shape: `heads` beside the published heads that they do not replace."""
    with torch.device("meta"):
        whole = ViLBERT(config, {**PUBLISHED_HEADS, **heads}, pretraining=True)
    shapes = {key: tuple(view.shape) for key, view in whole.published()}
    shapes[TIED] = shapes[WORDS]
    for k in range(config.n_bridges):  # in the checkpoint, called by nothing
        for side, width in ((1, config.v_hidden_size), (2, config.hidden_size)):
            shapes[f"bert.encoder.c_layer.{k}.biOutput.q_dense{side}.weight"] = (width, config.bi_hidden_size)
            shapes[f"bert.encoder.c_layer.{k}.biOutput.q_dense{side}.bias"] = (width,)
    shapes["linguisic_logit.weight"] = (1, config.hidden_size)  # the authors' spelling
    shapes["linguisic_logit.bias"] = (1,)
    return shapes


@torch.no_grad()
def load_published(
    model: ViLBERT, state: Mapping[str, Tensor], where: object, fresh: Collection[str] = ()
) -> list[str]:
    """Copy a published state dict into the model; what the model does not train is carried for export.

    `fresh`: prefixes (a head's name, `bert.embeddings.task_embeddings`, `cls`) that may be absent, or of another shape,
    and then keep the weights they have; those are returned. Raises BadInput that lists missing, unexpected or misshapen
    keys. What a run exported without having trained it (all zeros) counts as absent.
    """
    state = {modern_name(key): value for key, value in state.items()}
    trained = dict(model.published())
    known = published_shapes(model.config, model.head_specs)
    untrained = _never_trained(model, state)
    misfits = [key for key, target in trained.items() if key in state and state[key].shape != target.shape]
    replaced = [prefix for prefix in fresh if any(_under(key, prefix) for key in misfits)]
    state = {
        key: value
        for key, value in state.items()
        if key not in untrained and not any(_under(key, prefix) for prefix in replaced)
    }
    missing = sorted(key for key in known if key not in state)
    absent = sorted({prefix for prefix in fresh for key in missing if _under(key, prefix)})
    missing = [key for key in missing if not any(_under(key, prefix) for prefix in fresh)]
    unexpected = sorted(key for key in state if key not in known)
    if missing or unexpected:
        raise BadInput(where, listing(missing, unexpected, bool(untrained)), _mend(missing))
    for key, target in trained.items():
        if key in state and state[key].shape != target.shape:
            raise BadInput(
                f"{where}: {key}",
                f"shape {list(state[key].shape)}, the model has {list(target.shape)}",
                "use the checkpoint's configuration and answer vocabulary, or name the key's prefix under fresh_weights",
            )
    if TIED in state and WORDS in state:
        refuse_untied(state, where)
    for key, target in trained.items():
        if key in state:
            target.copy_(state[key])
    model.carried = {key: value.clone() for key, value in state.items() if key not in trained and key != TIED}
    return absent


def export_published(model: ViLBERT, exact: Mapping[nn.Parameter, Tensor] | None = None) -> dict[str, Tensor]:
    """The whole published layout in float32 on the CPU. What was neither trained nor carried is new: zeros, scales 1."""
    state: dict[str, Tensor] = {}
    trained = {key: value for block in model.blocks() for key, value in block.published(exact=exact)}
    for key, shape in published_shapes(model.config, model.head_specs).items():
        if key == TIED:
            continue
        if key in trained:
            value = trained[key]
        elif key in model.carried:
            value = model.carried[key]
        else:
            value = torch.ones(shape) if is_scale(key) else torch.zeros(shape)
        state[key] = value.detach().to("cpu", torch.float32, copy=True).contiguous()
    state[TIED] = state[WORDS].clone()
    return state


def flats_of_published(model: ViLBERT, state: Mapping[str, Tensor], where: Path) -> dict[str, Tensor]:
    """Every flat parameter's values, float32, by `unit/name`, from a published layout that this model exported.

    Unlike `load_published` it writes into no parameter, which may be sharded. KeyError for what the layout lacks; what the
    model does not train is carried.
    """
    flats, trained = {}, set()
    for named in named_parameters(model):
        flat = torch.zeros(named.numel)
        for part in named.parts:
            key = f"{named.prefix}{part.name}"
            trained.add(key)
            if state[key].shape != part.shape:
                raise ValueError(f"{key} is {list(state[key].shape)}, the model has {list(part.shape)}")
            part.of(flat).copy_(state[key])
        flats[named.key] = flat
    model.carried = {key: value.clone() for key, value in state.items() if key not in trained and key != TIED}
    return flats


def read_state(path: Path) -> dict[str, Tensor]:
    """A state dict from a `.safetensors` file or a `.bin` / `.pt` of plain tensors (nothing else is unpickled)."""
    if path.is_dir():
        path = path / "weights.safetensors"
    if not path.is_file():
        raise BadInput(path, "no such checkpoint", "give a .safetensors or .bin file, or a checkpoint folder")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, ValueError, OSError, KeyError) as error:
        raise BadInput(path, f"not a readable checkpoint: {_first_line(error)}", "it may be truncated") from None
    except pickle.UnpicklingError as error:  # anything but plain tensors
        refused = re.search(r"GLOBAL (\S+)", str(error))
        what = f"refused: it wants to run {refused[1]}" if refused else "refused: not a file of tensors"
        raise BadInput(path, what, "only plain state dicts of tensors are read") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise BadInput(path, "not a plain state dict of tensors")
    return state


@torch.no_grad()
def load_bert(model: ViLBERT, folder_or_file: Path) -> int:
    """Fill the text stream (and the word-prediction head, if present) from a public BERT; returns tensors copied.

    Names as the common libraries save them, with or without `bert.`, gamma/beta or weight/bias. Its pooler and
    next-sentence head have no counterpart here (spec section 1.8).
    """
    path = folder_or_file
    if path.is_dir():
        candidates = [path / name for name in ("model.safetensors", "pytorch_model.bin") if (path / name).is_file()]
        if not candidates:
            raise BadInput(path, "holds neither model.safetensors nor pytorch_model.bin")
        path = candidates[0]
    state = {modern_name(key): value for key, value in read_state(path).items()}
    if not any(key.startswith("bert.") for key in state):
        state = {key if key.startswith("cls.") else f"bert.{key}": value for key, value in state.items()}
    wanted = {
        key: target
        for key, target in model.published()
        if key.startswith(("bert.embeddings.", "bert.encoder.layer.", "cls.predictions."))
        and not key.startswith("bert.embeddings.task_embeddings")
    }
    missing = sorted(key for key in wanted if key not in state and not key.startswith("cls."))
    if missing:
        raise BadInput(path, listing(missing), "is this a BERT of the text stream's size?")
    for key, target in wanted.items():
        if key not in state:
            continue
        if state[key].shape != target.shape:
            raise BadInput(f"{path}: {key}", f"shape {list(state[key].shape)}, the text stream has {list(target.shape)}",
                           "choose a model configuration of that size")  # fmt: skip
        target.copy_(state[key])
    return sum(key in state for key in wanted)


def refuse_untied(state: Mapping[str, Tensor], where: object) -> None:
    """Raises BadInput where the two names of the word table hold different values."""
    if not torch.equal(state[TIED], state[WORDS]):
        raise BadInput(f"{where}: {TIED}", f"differs from {WORDS}, to which it is tied", "the file is damaged")


def modern_name(key: str) -> str:
    """A published key as it is written today: no `module.`, weight and bias of LayerNorms."""
    key = key.removeprefix("module.")
    for old, new in ((".gamma", ".weight"), (".beta", ".bias")):
        if key.endswith(old):
            key = key[: -len(old)] + new
    return key


def _under(key: str, prefix: str) -> bool:
    return key == prefix or key.startswith(f"{prefix}.")


def _never_trained(model: ViLBERT, state: Mapping[str, Tensor]) -> set[str]:
    """Keys of the blocks whose matrices are all zeros in `state`: exported for the layout's sake, fit to train nothing."""
    keys: set[str] = set()
    for block in model.blocks():
        matrices = [
            state[f"{block.prefix}{part.name}"] for part in block.matrix_parts if f"{block.prefix}{part.name}" in state
        ]
        if matrices and not any(bool(matrix.any()) for matrix in matrices):
            keys.update(key for key, _ in block.published())
    return keys


def listing(missing: list[str], unexpected: Sequence[str] = (), untrained: bool = False) -> str:
    """What is wrong with a set of keys, the first few of each kind named."""

    def some(keys: Sequence[str]) -> str:
        return ", ".join(keys[:_LISTED]) + (f", … ({len(keys) - _LISTED} more)" if len(keys) > _LISTED else "")

    parts = []
    if missing:
        parts.append(f"{len(missing)} {'missing or never trained' if untrained else 'missing'} keys: {some(missing)}")
    if unexpected:
        parts.append(f"{len(unexpected)} unexpected keys: {some(unexpected)}")
    return "; ".join(parts)


def _mend(missing: list[str]) -> str:
    if not missing:
        return "the file is of another model, or of a run with another head: add the task of that head"
    return "to start some parts anew, name their prefixes under fresh_weights"


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
