"""Weights between forms: bit for bit in every direction, and nothing of a hostile folder runs."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine import checkpoint, saving
from engine.assembly import Parts, assemble
from engine.convert import convert, main
from engine.cursor import Cursor
from engine.model.config import ModelConfig
from engine.model.published import PUBLISHED_HEADS, TIED, WORDS, export_published, load_published, read_state
from engine.model.vilbert import ViLBERT
from pipelines.errors import BadInput
from tests.engine import two_ranks
from tests.engine.small_run import MODEL, configure
from tests.engine.zero_folders import RATE
from tests.reference import reference

CASES = ("0:float32", "1:float32", "2:bfloat16", "3:bfloat16")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model in the published layout; bfloat16 holds its values."""
    model = ViLBERT(ModelConfig(**MODEL), PUBLISHED_HEADS, pretraining=True)
    model.initialise(0)
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    save_file({key: value.bfloat16().float() for key, value in export_published(model).items()}, path)
    return path


@pytest.fixture(scope="module")
def folders(small: Path) -> Path:
    """ZeRO folders of two ranks, one per case."""
    two_ranks.run("tests.engine.zero_folders", small, small.parent, *CASES)
    return small.parent


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    return assemble(configure(tmp_path_factory.mktemp("data")))


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_the_authors_file_goes_round_all_forms(tmp_path: Path) -> None:
    source = reference("golden") / "weights.bin"
    chain = [source, tmp_path / "a.safetensors", tmp_path / "b", tmp_path / "c.bin", tmp_path / "d.safetensors"]
    for before, after in pairwise(chain):
        convert(before, after, verify=True)
    state = torch.load(source, weights_only=True)
    assert same(torch.load(tmp_path / "c.bin", weights_only=True), state)
    assert same(load_file(tmp_path / "d.safetensors"), state)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "d.safetensors").read_bytes()


def test_a_run_and_a_checkpoint_are_sources(tmp_path: Path, parts: Parts) -> None:
    folder = tmp_path / "run" / "checkpoints"
    older, newer = (saving.save(folder, parts.model, parts.stepper, Cursor(iteration=n), 2) for n in (1, 2))
    convert(tmp_path / "run", tmp_path / "newest.safetensors")
    assert same(load_file(tmp_path / "newest.safetensors"), load_file(newer / "weights.safetensors"))
    data = (newer / "weights.safetensors").read_bytes()
    (newer / "weights.safetensors").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    said: list[str] = []
    convert(tmp_path / "run", tmp_path / "older.bin", say=said.append)
    assert same(read_state(tmp_path / "older.bin"), load_file(older / "weights.safetensors"))
    assert any("refused" in line for line in said)
    with pytest.raises(BadInput, match="manifest"):
        convert(newer, tmp_path / "damaged.bin")
    assert not (tmp_path / "damaged.bin").exists()


def test_a_checkpoint_of_weights_alone_begins_a_run_and_resumes_none(small: Path, tmp_path: Path, parts: Parts) -> None:
    convert(small, tmp_path / "start")
    assert same(checkpoint.weights(tmp_path / "start"), load_file(small))
    with pytest.raises(BadInput, match="weights alone.*initial_weights"):
        checkpoint.load(tmp_path / "start", parts.model, parts.stepper)
    path = tmp_path / "start" / "weights.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(BadInput, match="manifest"):
        checkpoint.weights(tmp_path / "start")


@pytest.mark.parametrize("case", CASES)
def test_a_zero_folder_gives_its_float32_weights(folders: Path, small: Path, tmp_path: Path, case: str) -> None:
    target = tmp_path / "out.safetensors"
    convert(folders / case, target, verify=True)
    expected = {key: value - value * RATE for key, value in load_file(small).items()}
    if case.endswith("bfloat16"):
        assert not same({key: value.bfloat16().float() for key, value in expected.items()}, expected), (
            "a test of masters"
        )
    found = load_file(target)
    assert same(found, expected)
    load_published(ViLBERT(ModelConfig(**MODEL), PUBLISHED_HEADS, pretraining=True), found, target)
    convert(next((folders / case).glob("global_step*")), target, verify=True)  # the step's own folder, compared
    convert(folders / case, tmp_path / "out.bin")
    state = torch.load(tmp_path / "out.bin", weights_only=True)
    assert same(state, expected) and state[TIED].data_ptr() == state[WORDS].data_ptr()
    assert (tmp_path / "out.bin").stat().st_size < 1.3 * sum(v.nbytes for k, v in state.items() if k != TIED)


class Canary:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, int]]:
        return os.open, (str(self.path), os.O_CREAT)


def _replaced(file: Path, content: bytes, name: str = "data.pkl") -> None:
    """Put another pickle into one of torch's archives, or one more."""
    with zipfile.ZipFile(file) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    root = next(iter(members)).partition("/")[0]
    members[f"{root}/{name}"] = content
    with zipfile.ZipFile(file, "w") as archive:
        for member, data in members.items():
            archive.writestr(member, data)


HOSTILE: dict[str, Callable[[Path, bytes], None]] = {
    "pickle": lambda file, evil: _replaced(file, evil),
    "second pickle": lambda file, evil: _replaced(file, evil, "constants.pkl"),
    "bare pickle": lambda file, evil: _bare(file, evil),
    "another file of the folder": lambda file, evil: _evil_beside(file, evil),
}


def _bare(file: Path, evil: bytes) -> None:
    file.write_bytes(evil)


def _evil_beside(file: Path, evil: bytes) -> None:
    shutil.copy(file, file.with_name("layer_00-model_states.pt"))
    _replaced(file.with_name("layer_00-model_states.pt"), evil)


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("name", ["mp_rank_00_model_states.pt", "zero_pp_rank_1_mp_rank_00_optim_states.pt"])
def test_nothing_of_a_hostile_folder_runs(folders: Path, tmp_path: Path, kind: str, name: str) -> None:
    copy, canary = tmp_path / "copy", tmp_path / "canary"
    shutil.copytree(folders / "1:float32", copy)
    file = copy / "global_step1" / name
    evil = pickle.dumps({"module": Canary(canary)}, 2)
    HOSTILE[kind](file, evil)
    with pytest.raises(BadInput, match=r"global_step1") as caught:
        convert(copy, tmp_path / "out.bin")
    assert kind != "pickle" or ("asks for" in str(caught.value) and name in str(caught.value))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy"]
    os.close(pickle.loads(evil)["module"])  # noqa: S301 - the test's own
    assert canary.exists(), "the canary must be able to sing"


def test_torch_itself_is_held_to_the_list(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the inspection deceived, DeepSpeed's loading would still refuse."""
    copy, canary = tmp_path / "copy", tmp_path / "canary"
    shutil.copytree(folders / "1:float32", copy)
    _replaced(copy / "global_step1" / "mp_rank_00_model_states.pt", pickle.dumps({"module": Canary(canary)}, 2))
    monkeypatch.setattr("engine.zero_folder._check", lambda file: None)
    with pytest.raises(BadInput, match="UnpicklingError"):
        convert(copy, tmp_path / "out.bin")
    assert not canary.exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_the_scripts_of_a_folder_are_not_run(folders: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folders / "1:float32", copy)
    for name in ("zero_to_fp32.py", "zero_to_torch.py"):
        (copy / name).write_text(f"open({str(tmp_path / 'canary')!r}, 'w')")
    convert(copy, tmp_path / "out.bin")
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("tag", ["", "..", "../elsewhere", "/tmp", "global_step9"])
def test_a_step_that_is_elsewhere_is_refused(folders: Path, tmp_path: Path, tag: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folders / "1:float32", copy)
    (copy / "latest").write_text(tag)
    with pytest.raises(BadInput, match="names no folder"):
        convert(copy, tmp_path / "out.bin")


def test_a_path_that_deepspeed_would_take_for_a_pattern_is_refused(folders: Path, tmp_path: Path) -> None:
    for name in ("copy1", "copy[1]"):  # of the second DeepSpeed would find the files of the first
        shutil.copytree(folders / "1:float32", tmp_path / name)
    with pytest.raises(BadInput, match="rename"):
        convert(tmp_path / "copy[1]", tmp_path / "out.bin")


def test_a_cut_or_missing_file_of_a_folder_is_refused(folders: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folders / "1:float32", copy)
    files = sorted((copy / "global_step1").glob("*.pt"))
    assert len(files) == 3
    for file in files:
        whole = file.read_bytes()
        for length in (0, 1, len(whole) // 2, len(whole) - 1):
            file.write_bytes(whole[:length])
            with pytest.raises(BadInput, match=file.name):
                convert(copy, tmp_path / "out.bin")
        file.unlink()
        with pytest.raises(BadInput, match="global_step1"):
            convert(copy, tmp_path / "out.bin")
        file.write_bytes(whole)
    convert(copy, tmp_path / "out.bin")


def _without(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if not key.startswith(prefix)}


LAYOUTS: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "a key is missing": (lambda s: _without(s, "bert.t_pooler.dense.bias"), r"1 missing keys: bert\.t_pooler"),
    "a key too many": (lambda s: s | {"bert.more": torch.zeros(1)}, "1 unexpected keys: bert.more"),
    "another shape": (lambda s: s | {"bert.t_pooler.dense.bias": torch.zeros(3)}, r"dense\.bias: shape \[3\]"),
    "no words": (lambda s: _without(s, WORDS), f"no {WORDS}"),
    "untied": (lambda s: s | {TIED: s[TIED] + 1}, "tied"),
    "half of the pretraining heads": (lambda s: _without(s, "cls.predictions.bias"), "1 missing keys"),
    "a scalar": (lambda s: s | {WORDS: torch.zeros(())}, r"shape \[\]"),
}


@pytest.mark.parametrize("change", LAYOUTS)
def test_what_is_no_published_layout_is_refused(small: Path, tmp_path: Path, change: str) -> None:
    make, message = LAYOUTS[change]
    torch.save(make(load_file(small)), tmp_path / "source.bin")
    with pytest.raises(BadInput, match=message):
        convert(tmp_path / "source.bin", tmp_path / "out.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["source.bin"]


def test_heads_of_ones_own_and_none_for_pretraining_pass(small: Path, tmp_path: Path) -> None:
    state = _without(load_file(small), "cls.") | {"my_head.weight": torch.ones(2, 3, dtype=torch.bfloat16)}
    torch.save({f"module.{key}": value for key, value in state.items()}, tmp_path / "source.bin")
    convert(tmp_path / "source.bin", tmp_path / "out.safetensors")
    assert same(load_file(tmp_path / "out.safetensors"), {key: value.float() for key, value in state.items()})


def test_what_is_there_is_compared_or_left(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    target = tmp_path / "out.bin"
    assert main([str(small), str(target)]) == 0
    before = target.read_bytes()
    assert main([str(small), str(target)]) == 2 and "exists already" in capsys.readouterr().err
    assert main([str(small), str(target), "--verify"]) == 0 and "every bit compared" in capsys.readouterr().out
    state = load_file(small)
    state["vil_logit.bias"] = torch.nextafter(state["vil_logit.bias"], torch.tensor(9.0))
    save_file(state, tmp_path / "other.safetensors")
    assert main([str(tmp_path / "other.safetensors"), str(target), "--verify"]) == 2
    assert "error: " in (told := capsys.readouterr().err) and "vil_logit.bias: differs" in told
    assert target.read_bytes() == before
    assert main([str(small), str(tmp_path / "out.zip")]) == 2 and "no form" in capsys.readouterr().err
    assert main([str(small), str(tmp_path / "no" / "out.bin")]) == 2 and "no such folder" in capsys.readouterr().err
    assert main([str(tmp_path), str(tmp_path / "new.bin")]) == 2 and "neither a run" in capsys.readouterr().err


def test_a_write_that_fails_leaves_nothing(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(state: object, path: Path, **_: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("engine.convert.save_file", full)
    for name in ("out.safetensors", "folder"):
        with pytest.raises(OSError, match="No space"):
            convert(small, tmp_path / name)
    assert not any(tmp_path.iterdir())


def test_a_manifest_of_weights_alone_says_so(small: Path, tmp_path: Path) -> None:
    convert(small, tmp_path / "start")
    manifest = json.loads((tmp_path / "start" / "manifest.json").read_text())
    assert manifest["world_size"] == 0 and set(manifest["files"]) == {"weights.safetensors", "cursor.json"}
