"""Image identity: one key for all published names of an image."""

from __future__ import annotations

import pytest

from pipelines.errors import BadInput
from pipelines.identity import image_key

NAMES = {
    "COCO_train2014_000000131486": "131486",
    "COCO_train2014_000000131486.jpg": "131486",
    "coco_train2014_000000131486.npz": "131486",
    "coco_val2014_000000000042.npz": "42",
    "train2014/COCO_train2014_000000131486.jpg": "131486",
    "000000131486.pt": "131486",
    "131486": "131486",
    131486: "131486",
    0: "0",
    "000.jpg": "0",
    "COCO_train2014_000000581857_16.jpg": "581857",
    "COCO_test2015_000000000001.jpg.npy": "1",
    "v7w_2347.jpg": "2347",
    "vg_2331530.npz": "2331530",
    "images/VG_100K_2/2331530.jpg": "2331530",
    "flickr30k_000036979.npz": "36979",
    "36979.jpg": "36979",
    "n161313": "n161313",
    "gqa_n161313.npz": "n161313",
    "nlvr2_dev-850-0-img0.npz": "dev-850-0-img0",
    "dev-850-0-img0": "dev-850-0-img0",
    "test1-0-3-img1.png": "test1-0-3-img1",
    "scene_7": "scene_7",
    "v1.5": "v1.5",
}


@pytest.mark.parametrize(("name", "key"), NAMES.items())
def test_the_key_of_published_names(name: str | int, key: str) -> None:
    assert image_key(name) == key


def test_a_key_of_a_key_is_the_key() -> None:
    awkward = [*NAMES, "coco_vg_7", "a.jpg.npz.pt", "vg_coco_train2014_000000000007.jpg", "train2014_val2014_1"]
    for name in awkward:
        assert image_key(image_key(name)) == image_key(name)


@pytest.mark.parametrize("name", ["", ".jpg", "folder/", "coco_"])
def test_a_name_without_an_image_is_refused(name: str) -> None:
    with pytest.raises(BadInput, match="no image name"):
        image_key(name)
