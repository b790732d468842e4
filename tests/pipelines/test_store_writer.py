"""Writing a store: what is refused, and what an interruption, a second writer or a full disk leaves behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from pipelines.errors import BadInput
from pipelines.store import writer as writer_module
from pipelines.store.reader import FeatureStore
from pipelines.store.writer import StoreWriter
from tests.pipelines.little_room import little_room
from tests.pipelines.stores import HEIGHT, WIDTH, made_up, write_store
from tests.reference import ROOT

FEATURES, BOXES, _PROBS = made_up(8, classes=4)
assert _PROBS is not None
PROBS = _PROBS


def changed(array: np.ndarray, place: Any, value: float) -> np.ndarray:
    copy = array.copy()
    copy[place] = value
    return copy


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "undefined feature": ({"features": changed(FEATURES, (1, 2), np.nan)}, "infinite or undefined"),
    "infinite box": ({"boxes": changed(BOXES, (1, 2), np.inf)}, "infinite or undefined"),
    "other feature width": ({"features": FEATURES[:, :31]}, r"\[9, 31\], expected \[n, 32\]"),
    "flat features": ({"features": FEATURES[0]}, r"features of shape \[32\]"),
    "text": ({"features": [["a"] * 32]}, "features are no numbers"),
    "a box too few": ({"boxes": BOXES[:8]}, "9 feature rows, 8 boxes"),
    "no region": ({"features": FEATURES[:0], "boxes": BOXES[:0]}, "0 feature rows"),
    "x, y, width, height": ({"boxes": changed(BOXES, (0, 2), BOXES[0, 0] - 1)}, "ends before it begins"),
    "right of the image": ({"boxes": changed(BOXES, (0, 2), WIDTH + 2)}, "outside the image of 640 x 427"),
    "left of the image": ({"boxes": changed(BOXES, (0, 0), -2)}, "outside the image"),
    "no width": ({"width": 0}, "image size 0 x 427"),
    "too large for float16": ({"features": changed(FEATURES, (0, 0), 7e4)}, "exceeds float16.*bfloat16 or float32"),
    "probability above 1": ({"class_probs": changed(PROBS, (0, 0), 1.5)}, "outside 0..1"),
    "probabilities of fewer rows": ({"class_probs": PROBS[1:]}, "8 class distributions"),
    "other classes": ({"class_probs": PROBS[:, :3]}, "3 classes, the images before have 4"),
    "given twice": ({"name": "COCO_val2014_000000000100.jpg"}, "given twice"),
    "a name longer than a key": ({"name": "x" * 512}, "cannot be a key"),
    "the key of the metadata": ({"name": "__metadata__"}, "cannot be a key"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_record_is_refused_and_the_others_stay(tmp_path: Path, case: str) -> None:
    good: dict[str, Any] = {
        "name": 100, "features": FEATURES, "boxes": BOXES, "width": WIDTH, "height": HEIGHT, "class_probs": PROBS,
    }  # fmt: skip
    changes, message = WRONG[case]
    with StoreWriter(tmp_path / "s", 32) as writer:
        writer.add(**good)
        with pytest.raises(BadInput, match=message):
            writer.add(**{**good, "name": 101, **changes})
        writer.add(**{**good, "name": 102})
    assert FeatureStore(tmp_path / "s").keys() == ("100", "102")


def test_detectors_may_end_a_box_one_pixel_outside(tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "s", 32) as writer:
        writer.add(1, FEATURES[:1], [[-0.5, 0, WIDTH + 0.5, HEIGHT]], WIDTH, HEIGHT)
    np.testing.assert_array_equal(FeatureStore(tmp_path / "s").record("1").boxes, [[-0.5, 0, WIDTH + 0.5, HEIGHT]])


def test_the_map_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "_FIRST_MAP_BYTES", 1 << 16)
    monkeypatch.setattr(writer_module, "_COMMIT_BYTES", 1 << 15)
    assert len(FeatureStore(write_store(tmp_path / "s", 400, dtype="float32"))) == 400


def test_an_existing_target_is_refused_untouched(tmp_path: Path) -> None:
    path = write_store(tmp_path / "s")
    before = (path / "data.mdb").read_bytes()
    with pytest.raises(BadInput, match="exists already"):
        write_store(path)
    assert (path / "data.mdb").read_bytes() == before and not (tmp_path / "s.partial").exists()


def test_nothing_is_left_of_a_store_without_images(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no image"), StoreWriter(tmp_path / "s", 32):
        pass
    with pytest.raises(BadInput, match="unknown feature type 'float8'"):
        StoreWriter(tmp_path / "s", 32, "float8")
    assert list(tmp_path.iterdir()) == []


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "s", 32) as writer:
        writer.add(1, FEATURES, BOXES, WIDTH, HEIGHT)
        with pytest.raises(BadInput, match="another process is writing"), StoreWriter(tmp_path / "s", 32, resume=True):
            pass
        with pytest.raises(BadInput, match=r"unfinished store is here.*--resume"), StoreWriter(tmp_path / "s", 32):
            pass
    assert FeatureStore(tmp_path / "s").keys() == ("1",)


def test_an_error_keeps_what_was_added_and_resume_goes_on(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), StoreWriter(tmp_path / "s", 32) as writer:
        writer.add(1, FEATURES, BOXES, WIDTH, HEIGHT, PROBS)
        raise RuntimeError
    with pytest.raises(BadInput, match=r"begun with \(32, 'float16'\)"):
        StoreWriter(tmp_path / "s", 32, "float32", resume=True).__enter__()
    with StoreWriter(tmp_path / "s", 32, resume=True) as writer:
        assert writer.keys() == {"1"} and writer.images == 1 and writer.regions == 9 and writer.classes == 4
        with pytest.raises(BadInput, match="given twice"):
            writer.add(1, FEATURES, BOXES, WIDTH, HEIGHT)
        writer.add(2, FEATURES, BOXES, WIDTH, HEIGHT)
    store = FeatureStore(tmp_path / "s")
    assert store.keys() == ("1", "2") and store.record("1").class_probs is not None


_WRITE = """
import sys
from pathlib import Path
from random import Random
from pipelines.errors import BadInput
from pipelines.store import writer
from pipelines.store.writer import StoreWriter
from tests.pipelines.stores import HEIGHT, WIDTH, made_up
writer._COMMIT_BYTES = 20_000
try:
    with StoreWriter(Path(sys.argv[1]), 32, "float32", resume=sys.argv[2] == "resume") as target:
        done = target.keys()
        print(len(done), flush=True)
        for seed in range(200):
            if str(seed) not in done:
                target.add(seed, *made_up(seed)[:2], WIDTH, HEIGHT)
                print(seed, flush=True)
except BadInput as error:
    sys.exit(f"error: {error}")
"""


def start(path: Path, mode: str, first: str = "") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", first + _WRITE, str(path), mode]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    "points", [(1, 37, 120, 199), pytest.param(tuple(Random(0).sample(range(200), 30)), marks=pytest.mark.slow)]
)
def test_a_killed_writer_resumes_with_nothing_lost_or_doubled(tmp_path: Path, points: tuple[int, ...]) -> None:
    write_store(tmp_path / "whole", 200, dtype="float32")
    for kill_after in points:
        path = tmp_path / f"s{kill_after}"
        process = start(path, "new")
        assert process.stdout
        for line in process.stdout:
            if line.strip() == str(kill_after):
                break
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if not path.exists():  # the kill may come after the last rename
            resumed = start(path, "resume")
            output, _ = resumed.communicate(timeout=60)
            added = output.split()[1:]
            assert resumed.returncode == 0 and len(set(added)) == len(added) == 200 - int(output.split()[0])
        assert (path / "data.mdb").exists() and not path.with_name(path.name + ".partial").exists()
        ours, whole = FeatureStore(path), FeatureStore(tmp_path / "whole")
        assert ours.keys() == whole.keys() and len(ours) == 200
        for key in whole:
            np.testing.assert_array_equal(ours.record(key).features, whole.record(key).features)


@pytest.mark.parametrize("room", [0, 200_000])
def test_a_full_disk_is_an_error_that_a_resume_mends(tmp_path: Path, room: int) -> None:
    process = start(tmp_path / "s", "new", little_room(room))
    _, complaint = process.communicate(timeout=60)
    assert process.returncode == 1 and "cannot write" in complaint and "GB free (make room" in complaint
    assert complaint.count("\n") == 1 and "then --resume)" in complaint and not (tmp_path / "s").exists()
    process = start(tmp_path / "s", "resume")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and len(FeatureStore(tmp_path / "s")) == 200
    assert (int(output.split()[0]) > 0) == (room > 0)  # what was written before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(BadInput, match="cannot write here"):
        StoreWriter(tmp_path / "s", 32).__enter__()
