"""Images to stores: the embedded world's own records again, the order and keys of files, a detector of one's own."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.errors import BadInput
from pipelines.extract.__main__ import main
from pipelines.extract.detectors import Detector, Preprocessing, Sizes, WorldDetector, load_detector
from pipelines.extract.files import find_images, read_boxes
from pipelines.extract.run import Options, extract
from pipelines.extractor import Regions
from pipelines.store.reader import FeatureStore
from tests.pipelines.photos import encoded, photo, write_photos
from tests.pipelines.small_world import world
from tests.reference import ROOT


def assert_same_records(ours: FeatureStore, theirs: FeatureStore) -> None:
    assert ours.keys() == theirs.keys() and ours.dtype == theirs.dtype
    for key in theirs:
        one, other = ours.record(key), theirs.record(key)
        assert (one.width, one.height) == (other.width, other.height)
        for part in ("features", "boxes", "mean", "class_probs"):
            np.testing.assert_array_equal(getattr(one, part), getattr(other, part), err_msg=f"{key} {part}")


@pytest.mark.parametrize("source", ["coco", "vg", "flickr", "nlvr2", "cc_val"])
def test_the_worlds_pictures_give_the_worlds_store_to_the_bit(tmp_path: Path, source: str) -> None:
    """With the decoder that `auto` takes, whichever is installed."""
    assert main([str(world() / "images" / source), str(tmp_path / "s")]) == 0
    assert_same_records(FeatureStore(tmp_path / "s"), FeatureStore(world() / "features" / f"{source}.lmdb"))


@pytest.mark.parametrize(("store", "source"), [("visual7w_boxes", "vg"), ("guesswhat_boxes", "coco")])
def test_given_boxes_give_the_worlds_annotated_boxes(tmp_path: Path, store: str, source: str) -> None:
    theirs = FeatureStore(world() / "features" / f"{store}.lmdb")
    boxes = {f"{key}.jpg": theirs.record(key).boxes.tolist() for key in theirs}
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    images = str(world() / "images" / source)
    assert main([images, str(tmp_path / "s"), "--boxes", str(tmp_path / "boxes.json")]) == 0
    assert_same_records(FeatureStore(tmp_path / "s"), theirs)


class Means:
    """A detector that tests can see through: one region, the whole image, its mean colour."""

    feature_dim, classes = 3, 0
    preprocessing: Preprocessing | None = None

    def __init__(self, rule: Preprocessing | None = None) -> None:
        self.preprocessing = rule
        self.batches: list[int] = []

    def detect(self, images: list[torch.Tensor], sizes: Sizes) -> list[Regions]:
        self.batches.append(len(images))
        over = (0, 1) if self.preprocessing is None else (1, 2)
        return [
            Regions(
                np.array([[0, 0, *size]], np.float32),
                image.double().mean(over).float()[None].numpy(),
                np.empty((1, 0), np.float32),
            )
            for image, size in zip(images, sizes, strict=True)
        ]


def test_records_hold_what_the_detector_said(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for number, size in enumerate(((60, 40), (31, 77), (200, 100))):
        (tmp_path / "images" / f"{number}.png").write_bytes(encoded(photo(number, *size), "PNG"))
    result = extract(tmp_path / "images", tmp_path / "s", Means(), "means", Options(dtype="float32", batch=2))
    assert (result.images, result.regions, result.skipped) == (3, 3, 0)
    store = FeatureStore(tmp_path / "s")
    assert store.classes == 0 and store.sizes.tolist() == [[60, 40], [31, 77], [200, 100]]
    for number, size in enumerate(((60, 40), (31, 77), (200, 100))):
        record = store.record(str(number))
        np.testing.assert_array_equal(record.boxes, [[0, 0, *size]])
        np.testing.assert_allclose(record.features[0], np.asarray(photo(number, *size)).mean((0, 1)), rtol=1e-6)


def test_the_rule_for_sizes() -> None:
    rule = Preprocessing(800, 1333)
    assert rule.size(640, 480) == (1067, 800) and rule.size(480, 640) == (800, 1067)
    assert rule.size(1000, 400) == (1333, 533), "the longest side's limit"
    assert Preprocessing(600).size(1000, 100) == (6000, 600) and Preprocessing().size(31, 7) == (31, 7)
    assert rule.size(40_000, 3) == (1333, 1), "no side vanishes"


def test_preprocessed_images_are_normalised(tmp_path: Path) -> None:
    images = write_photos(tmp_path / "images", 3, 64, 48)
    extract(images, tmp_path / "plain", Means(), "m", Options("float32"))
    rule = Preprocessing(mean=(10, 20, 30), std=(2, 4, 8))
    extract(images, tmp_path / "ruled", Means(rule), "m", Options("float32"))
    for key in ("0", "1", "2"):
        plain, ruled = (FeatureStore(tmp_path / name).record(key).features[0] for name in ("plain", "ruled"))
        np.testing.assert_allclose(ruled, (plain - rule.mean) / np.array(rule.std), rtol=1e-4)


def test_a_folder_is_searched_through_and_sorted(tmp_path: Path) -> None:
    for name in ("b/COCO_val2014_000000000007.JPG", "a/x/9.png", "n161313.webp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "notes.txt").touch()
    assert list(find_images(tmp_path)) == ["9", "7", "n161313"]
    with pytest.raises(BadInput, match="no image in this folder or below it"):
        find_images(write_photos(tmp_path / "none", 0))
    with pytest.raises(BadInput, match="no such file or folder"):
        find_images(tmp_path / "absent")


def test_a_list_keeps_its_order_and_names_the_line_of_a_missing_file(tmp_path: Path) -> None:
    images = write_photos(tmp_path / "images", 3, 32, 32)
    listed = tmp_path / "list.txt"
    listed.write_text(f"images/2.jpg\n\n{images / '0.jpg'}\n")
    assert list(find_images(listed)) == ["2", "0"]
    assert list(find_images(images / "1.jpg")) == ["1"]
    for content, message in (
        ("images/2.jpg\nimages/7.jpg\n", r"list\.txt:2: no file .*7\.jpg \(paths are relative"),
        ("\n \n", "an empty list"),
        ("images/2.jpg\nimages/../images/2.jpg\n", r"list\.txt:2: .* are both image 2"),
    ):
        listed.write_text(content)
        with pytest.raises(BadInput, match=message):
            find_images(listed)


def test_two_files_of_one_key_are_refused_by_both_names(tmp_path: Path) -> None:
    write_photos(tmp_path / "train", 1)
    write_photos(tmp_path / "val", 1)
    with pytest.raises(BadInput, match=r"train/0\.jpg and .*val/0\.jpg are both image 0"):
        find_images(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "malformed or truncated JSON"),
        ("[]", "a JSON object .* is expected, not a list"),
        ("{}", "no image in it"),
        ('{"1": []}', "1: boxes of shape"),
        ('{"1": [[1, 2, 3]]}', "1: boxes of shape"),
        ('{"1": [["a", 2, 3, 4]]}', "1: no boxes"),
        ('{"1": {"a": 2}}', "1: no boxes"),
        ('{"1": [[NaN, 2, 3, 4]]}', "1: a box is infinite or undefined"),
        ('{"1": [[1, 2, 3, 4]], "1.jpg": [[1, 2, 3, 4]]}', "a second entry of image 1"),
    ],
)
def test_bad_boxes_are_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "boxes.json").write_text(content)
    with pytest.raises(BadInput, match=r"boxes\.json.*" + message):
        read_boxes(tmp_path / "boxes.json")


def test_boxes_of_absent_images_or_for_a_detector_without_describe_are_refused(tmp_path: Path) -> None:
    images = write_photos(tmp_path / "images", 2)
    (tmp_path / "boxes.json").write_text('{"1": [[1, 2, 30, 40]], "9": [[1, 2, 30, 40]]}')
    options = Options(boxes=tmp_path / "boxes.json")
    with pytest.raises(BadInput, match=r"boxes\.json: 1 of its images are not in .*, as image 9"):
        extract(images, tmp_path / "s", WorldDetector(), "w", options)
    with pytest.raises(BadInput, match="--boxes: m has no method `describe`"):
        extract(images, tmp_path / "s", Means(), "m", options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["boxes.json", "images"]


def test_the_command_says_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, target = write_photos(tmp_path / "images", 4), tmp_path / "s"
    (images / "2.jpg").write_bytes(b"no image")
    arguments = [
        str(images),
        str(target),
        "--dtype",
        "bfloat16",
        "--skip-bad",
        "1",
        "--limit",
        "3",
        "--detector",
        "world",
    ]
    arguments += ["--decoder", "pil"]
    assert main(arguments) == 0
    said = capsys.readouterr()
    regions = int(FeatureStore(target).counts.sum())
    gigabytes = f"{(target / 'data.mdb').stat().st_size / 1e9:.3g}"
    expected = f"wrote 2 images, {regions} regions to {target} (bfloat16, {gigabytes} GB), skipped 1\n"
    assert said.out == expected
    assert said.err.startswith(f"skipped: {images / '2.jpg'}: none of JPEG") and len(said.err.splitlines()) == 1
    assert main(arguments) == 2
    assert capsys.readouterr().err == f"error: {target}: exists already (remove it or choose another name)\n"


def test_the_default_detector_says_what_it_is_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(write_photos(tmp_path / "images", 1)), str(tmp_path / "s"), "--decoder", "pil"]) == 0
    assert "its features of photographs mean nothing" in capsys.readouterr().err


def test_help_tells_detectors_and_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert all(word in text for word in ("module:factory", "DST.partial", "Exit codes", "--skip-bad"))


NOT_DETECTORS: list[tuple[list[str], str]] = [
    (["--detector", "yolo"], "--detector yolo: no such detector (one of world, torchvision, or module:factory)"),
    (["--detector", "absent_module:make"], "--detector absent_module:make: No module named 'absent_module'"),
    (["--detector", "json:make"], "--detector json:make: module 'json' has no attribute 'make'"),
    (["--detector", ":make"], "--detector :make: Empty module name"),
    (["--detector", "tests.pipelines.test_extract:no_detector"], "made a dict, which lacks feature_dim, classes"),
    (["--weights", "x.pth"], "--weights: the world's extractor has none"),
    (["--batch", "0"], "--batch: 0 is too small"),
    (["--skip-bad", "-1"], "--skip-bad: -1 is too small"),
    (["--limit", "0"], "--limit: 0 is too small"),
]


def no_detector(weights: Path | None, device: str) -> dict[str, int]:
    return {}


@pytest.mark.parametrize(("arguments", "message"), NOT_DETECTORS)
def test_wrong_arguments_change_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    images = write_photos(tmp_path / "images", 1)
    detector = [] if "--detector" in arguments else ["--detector", "world"]
    assert main([str(images), str(tmp_path / "s"), *detector, *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and message in said and len(said.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), str(tmp_path / "s"), "--device", "cuda", "--detector", "world"]) == 2
    assert capsys.readouterr().err == "error: --device cuda: torch finds no GPU here (leave it out, or --device cpu)\n"


def test_the_example_in_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "pipelines" / "extract" / "README.md").read_text()
    section = text[text.index("# From images to features") :]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert code and "python -m pipelines.extract photos photos.lmdb --detector my_detector:make" in section
    (tmp_path / "my_detector.py").write_text(code.group(1))
    monkeypatch.syspath_prepend(tmp_path)
    try:
        assert isinstance(load_detector("my_detector:make"), Detector)
        images = write_photos(tmp_path / "photos", 3)
        assert main([str(images), str(tmp_path / "photos.lmdb"), "--detector", "my_detector:make"]) == 0
    finally:
        sys.modules.pop("my_detector", None)
    assert FeatureStore(tmp_path / "photos.lmdb").keys() == ("0", "1", "2")
