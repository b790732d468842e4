"""`ModelConfig`: the published configuration keys that mean something, checked. Imports no torch."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipelines.errors import BadInput

_NEVER_READ = frozenset(
    {"hidden_act", "v_hidden_act", "v_initializer_range", "pooling_method", "bi_intermediate_size", "bi_attention_type"}
    | {"num_negative", "model", "task_specific_tokens", "visualization", "fast_mode", "in_batch_pairs", "objective"}
)
"""Keys of the published JSON files that do not change what the twelve tasks compute (spec section 1.1)."""

_ONLY_DEFAULT = {"visual_target": 0, "dynamic_attention": False, "with_coattention": True}
_ONLY_DEFAULT |= {"fixed_v_layer": 0, "fixed_t_layer": 0}
"""Keys that would change the computation; only the paper's value is supported."""


class ModelConfig(BaseModel):
    """Sizes of the two-stream encoder, under the published names (spec section 1.1). `v_`: image, `bi_`: co-attention."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    vocab_size: int = Field(30522, gt=0, description="WordPiece entries")
    max_position_embeddings: int = Field(512, gt=0, description="longest text in tokens, without the task token")
    type_vocab_size: int = Field(2, gt=0, description="segment types; all twelve tasks use segment 0")
    task_rows: int = Field(20, ge=0, description="rows of the task-token table; 0 leaves the table out")
    hidden_size: int = Field(768, gt=0, description="text width")
    num_hidden_layers: int = Field(12, ge=1, description="text layers")
    num_attention_heads: int = Field(12, ge=1, description="text heads")
    intermediate_size: int = Field(3072, gt=0, description="text feed-forward width")
    v_feature_size: int = Field(2048, gt=0, description="region feature width")
    v_target_size: int = Field(1601, gt=0, description="detector classes (background included), for pretraining")
    v_hidden_size: int = Field(1024, gt=0, description="image width")
    v_num_hidden_layers: int = Field(6, ge=1, description="image layers")
    v_num_attention_heads: int = Field(8, ge=1, description="image heads")
    v_intermediate_size: int = Field(1024, gt=0, description="image feed-forward width")
    bi_hidden_size: int = Field(1024, gt=0, description="co-attention and pooled width")
    bi_num_attention_heads: int = Field(8, ge=1, description="co-attention heads")
    v_biattention_id: tuple[int, ...] = Field((0, 1, 2, 3, 4, 5), description="image layers run before each bridge")
    t_biattention_id: tuple[int, ...] = Field((6, 7, 8, 9, 10, 11), description="text layers run before each bridge")
    fusion_method: Literal["mul", "sum"] = Field("mul", description="how the two pooled vectors meet")
    hidden_dropout_prob: float = Field(0.1, ge=0, lt=1, description="text dropout, and both embeddings")
    attention_probs_dropout_prob: float = Field(0.1, ge=0, lt=1, description="dropout on text attention")
    v_hidden_dropout_prob: float = Field(0.1, ge=0, lt=1, description="image dropout")
    v_attention_probs_dropout_prob: float = Field(0.1, ge=0, lt=1, description="dropout on image attention")
    head_dropout_prob: float = Field(
        0.1, ge=0, lt=1, description="dropout of the pooled product and before region logits"
    )
    initializer_range: float = Field(0.02, gt=0, description="standard deviation of new weights")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for width, heads in (
            ("hidden_size", "num_attention_heads"),
            ("v_hidden_size", "v_num_attention_heads"),
            ("bi_hidden_size", "bi_num_attention_heads"),
        ):
            if getattr(self, width) % getattr(self, heads):
                raise ValueError(f"{width} {getattr(self, width)} is no multiple of {heads} {getattr(self, heads)}")
        if not self.v_biattention_id or len(self.v_biattention_id) != len(self.t_biattention_id):
            raise ValueError("v_biattention_id and t_biattention_id need the same number of entries, at least one")
        for key, layers in (
            ("v_biattention_id", self.v_num_hidden_layers),
            ("t_biattention_id", self.num_hidden_layers),
        ):
            ids = getattr(self, key)
            if list(ids) != sorted(ids) or ids[0] < 0 or ids[-1] > layers:
                raise ValueError(f"{key} {list(ids)} must ascend within 0..{layers}")
        return self

    @property
    def n_bridges(self) -> int:
        """Co-attention layers."""
        return len(self.v_biattention_id)

    @classmethod
    def from_published(cls, keys: dict[str, Any], where: object = "model configuration") -> ModelConfig:
        """From a published JSON file's keys. Raises BadInput for keys unknown to the authors' code or to this model."""
        known = {}
        for key, value in keys.items():
            if key in _ONLY_DEFAULT:
                if value != _ONLY_DEFAULT[key]:
                    raise BadInput(f"{where}: {key}", f"{value!r} is not supported", f"use {_ONLY_DEFAULT[key]!r}")
            elif key not in _NEVER_READ:
                known[key] = value
        try:
            return cls(**known)
        except ValidationError as error:
            first = error.errors()[0]
            path = ".".join(str(part) for part in first["loc"]) or "keys"
            raise BadInput(f"{where}: {path}", first["msg"]) from None
