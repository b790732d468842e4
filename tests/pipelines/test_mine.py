"""`python -m pipelines.mine`: what it writes, and that interruptions change nothing."""

from __future__ import annotations

import itertools
import json
import pickle
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.errors import BadInput
from pipelines.mine.__main__ import main
from pipelines.mine.features import global_rows
from pipelines.mine.partial import Partial
from pipelines.store.reader import FeatureStore
from pipelines.store.writer import StoreWriter
from tests.pipelines.small_pictures import FEATURES, IMAGES, build, change, command, load, run, two_sets
from tests.reference import ROOT

BY = ("features", "captions")


@pytest.fixture
def sheet(tmp_path: Path) -> Path:
    return build(tmp_path)


def test_what_is_mined_is_what_training_reads(sheet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(sheet, "--neighbours", "7") == 0
    shown = capsys.readouterr().out
    assert "pictures, by features: 150 images x 7 neighbours" in shown
    assert "give fewer" not in shown
    line = re.search(r"^    hard_negatives: (.+)$", shown, re.MULTILINE)
    assert line
    change(sheet, hard_negatives=line[1])
    data: Any = load(sheet)
    means = np.stack([data.store.record(data.store.keys()[row]).mean for row in data.pool.images]).astype(np.float64)
    for image, own in enumerate(means):
        squares = ((means - own) ** 2).sum(axis=1)
        nearest = [other for other in np.argsort(squares, kind="stable") if other != image][:7]
        mined = data.pool.hard.neighbours[data.pool.hard.offsets[image] : data.pool.hard.offsets[image + 1]]
        assert mined.tolist() == nearest
    with np.load(sheet.parent / line[1]) as file:
        made = json.loads(str(file["made"]))
    assert (made["set"], made["by"], made["neighbours"]) == ("pictures", "features", 7)


def test_the_summary_says_how_near_neighbours_are(sheet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(sheet, "--by", "captions", "--neighbours", "1000", "--out", str(sheet.parent / "x.npz")) == 0
    shown = capsys.readouterr().out
    numbers = re.search(r"mean similarity: (\S+) to the nearest, (\S+) to neighbour 149, (\S+) between random", shown)
    assert numbers
    nearest, furthest, random = map(float, numbers.groups())
    assert 1 > nearest > random > furthest > 0
    assert len(re.findall(r"^  image \d+(\n    [a-z ]+){3}$", shown, re.MULTILINE)) == 4
    assert "no nearer than a random one: give fewer --neighbours" in shown


@pytest.mark.parametrize("how", [["--by", "captions"], ["--import", "pool.pkl"]])
def test_what_looks_at_no_feature_needs_none(sheet: Path, how: list[str]) -> None:
    pool = {"train_image_list": [*range(IMAGES)], "train_hard_pool": (np.arange(IMAGES)[:, None] + [0, 1, 2]) % IMAGES}
    (sheet.parent / "pool.pkl").write_bytes(pickle.dumps(pool))
    how = [how[0], str(sheet.parent / how[1]) if how[0] == "--import" else how[1]]
    assert command(sheet, *how, "--out", str(sheet.parent / "with.npz")) == 0
    shutil.rmtree(sheet.parent / "features.lmdb")
    assert command(sheet, *how, "--out", str(sheet.parent / "without.npz")) == 0
    assert (sheet.parent / "without.npz").read_bytes() == (sheet.parent / "with.npz").read_bytes()
    assert command(sheet, "--out", str(sheet.parent / "x.npz")) == 2


def test_twins_are_named(sheet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with StoreWriter(sheet.parent / "twins.lmdb", FEATURES, "float32") as writer:
        for number in range(IMAGES):
            features = np.full((1, FEATURES), number // 2 if number < 10 else number)
            writer.add(number, features, np.array([[0, 0, 9, 9]]), 20, 10)
    change(sheet, features="twins.lmdb")
    assert command(sheet) == 0
    assert "10 images have the very features of another one" in capsys.readouterr().out


def test_several_sets_go_on_at_the_one_that_was_interrupted(sheet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    two_sets(sheet)
    done = sheet.parent / "pictures_hard_features.npz"
    assert command(sheet, "--set", "pictures") == 0
    before = done.read_bytes()
    assert command(sheet, "--resume") == 0
    assert f"{done} is there already: nothing to do\n" in capsys.readouterr().out
    assert done.read_bytes() == before
    with np.load(done) as first, np.load(sheet.parent / "more_hard_features.npz") as second:
        np.testing.assert_array_equal(first["pool"], second["pool"])


def test_a_pool_that_the_sheet_names_is_made_where_it_is_looked_for(sheet: Path) -> None:
    change(sheet, hard_negatives="pools/hard.npz")
    assert command(sheet, "--set", "pictures", "--neighbours", "3") == 0
    data: Any = load(sheet)
    assert np.diff(data.pool.hard.offsets).tolist() == [3] * IMAGES


@pytest.mark.parametrize("by", BY)
def test_interruptions_and_memory_change_no_bit(sheet: Path, by: str) -> None:
    folder = sheet.parent
    whole = run(sheet, folder / "whole.npz", by, memory=10**9)
    assert run(sheet, folder / "blocked.npz", by) == whole
    for stop in (1, 60, 100):
        with pytest.raises(KeyboardInterrupt):
            run(sheet, folder / "again.npz", by, stop=stop, resume=True)
        assert not (folder / "again.npz").exists()
    assert run(sheet, folder / "again.npz", by, resume=True, memory=10**9) == whole


@pytest.mark.parametrize("by", BY)
def test_a_killed_run_resumes_and_equals_an_undisturbed_one(sheet: Path, by: str) -> None:
    script = (
        "import os, sys; from pathlib import Path; from tests.pipelines import small_pictures as m\n"
        "def kill(what, done, total):\n"
        "    if what == 'images mined' and done > 60: os.kill(os.getpid(), 9)\n"
        "means = m.Means(1, m.torch.device('cpu'), Path(sys.argv[2]).parent, kill)\n"
        "m.mine(m.load(Path(sys.argv[1])), sys.argv[3], 7, Path(sys.argv[2]), means)\n"
    )
    target = sheet.parent / "killed.npz"
    ended = subprocess.run([sys.executable, "-c", script, str(sheet), str(target), by], cwd=ROOT, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert not target.exists()
    partial = target.with_name(target.name + ".partial")
    assert partial.stat().st_size > 60 * 7 * 8
    assert run(sheet, target, by, resume=True) == run(sheet, sheet.parent / "whole.npz", by)


def interrupted(sheet: Path) -> tuple[Path, Path]:
    """A target, and the file of its unfinished run."""
    target = sheet.parent / "pool.npz"
    with pytest.raises(KeyboardInterrupt):
        run(sheet, target, stop=120)
    return target, target.with_name(target.name + ".partial")


def test_a_block_cut_short_is_mined_again(sheet: Path) -> None:
    whole = run(sheet, sheet.parent / "whole.npz")
    target, partial = interrupted(sheet)
    content = partial.read_bytes()
    header = content.index(b"\n") + 1
    for size in (header, header + 1, header + 23, header + 24, header + 500, len(content) - 1, len(content)):
        partial.write_bytes(content[:size])
        assert run(sheet, target, resume=True) == whole
        target.unlink()


def test_a_damaged_partial_file_is_refused(sheet: Path) -> None:
    target, partial = interrupted(sheet)
    content = partial.read_bytes()
    header = content.index(b"\n") + 1
    other_version = content.replace(b'"format": 1', b'"format": 9', 1)
    damaged = [content[: header - 1], b"", b"\xff" + content[1:], b"[]\n" + content[header:], other_version]
    damaged.append(content + content[header:])  # the blocks of one run after those of another
    for place in range(header, header + 24):
        damaged.append(content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :])
    for place in (header + 24, header + 700, len(content) - 1):
        damaged.append(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    for bad in damaged:
        partial.write_bytes(bad)
        with pytest.raises(BadInput, match=r"pool\.npz\.partial: .*\(remove it and mine again\)"):
            run(sheet, target, resume=True)
        assert partial.read_bytes() == bad
    assert not target.exists()


def test_a_partial_file_of_other_settings_or_data_is_refused(sheet: Path) -> None:
    target, _ = interrupted(sheet)
    with pytest.raises(BadInput, match=r"begun with \{'neighbours': 7\}, not \{'neighbours': 6\}"):
        run(sheet, target, neighbours=6, resume=True)
    with pytest.raises(BadInput, match=r"begun with \{'by': 'features', 'data': '\w+'\}"):
        run(sheet, target, by="captions", resume=True)
    lines = (sheet.parent / "train.jsonl").read_text().splitlines(keepends=True)
    (sheet.parent / "train.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(BadInput, match=r"begun with \{'images': 150, 'data': '\w+'\}, not \{'images': 149"):
        run(sheet, target, resume=True)


def test_changed_captions_are_other_data(sheet: Path) -> None:
    target = sheet.parent / "pool.npz"
    with pytest.raises(KeyboardInterrupt):
        run(sheet, target, "captions", stop=16)
    text = (sheet.parent / "train.jsonl").read_text()
    (sheet.parent / "train.jsonl").write_text(text.replace("redcat", "bluebus", 1))
    with pytest.raises(BadInput, match=r"begun with \{'data'"):
        run(sheet, target, "captions", resume=True)


def test_a_partial_file_is_neither_taken_unasked_nor_by_two(sheet: Path) -> None:
    target, partial = interrupted(sheet)
    with pytest.raises(BadInput, match="an unfinished run is here"):
        run(sheet, target)
    settings = json.loads(partial.read_bytes().partition(b"\n")[0])["settings"]
    with (
        Partial(target, settings, 7, resume=True),
        pytest.raises(BadInput, match="another process is mining"),
        Partial(target, settings, 7, resume=True),
    ):
        pass


def test_features_beyond_memory_are_mapped_from_a_file_without_a_name(sheet: Path) -> None:
    store = FeatureStore(sheet.parent / "features.lmdb")
    rows = np.arange(3, 120, dtype=np.int32)
    before = sorted(sheet.parent.iterdir())
    resident, mapped = (global_rows(store, rows, limit, sheet.parent, lambda *_: None) for limit in (1 << 30, 0))
    assert isinstance(mapped, np.memmap) and not isinstance(resident, np.memmap)
    np.testing.assert_array_equal(resident, mapped)
    np.testing.assert_array_equal(resident, [store.record(store.keys()[row]).mean for row in rows])
    assert sorted(sheet.parent.iterdir()) == before


def test_a_store_read_through_does_not_stay_in_memory(tmp_path: Path) -> None:
    """38 MB of records, read and released."""
    with StoreWriter(tmp_path / "s", 1024, "float32") as writer:
        for number in range(60):
            writer.add(number, np.ones((150, 1024)), np.tile([0, 0, 9, 9], (150, 1)), 20, 10)
    store = FeatureStore(tmp_path / "s")

    def mapped() -> int:
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"RssFile:\s+(\d+) kB", status)[1])  # type: ignore[index]

    store.release()
    before = mapped()
    store.verify_records()
    assert mapped() - before > 30_000
    store.release()
    assert mapped() - before < 5_000
    np.testing.assert_array_equal(store.record("7").mean, np.ones(1024))


def test_every_way_is_offered_by_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert all(f"--by {by}" in shown for by in BY)
    options = ("--set", "--neighbours", "--out", "--resume", "--memory", "--device", "--import")
    assert not [option for option, text in itertools.product(options, [shown]) if option not in text]
