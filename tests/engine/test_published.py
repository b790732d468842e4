"""Import and export of the published layout, and of public BERT files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from engine.model.config import ModelConfig
from engine.model.heads import HeadSpec
from engine.model.published import (
    PUBLISHED_HEADS,
    export_published,
    load_bert,
    load_published,
    published_shapes,
    read_state,
)
from engine.model.vilbert import ViLBERT
from pipelines.errors import BadInput
from tests.reference import reference


def small_config() -> ModelConfig:
    return ModelConfig.from_published(json.loads((reference("golden") / "meta.json").read_text())["config"])


def loaded(heads: dict[str, HeadSpec], pretraining: bool = False) -> tuple[ViLBERT, dict[str, torch.Tensor]]:
    state = read_state(reference("golden") / "weights.safetensors")
    model = ViLBERT(small_config(), heads, pretraining)
    load_published(model, state, "golden")
    return model, state


def test_full_size_layout_is_the_published_key_list() -> None:
    listed = {}
    for line in (reference("reference/state-dict.txt")).read_text().splitlines():
        if line and line[0] != "#":
            key, shape = line.lstrip("=").split("\t")[:2]
            listed[key.strip()] = tuple(int(size) for size in shape.strip().split("x"))
        if line.startswith("# Bert"):
            break
    ours = published_shapes(ModelConfig(), {})
    assert len(listed) == 560
    assert ours == listed
    tied = "cls.predictions.decoder.weight"
    assert sum(torch.Size(shape).numel() for key, shape in ours.items() if key != tied) == 268_028_859


@pytest.mark.parametrize("pretraining", [False, True])
@pytest.mark.parametrize("heads", [PUBLISHED_HEADS, {"vil_logit": HeadSpec("match", 1)}], ids=["all heads", "one head"])
def test_round_trip_is_bit_exact(heads: dict[str, HeadSpec], pretraining: bool) -> None:
    model, state = loaded(heads, pretraining)
    exported = export_published(model)
    assert exported.keys() == state.keys()
    assert all(torch.equal(exported[key], state[key]) for key in state)


def test_bin_and_safetensors_hold_the_same() -> None:
    first, second = (read_state(reference("golden") / name) for name in ("weights.bin", "weights.safetensors"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_trunk_has_few_tensors() -> None:
    with torch.device("meta"):
        trunk = ViLBERT(ModelConfig(), PUBLISHED_HEADS).trunk
    assert len(list(trunk.parameters())) <= 60


def test_missing_unexpected_and_misshapen_keys_are_named() -> None:
    model, state = loaded(PUBLISHED_HEADS)
    cut = {key: value for key, value in state.items() if key != "vil_tri_prediction.bias"}
    with pytest.raises(BadInput, match=r"1 missing keys: vil_tri_prediction\.bias"):
        load_published(model, cut, "file")
    with pytest.raises(BadInput, match="1 unexpected keys: bert.more"):
        load_published(model, {**state, "bert.more": torch.zeros(1)}, "file")
    with pytest.raises(BadInput, match=r"vil_prediction\.logit_fc\.3\.weight.*answer vocabulary"):
        load_published(ViLBERT(small_config(), {"vil_prediction": HeadSpec("answers", 7)}), state, "file")


def test_new_parts_must_be_named_and_are_reported() -> None:
    model, state = loaded(PUBLISHED_HEADS)
    cut = {key: value for key, value in state.items() if not key.startswith("vil_logit.")}
    before = dict(model.named_parameters())["heads.vil_logit.matrices"].detach().clone()
    with pytest.raises(BadInput, match="fresh_weights"):
        load_published(model, cut, "file")
    assert load_published(model, cut, "file", fresh=["vil_logit", "vil_tri_prediction"]) == ["vil_logit"]
    assert torch.equal(dict(model.named_parameters())["heads.vil_logit.matrices"], before)


def test_old_names_and_prefixes_are_understood() -> None:
    model, state = loaded(PUBLISHED_HEADS)
    old = {
        "module."
        + key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for key, value in state.items()
    }
    load_published(model, old, "file")
    assert all(torch.equal(value, state[key]) for key, value in export_published(model).items())


def test_untied_decoder_is_refused() -> None:
    model, state = loaded(PUBLISHED_HEADS)
    with pytest.raises(BadInput, match="tied"):
        load_published(
            model, {**state, "cls.predictions.decoder.weight": state["cls.predictions.decoder.weight"] + 1}, "file"
        )


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "pytorch_model_2019_names.bin"])
def test_bert_fills_the_text_stream(name: str) -> None:
    folder = reference("golden/bert-small")
    model = ViLBERT(small_config(), PUBLISHED_HEADS, pretraining=True)
    model.initialise(0)
    before = {key: value.clone() for key, value in model.published()}
    assert load_bert(model, folder / name) == 4 + 16 * 4 + 1 + 5
    expected = read_state(folder / "model.safetensors")
    after = dict(model.published())
    for key in (
        "bert.embeddings.word_embeddings.weight",
        "bert.encoder.layer.3.output.LayerNorm.weight",
        "cls.predictions.bias",
    ):
        assert torch.equal(after[key], expected[key])
    assert torch.equal(
        after["bert.embeddings.task_embeddings.weight"], before["bert.embeddings.task_embeddings.weight"]
    )
    assert torch.equal(after["bert.t_pooler.dense.weight"], before["bert.t_pooler.dense.weight"])


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (open, ("canary", "w"))  # type: ignore[return-value]


def test_hostile_pickle_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"bert": Evil()}, tmp_path / "evil.bin")
    with pytest.raises(BadInput, match="refused"):
        read_state(tmp_path / "evil.bin")
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("name", ["weights.bin", "weights.safetensors"])
def test_truncated_checkpoint_is_refused(name: str, tmp_path: Path) -> None:
    data = (reference("golden") / name).read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(BadInput, match="truncated|refused"):
        read_state(tmp_path / name)
