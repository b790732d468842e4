"""Whether a state dict is in the published layout, whatever its sizes: the sizes are read off the tensors themselves."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from pydantic import ValidationError
from torch import Tensor

from engine.model.config import ModelConfig
from engine.model.published import TIED, WORDS, listing, modern_name, published_shapes, refuse_untied
from pipelines.errors import BadInput

_TASK_TABLE, _CLASSES = "bert.embeddings.task_embeddings.weight", "cls.imagePredictions.decoder.weight"


def in_published_layout(state: Mapping[str, Tensor], where: object) -> dict[str, Tensor]:
    """A state dict under the published names, float32, whatever its sizes. Raises BadInput that lists what does not fit.

    The trunk (`bert.`) must be whole, and so must the pretraining heads (`cls.`) if any of them is there; their shapes must
    be those of one model. Everything else is heads, and taken as it is. Tied tensors are one tensor twice.
    """
    state = {modern_name(key): value.detach().to("cpu", torch.float32).contiguous() for key, value in state.items()}
    config = _sizes_of(state, where)
    known = published_shapes(config, {})
    if not any(key.startswith("cls.") for key in state):
        known = {key: shape for key, shape in known.items() if not key.startswith("cls.")}
    elif WORDS in state:
        state.setdefault(TIED, state[WORDS])
    wanted = {key: shape for key, shape in known.items() if key.startswith(("bert.", "cls."))}
    missing = sorted(wanted.keys() - state.keys())
    unexpected = sorted(key for key in state if key.startswith(("bert.", "cls.")) and key not in wanted)
    if missing or unexpected:
        raise BadInput(where, listing(missing, unexpected), "is it a whole model under the published names?")
    for key, shape in wanted.items():
        if state[key].shape != shape:
            raise BadInput(f"{where}: {key}", f"shape {list(state[key].shape)}, the other keys want {list(shape)}")
    if TIED in state:
        refuse_untied(state, where)
        state[TIED] = state[WORDS]
    return {key: state[key] for key in [*(key for key in known if key in state), *(state.keys() - known.keys())]}


def _sizes_of(state: Mapping[str, Tensor], where: object) -> ModelConfig:
    """A configuration with the sizes that these tensors show; all that leaves no trace in shapes is arbitrary."""

    def size(key: str, dimension: int = 0) -> int:
        if key not in state:
            raise BadInput(where, f"no {key} in it", "is it a whole model under the published names?")
        if state[key].ndim <= dimension:
            raise BadInput(f"{where}: {key}", f"shape {list(state[key].shape)}", "is it a file of weights?")
        return state[key].shape[dimension]

    def layers(prefix: str) -> int:
        found = (re.match(rf"{re.escape(prefix)}\.(\d{{1,3}})\.", key) for key in state)
        return 1 + max((int(match[1]) for match in found if match), default=0)

    bridges = layers("bert.encoder.c_layer")
    try:
        return ModelConfig(
            vocab_size=size(WORDS), hidden_size=size(WORDS, 1),
            max_position_embeddings=size("bert.embeddings.position_embeddings.weight"),
            type_vocab_size=size("bert.embeddings.token_type_embeddings.weight"),
            task_rows=size(_TASK_TABLE) if _TASK_TABLE in state else 0,
            num_hidden_layers=layers("bert.encoder.layer"), num_attention_heads=1,
            intermediate_size=size("bert.encoder.layer.0.intermediate.dense.weight"),
            v_hidden_size=size("bert.v_embeddings.image_embeddings.weight"),
            v_feature_size=size("bert.v_embeddings.image_embeddings.weight", 1),
            v_num_hidden_layers=layers("bert.encoder.v_layer"), v_num_attention_heads=1,
            v_intermediate_size=size("bert.encoder.v_layer.0.intermediate.dense.weight"),
            bi_hidden_size=size("bert.encoder.c_layer.0.biattention.query1.weight"), bi_num_attention_heads=1,
            v_biattention_id=(0,) * bridges, t_biattention_id=(0,) * bridges,
            v_target_size=size(_CLASSES) if _CLASSES in state else 1,
        )  # fmt: skip
    except ValidationError as error:
        raise BadInput(where, f"sizes of no model: {error.errors()[0]['msg']}") from None
