"""What bad images, a bad detector, a kill or a full disk leave behind: an error that names them, and no half a store."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipelines.errors import BadInput
from pipelines.extract.detectors import Sizes, WorldDetector
from pipelines.extract.run import Options, extract
from pipelines.extractor import Regions
from pipelines.store.reader import FeatureStore
from pipelines.store.writer import StoreWriter
from tests.pipelines.little_room import little_room
from tests.pipelines.photos import encoded, photo, write_photos
from tests.reference import ROOT


def damaged_photos(folder: Path) -> Path:
    """Twenty images, of which 3, 11 and 12 (3.jpg, 18.jpg, 19.jpg in the sorted order) do not decode."""
    images = write_photos(folder, 20, 80, 60)
    (images / "18.jpg").write_bytes((images / "18.jpg").read_bytes()[:-900])
    (images / "19.jpg").write_bytes(b"")
    (images / "3.jpg").write_text("Not found\n" * 30)
    return images


def extracted(images: Path, target: Path, **options: Any) -> tuple[int, int, int]:
    result = extract(images, target, WorldDetector(), "world", Options(**options))
    return result.images, result.regions, result.skipped


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_bad_images_are_counted_against_the_budget(tmp_path: Path, batch: int) -> None:
    images, said = damaged_photos(tmp_path / "images"), list[str]()
    options = Options(batch=batch, skip_bad=3)
    result = extract(images, tmp_path / "s", WorldDetector(), "world", options, say=said.append)
    assert (result.images, result.skipped) == (17, 3)
    skipped = [line for line in said if line.startswith("skipped: ")]
    assert [Path(line.split(": ")[1]).name for line in skipped] == ["18.jpg", "19.jpg", "3.jpg"]
    assert not set(FeatureStore(tmp_path / "s").keys()) & {"3", "18", "19"}


@pytest.mark.parametrize("allowed", [0, 1, 2])
def test_beyond_the_budget_the_image_is_named_and_no_store_is_left(tmp_path: Path, allowed: int) -> None:
    images = damaged_photos(tmp_path / "images")
    name = ["18.jpg", "19.jpg", "3.jpg"][allowed]
    hint = f"--skip-bad {allowed} allows for {allowed or 'none'}, then --resume"
    with pytest.raises(BadInput, match=rf"images/{name}: .*{hint}"):
        extracted(images, tmp_path / "s", skip_bad=allowed, batch=4)
    assert not (tmp_path / "s").exists() and (tmp_path / "s.partial").exists()
    # the budget is that of the whole extraction, not of its last part
    with pytest.raises(BadInput, match=hint):
        extracted(images, tmp_path / "s", skip_bad=allowed, batch=4, resume=True)
    assert extracted(images, tmp_path / "s", skip_bad=3, batch=4, resume=True)[::2] == (17, 3)
    assert extracted(images, tmp_path / "whole", skip_bad=3, batch=4)[::2] == (17, 3)
    assert_same_stores(tmp_path / "s", tmp_path / "whole")


def assert_same_stores(one: Path, other: Path) -> None:
    ours, theirs = FeatureStore(one), FeatureStore(other)
    assert ours.keys() == theirs.keys() and ours.source == theirs.source
    for key in theirs:
        a, b = ours.record(key), theirs.record(key)
        for part in ("features", "boxes", "mean", "class_probs"):
            np.testing.assert_array_equal(getattr(a, part), getattr(b, part))


def test_nothing_but_bad_images_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.jpg").touch()
    with pytest.raises(BadInput, match="no image to write"):
        extracted(tmp_path / "images", tmp_path / "s", skip_bad=5)
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


@pytest.mark.parametrize(
    ("name", "message"), [("__metadata__.jpg", "this name cannot be a key"), (".jpg", "no image name in it")]
)
def test_a_name_that_is_no_key_is_refused(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / name).write_bytes(encoded(photo(0)))
    (tmp_path / "list.txt").write_text(f"images/{name}")
    with pytest.raises(BadInput, match=message) as caught:
        extracted(tmp_path / "list.txt", tmp_path / "s")
    assert name in str(caught.value) or "list.txt:1" in str(caught.value)
    assert not (tmp_path / "s").exists() and not (tmp_path / "s.partial").exists()


class Wrong(WorldDetector):
    """Does one thing wrong."""

    def __init__(self, fault: str) -> None:
        self.fault = fault

    def detect(self, images: list[torch.Tensor], sizes: Sizes) -> list[Regions]:
        regions = super().detect(images, sizes)
        if self.fault == "one too few":
            return regions[:-1]
        boxes, features, probs = regions[0].boxes, regions[0].features.copy(), regions[0].class_probs
        if self.fault == "classes":
            probs = probs[:, :-1]
        elif self.fault == "features":
            features = features[:, :-1]
        elif self.fault == "undefined":
            features[0, 0] = np.nan
        elif self.fault == "outside":
            boxes = boxes + 1000
        elif self.fault == "none":
            boxes, features, probs = boxes[:0], features[:0], probs[:0]
        return [Regions(boxes, features, probs), *regions[1:]]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("one too few", "wrong: gave regions of 1 images for a batch of 2"),
        ("classes", r"0\.jpg: class_probs of shape \[\d+, 47\], expected \[n, 48\]"),
        ("features", r"0\.jpg: features of shape \[\d+, 127\], expected \[n, 128\]"),
        ("undefined", r"0\.jpg: features hold infinite or undefined values"),
        ("outside", r"0\.jpg: a box lies outside the image of 160 x 120"),
        ("none", r"0\.jpg: 0 feature rows"),
    ],
)
def test_what_a_detector_does_wrong_is_named(tmp_path: Path, fault: str, message: str) -> None:
    images = write_photos(tmp_path / "images", 2)
    with pytest.raises(BadInput, match=message):
        extract(images, tmp_path / "s", Wrong(fault), "wrong", Options())
    assert not (tmp_path / "s").exists()


def test_a_resume_with_other_settings_is_refused(tmp_path: Path) -> None:
    images = damaged_photos(tmp_path / "images")
    with pytest.raises(BadInput, match="does not decode"):
        extracted(images, tmp_path / "s", batch=4)
    with pytest.raises(BadInput, match=r"an unfinished store is here .*--resume"):
        extracted(images, tmp_path / "s", batch=4, skip_bad=3)
    with pytest.raises(BadInput, match=r"begun with \(128, 'float16'\)"):
        extracted(images, tmp_path / "s", dtype="float32", resume=True)
    with pytest.raises(BadInput, match=r"s\.partial: begun from 'world', not 'world with other weights'"):
        extract(images, tmp_path / "s", WorldDetector(), "world with other weights", Options(resume=True))
    with pytest.raises(BadInput, match=r"s\.partial: \d+ of its images are not in"):
        extracted(images / "0.jpg", tmp_path / "s", resume=True)
    assert extracted(images, tmp_path / "s", batch=4, skip_bad=3, resume=True)[0] == 17


class Batched(WorldDetector):
    """Its features tell which images were looked at together, as padding does in the last digits."""

    def __init__(self, calls: int) -> None:
        self.calls = calls

    def detect(self, images: list[torch.Tensor], sizes: Sizes) -> list[Regions]:
        self.calls -= 1
        if self.calls < 0:
            raise KeyboardInterrupt
        together = sum(float(image.float().mean()) for image in images)
        found = super().detect(images, sizes)
        return [Regions(one.boxes, one.features + np.float32(together), one.class_probs) for one in found]


def test_a_resume_looks_at_the_same_images_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, options = write_photos(tmp_path / "images", 20, 80, 60), Options(batch=6, skip_bad=1)
    (images / "7.jpg").write_bytes(b"")
    add = StoreWriter.add
    budget = [8]

    def add_a_few(self: StoreWriter, *arguments: Any, **named: Any) -> None:
        if not budget[0]:
            raise KeyboardInterrupt  # in the middle of the second batch
        budget[0] -= 1
        add(self, *arguments, **named)

    extract(images, tmp_path / "whole", Batched(99), "batched", options)
    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "add", add_a_few)
        with pytest.raises(KeyboardInterrupt):
            extract(images, tmp_path / "s", Batched(99), "batched", options)
    with pytest.raises(KeyboardInterrupt):
        extract(images, tmp_path / "s", Batched(1), "batched", replace(options, resume=True))
    result = extract(images, tmp_path / "s", Batched(99), "batched", replace(options, resume=True))
    assert (result.images, result.skipped) == (19, 1)
    assert_same_stores(tmp_path / "s", tmp_path / "whole")


_EXTRACT = """
import sys
from pathlib import Path
from pipelines.errors import BadInput
from pipelines.extract.detectors import WorldDetector
from pipelines.extract.run import Options, extract
from pipelines.store import writer
writer._COMMIT_BYTES = 10_000
options = Options(skip_bad=1, batch=4, decoder="pil", resume=sys.argv[3] == "resume")
say = lambda share, images: print(images, flush=True)
try:
    extract(Path(sys.argv[1]), Path(sys.argv[2]), WorldDetector(), "world", options, say)
except BadInput as error:
    sys.exit(f"error: {error}")
"""


def start(images: Path, target: Path, mode: str, first: str = "") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", first + _EXTRACT, str(images), str(target), mode]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hundred images, one of them bad."""
    images = write_photos(tmp_path_factory.mktemp("many") / "images", 100, 80, 60)
    (images / "50.jpg").write_bytes(b"no image")
    return images


def test_a_killed_extraction_resumes_to_the_same_store(tmp_path: Path, many: Path) -> None:
    extracted(many, tmp_path / "whole", skip_bad=1, batch=4)
    kills = 0
    for stop in (20, 60, None):
        process = start(many, tmp_path / "s", "resume")
        assert process.stdout
        for line in process.stdout:
            if stop and int(line) >= stop:
                process.send_signal(signal.SIGKILL)
                break
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
        if (tmp_path / "s").exists():
            break
    assert kills >= 2 and process.returncode == 0
    assert_same_stores(tmp_path / "s", tmp_path / "whole")
    assert not (tmp_path / "s.partial").exists()


def test_a_full_disk_is_an_error_that_a_resume_mends(tmp_path: Path, many: Path) -> None:
    process = start(many, tmp_path / "s", "new", little_room(150_000))
    _, complaint = process.communicate(timeout=60)
    assert process.returncode == 1 and "cannot write" in complaint and "GB free (make room" in complaint
    assert "Traceback" not in complaint and not (tmp_path / "s").exists()
    process = start(many, tmp_path / "s", "resume")
    assert process.communicate(timeout=60) and process.returncode == 0
    assert len(FeatureStore(tmp_path / "s")) == 99


def test_the_images_are_left_alone(tmp_path: Path) -> None:
    images = damaged_photos(tmp_path / "images")
    before = shutil.copytree(images, tmp_path / "before")
    extracted(images, tmp_path / "s", skip_bad=3)
    for file in before.iterdir():
        assert (images / file.name).read_bytes() == file.read_bytes()
