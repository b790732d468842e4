"""Checkpoints: complete or absent, verified before use, of this run or refused."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine import checkpoint, saving
from engine.assembly import Parts, assemble
from engine.cursor import Cursor, Window
from pipelines.errors import BadInput
from tests.engine.small_run import configure
from tests.reference import ROOT

FILES = ("weights.safetensors", "optimizer-00000-of-00001.safetensors", "cursor.json", "manifest.json")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    return assemble(configure(tmp_path_factory.mktemp("data")))


def save(folder: Path, parts: Parts, iteration: int, keep: int = 9) -> Path:
    return saving.save(folder, parts.model, parts.stepper, Cursor(iteration=iteration), keep)


def test_the_manifest_names_every_file(tmp_path: Path, parts: Parts) -> None:
    path = save(tmp_path, parts, 7)
    assert path.name == "iteration-0000007"
    assert {file.name for file in path.iterdir()} == set(FILES)
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["format"] == 1
    assert set(manifest["files"]) == set(FILES) - {"manifest.json"}
    for name, entry in manifest["files"].items():
        assert entry["bytes"] == (path / name).stat().st_size
    checkpoint.verify(path)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_byte_is_refused_and_the_older_checkpoint_used(tmp_path: Path, parts: Parts, name: str) -> None:
    older, newer = save(tmp_path, parts, 1), save(tmp_path, parts, 2)
    whole, draw = (newer / name).read_bytes(), random.Random(name)
    for _ in range(20):
        place, other = draw.randrange(len(whole)), draw.randrange(1, 256)
        flipped = bytes([whole[place] ^ other])
        if whole[place : place + 1].isspace() and flipped.isspace():
            continue  # JSON's own freedom
        (newer / name).write_bytes(whole[:place] + flipped + whole[place + 1 :])
        with pytest.raises(BadInput, match=r"manifest|format"):
            checkpoint.verify(newer)
        path, refused = checkpoint.newest_valid(tmp_path)
        assert path == older
        assert len(refused) == 1 and str(newer) in refused[0] and "\n" not in refused[0]
    (newer / name).write_bytes(whole)
    assert checkpoint.newest_valid(tmp_path) == (newer, [])


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_or_missing_file_is_refused(tmp_path: Path, parts: Parts, name: str) -> None:
    path = save(tmp_path, parts, 1)
    whole, draw = (path / name).read_bytes(), random.Random(name)
    for length in (0, 1, len(whole) - 1, *(draw.randrange(len(whole)) for _ in range(17))):
        (path / name).write_bytes(whole[:length])
        with pytest.raises(BadInput):
            checkpoint.verify(path)
    (path / name).unlink()
    with pytest.raises(BadInput, match=name):
        checkpoint.verify(path)
    with pytest.raises(BadInput, match="no usable checkpoint.*start a new run"):
        checkpoint.newest_valid(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        "null",
        "[]",
        '{"format": 1, "world_size": 1, "files": []}',
        '{"format": 1, "world_size": 1, "files": 3}',
        '{"files": {}}',
    ],
)
def test_a_manifest_of_another_form_is_refused(tmp_path: Path, parts: Parts, content: str) -> None:
    path = save(tmp_path, parts, 1)
    (path / "manifest.json").write_text(content)
    with pytest.raises(BadInput, match=r"manifest\.json"):
        checkpoint.verify(path)


def test_another_format_is_refused(tmp_path: Path, parts: Parts) -> None:
    path = save(tmp_path, parts, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"format": 2}))
    with pytest.raises(BadInput, match="checkpoint format 2, this version reads 1"):
        checkpoint.verify(path)


def test_the_newest_stay(tmp_path: Path, parts: Parts) -> None:
    for iteration in (9, 10, 11, 100):
        save(tmp_path, parts, iteration, keep=2)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["iteration-0000100", "iteration-0000011"]
    again = save(tmp_path, parts, 100, keep=2)  # a stop in the iteration of a regular save
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["iteration-0000100-1", "iteration-0000100"]
    assert checkpoint.newest_valid(tmp_path)[0] == again


def test_a_failed_save_leaves_the_older_ones_and_nothing_else(
    tmp_path: Path, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = save(tmp_path, parts, 1)

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(saving, "fingerprint", full)
    with pytest.raises(OSError, match="no space"):
        save(tmp_path, parts, 2, keep=1)
    assert list(tmp_path.iterdir()) == [older]


_KILLED = """
import os, signal, sys
from pathlib import Path
from engine import checkpoint, saving
from engine.assembly import assemble
from engine.cursor import Cursor
from tests.engine.small_run import configure

folder = Path(sys.argv[1])
parts = assemble(configure(folder / "data"))

def save(into, iteration):
    saving.save(folder / into, parts.model, parts.stepper, Cursor(iteration=iteration), 1)

def die(*arguments, **keywords):
    os.kill(os.getpid(), signal.SIGKILL)

for owner, name in ((saving, "save_file"), (saving, "fingerprint"), (saving, "sync"), (os, "rename")):
    save(name, 1)
    child = os.fork()
    if not child:
        setattr(owner, name, die)
        save(name, 2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
"""


def test_a_killed_save_leaves_nothing_that_looks_like_a_checkpoint(tmp_path: Path, parts: Parts) -> None:
    """Killed before the weights, at the hashes, at the first fsync, and just before the folder gets its name."""
    (tmp_path / "data").mkdir()
    command = [sys.executable, "-c", _KILLED, str(tmp_path)]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # it forks, which a pool of OpenMP threads does not survive
    done = subprocess.run(command, cwd=ROOT, env=one_thread, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for where in ("save_file", "fingerprint", "sync", "rename"):
        saved = tmp_path / where
        assert [path.name for path in checkpoint.checkpoints(saved)] == ["iteration-0000001"]
        assert checkpoint.newest_valid(saved)[0].name == "iteration-0000001"
        assert len(list(saved.iterdir())) == 2, "the killed process had begun"
        checkpoint.remove_unfinished(saved)
        save(saved, parts, 3)
        assert sorted(path.name for path in saved.iterdir()) == ["iteration-0000001", "iteration-0000003"]


@pytest.mark.parametrize(
    "override",
    ["model.hidden_size=32", "model.v_num_hidden_layers=2", "tasks=[answers, captions]"],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path, parts: Parts, override: str) -> None:
    path = save(tmp_path / "saved", parts, 1)
    other = assemble(configure(tmp_path, override))
    with pytest.raises(BadInput) as refused:
        checkpoint.load(path, other.model, other.stepper)
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)


def test_what_is_loaded_is_what_was_saved_to_the_bit(tmp_path: Path, parts: Parts) -> None:
    for unit in parts.optimizer.units.values():
        for i, value in enumerate([*unit.exp_avg, *unit.exp_avg_sq]):
            value.normal_(generator=torch.Generator().manual_seed(i))
        unit.steps.fill_(7)
    path = save(tmp_path / "saved", parts, 5)
    other = assemble(configure(tmp_path, "seed=1"))
    cursor = checkpoint.load(path, other.model, other.stepper)
    assert cursor == Cursor(iteration=5)
    saved, loaded = parts.optimizer.state_dict(), other.optimizer.state_dict()
    assert saved.keys() == loaded.keys() and all(torch.equal(saved[key], loaded[key]) for key in saved)
    for (name, value), (other_name, other_value) in zip(parts.model.published(), other.model.published(), strict=True):
        assert name == other_name and torch.equal(value, other_value)


names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)
floats = st.floats(allow_nan=False, allow_infinity=False)
counts = st.integers(0, 2**40)
windows = st.builds(
    Window, steps=counts, examples=counts, loss=floats, score=floats, grad_norm=floats, skipped=counts
)  # fmt: skip
states: st.SearchStrategy[dict[str, Any]] = st.dictionaries(
    names, st.none() | st.booleans() | counts | floats | names | st.lists(floats)
)


@given(
    st.builds(
        Cursor,
        iteration=counts,
        remaining=st.lists(names),
        due=st.lists(names),
        phase=counts,
        consumed=st.dictionaries(names, counts),
        controllers=st.dictionaries(names, states),
        scores=st.dictionaries(names, floats),
        best=st.dictionaries(names, floats),
        windows=st.dictionaries(names, windows),
        skipped_in_row=st.dictionaries(names, counts),
        config_hash=names,
    )
)
def test_a_cursor_survives_json_to_the_bit(cursor: Cursor) -> None:
    again = Cursor.from_json(cursor.to_json())
    assert again == cursor
    assert repr(again) == repr(cursor)  # -0.0 == 0.0, but not here


@pytest.mark.parametrize(
    "text",
    ["", "null", "{}", '{"format": 1}', Cursor().to_json().replace('"format": 1', '"format": 2'),
     Cursor().to_json().replace('"windows": {}', '"windows": {"vqa": {"step": 1}}'),
     Cursor().to_json().replace('"windows": {}', '"windows": []')],
)  # fmt: skip
def test_a_cursor_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"cursor|Expecting"):
        Cursor.from_json(text)
