"""The embedded world's files: the same for the same seed, complete or absent, and what the readers read."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipelines.errors import BadInput
from pipelines.identity import image_key
from pipelines.store.reader import FeatureStore
from pipelines.wordpiece import WordPiece
from pipelines.world import build, ensure
from pipelines.world.plan import draw_plan
from tests.pipelines.small_world import SEED, TASKS, examples, plan, sheet, world
from tests.reference import ROOT

FOLDERS = ("vqa", "visual_genome", "gqa", "coco_retrieval", "flickr30k", "flickr30k_entities", "refcoco", "refcoco+",
           "refcocog", "visual7w", "guesswhat", "nlvr2", "snli_ve", "conceptual_captions")  # fmt: skip


def hashes(world: Path) -> dict[str, str]:
    files = [file for name in FOLDERS for file in sorted((world / name).rglob("*")) if file.is_file()]
    files += [world / "vocab.txt", world / "sheet.yaml", world / "removed.json"]
    return {str(file.relative_to(world)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_same_seed_same_world(tmp_path: Path) -> None:
    again = build(tmp_path / "again", seed=SEED, size="small").parent
    assert hashes(again) == hashes(world())
    for path in sorted((world() / "features").glob("*.lmdb")):
        one, other = FeatureStore(path), FeatureStore(again / "features" / path.name)
        assert one.keys() == other.keys()
        for key in list(one.keys())[:20]:
            np.testing.assert_array_equal(one.record(key).features, other.record(key).features)
            np.testing.assert_array_equal(one.record(key).boxes, other.record(key).boxes)


def test_another_seed_is_another_world() -> None:
    other = draw_plan(SEED + 1, "small")
    assert not set(other.sources["coco"]) & set(plan().sources["coco"])
    assert other.scenes[0] != plan().scenes[0]


def test_ensure_keeps_a_world_and_replaces_one_of_another_seed(tmp_path: Path) -> None:
    path = tmp_path / "w"
    (tmp_path / "w.partial-killed" / "vqa").mkdir(parents=True)
    ensure(path, seed=1, size="small")
    before = (path / "world.json").stat().st_mtime_ns
    ensure(path, seed=1, size="small")
    assert (path / "world.json").stat().st_mtime_ns == before
    ensure(path, seed=2, size="small")
    assert json.loads((path / "world.json").read_text())["seed"] == 2
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["w", "w.lock"], "no partial folder stays"


def test_an_interrupted_build_leaves_nothing(tmp_path: Path) -> None:
    class Interrupted(Exception):
        pass

    def interrupt(what: str, done: int, total: int) -> None:
        if what == "stores":
            raise Interrupted

    with pytest.raises(Interrupted):
        build(tmp_path / "w", size="small", progress=interrupt)
    assert [entry.name for entry in tmp_path.iterdir()] == ["w.lock"]


def test_what_is_no_world_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "dear.jpg").write_bytes(b"x")
    with pytest.raises(BadInput, match="no embedded world"):
        ensure(tmp_path / "photos", size="small")
    with pytest.raises(BadInput, match="no embedded world"):
        build(tmp_path / "photos", size="small")
    assert (tmp_path / "photos" / "dear.jpg").read_bytes() == b"x"
    with pytest.raises(BadInput, match="default, small"):
        build(tmp_path / "w", size="huge")


def test_command_ends_bad_input_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    command = [sys.executable, "-m", "pipelines.world", str(tmp_path), "--size", "small"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: ")
    assert ended.stderr.count("\n") == 1


def test_command_draws_a_picture(tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    arguments = [str(world()), "--seed", str(SEED), "--size", "small", "--picture", str(picture)]
    ended = subprocess.run([sys.executable, "-m", "pipelines.world", *arguments], cwd=ROOT, check=True)
    assert ended.returncode == 0
    assert picture.stat().st_size > 100_000


def test_every_set_is_read_and_has_its_features() -> None:
    assert set(sheet().sets) == set(TASKS)
    for name in TASKS:
        stores = sheet().entry(name).stores()
        for split in sheet().entry(name).splits():
            store = sheet().store(stores[split])
            of_split = examples(name, split)
            assert len(of_split) >= 8, (name, split)
            assert len({example.id for example in of_split}) == len(of_split), (name, split)
            for example in of_split:
                assert example.target is not None
                assert all(image in store for image in example.images)


def test_sizes_differ_by_twenty() -> None:
    train = {name: len(examples(name, "train")) for name, row in TASKS.items() if row.get("default", True)}
    assert len(train) == 12
    assert max(train, key=train.__getitem__) == "visual_genome_qa"
    assert min(train, key=train.__getitem__) == "refcocog"
    assert train["visual_genome_qa"] == 20 * train["refcocog"]


def test_every_word_is_known() -> None:
    wordpiece = WordPiece.load(sheet().vocabulary)
    entries = sheet().vocabulary.read_text().split()
    assert entries[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert len(entries) == len(set(entries)) < 500
    for name in TASKS:
        for split in sheet().entry(name).splits():
            ids, offsets = wordpiece.encode_batch([example.text for example in examples(name, split)], 512)
            assert 1 not in ids, (name, split)
            assert np.diff(offsets).max() <= min(TASKS[name]["max_tokens"], 128), (name, split)
    strange, _ = wordpiece.encode_batch(["zq7 jpeg!"], 20)
    assert 1 not in strange, "letters spell what is no word"


def test_image_files_are_named_as_published() -> None:
    for source in ("coco", "vg", "flickr", "nlvr2"):
        names = {image_key(path.name) for path in (world() / "images" / source).iterdir()}
        assert names == set(FeatureStore(world() / "features" / f"{source}.lmdb").keys())
    assert len(set(plan().sources["coco"].values()) & set(plan().sources["vg"].values())) == len(plan().coco_of_vg)
