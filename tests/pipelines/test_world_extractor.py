"""The extractor finds what is in the pictures, and its features tell the attributes."""

from __future__ import annotations

from io import BytesIO
from random import Random

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipelines.extractor import CLASSES, FEATURE_DIM, Regions, extract, extract_boxes
from pipelines.world.language import ATTRIBUTES, VALUES
from pipelines.world.rendering import jpeg, render
from pipelines.world.scenes import Scene, Thing, draw_scene

Floats = NDArray[np.float32]


@pytest.fixture(scope="module")
def seen() -> list[tuple[Scene, Image.Image, Regions]]:
    random = Random("extractor")
    scenes = [draw_scene(random) for _ in range(250)]
    pictures = [Image.open(BytesIO(jpeg(render(scene)))) for scene in scenes]
    return [(scene, picture, extract(picture)) for scene, picture in zip(scenes, pictures, strict=True)]


def iou(a: Floats, b: Floats) -> Floats:
    low, high = np.maximum(a[:, None, :2], b[None, :, :2]), np.minimum(a[:, None, 2:], b[None, :, 2:])
    shared = np.clip(high - low, 0, None).prod(2)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(1) for boxes in (a, b)]
    return np.asarray(shared / (areas[0][:, None] + areas[1][None] - shared))


def found(seen: list[tuple[Scene, Image.Image, Regions]]) -> list[tuple[Thing, Regions, int]]:
    """Every thing with the region that covers it at IoU > 0.5."""
    pairs = []
    for scene, _, regions in seen:
        overlaps = iou(np.array([thing.box for thing in scene.things], np.float32), regions.boxes)
        for thing, row in zip(scene.things, overlaps, strict=True):
            if row.max() > 0.5:
                pairs.append((thing, regions, int(row.argmax())))
    return pairs


def test_finds_the_things_and_little_else(seen: list[tuple[Scene, Image.Image, Regions]]) -> None:
    things = sum(len(scene.things) for scene, _, _ in seen)
    assert len(found(seen)) >= 0.97 * things
    assert sum(len(regions.boxes) for _, _, regions in seen) <= 1.03 * things


def test_regions_are_as_a_detectors(seen: list[tuple[Scene, Image.Image, Regions]]) -> None:
    for scene, _, regions in seen:
        count = len(regions.boxes)
        assert regions.features.shape == (count, FEATURE_DIM) and regions.class_probs.shape == (count, len(CLASSES))
        assert {part.dtype for part in (regions.boxes, regions.features, regions.class_probs)} == {np.dtype(np.float32)}
        assert (regions.features >= 0).all() and regions.features.max() < 12
        np.testing.assert_allclose(regions.class_probs.sum(1), 1, atol=1e-5)
        assert (regions.boxes >= 0).all() and (regions.boxes[:, 2:] <= [scene.width, scene.height]).all()


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_attributes_are_linearly_decodable(seen: list[tuple[Scene, Image.Image, Regions]], attribute: str) -> None:
    pairs = found(seen)
    features = np.array([np.append(regions.features[row], 1) for _, regions, row in pairs])
    values = np.array([VALUES[attribute].index(getattr(thing, attribute)) for thing, _, _ in pairs])
    half = len(pairs) // 2
    weights = np.linalg.lstsq(features[:half], np.eye(len(VALUES[attribute]))[values[:half]], rcond=None)[0]
    assert ((features[half:] @ weights).argmax(1) == values[half:]).mean() > 0.97


def test_class_distribution_names_colour_and_shape(seen: list[tuple[Scene, Image.Image, Regions]]) -> None:
    pairs = found(seen)
    named = [CLASSES[int(regions.class_probs[row].argmax())] == f"{t.colour} {t.shape}" for t, regions, row in pairs]
    assert np.mean(named) > 0.97
    confidence = np.mean([regions.class_probs[row].max() for _, regions, row in pairs])
    assert 0.7 < confidence < 0.99, "soft, as a detector's"


def test_annotated_boxes_are_described_as_detected_ones(seen: list[tuple[Scene, Image.Image, Regions]]) -> None:
    for scene, picture, regions in seen[:40]:
        drawn = np.array([thing.drawn_box for thing in scene.things], np.float32)
        given = extract_boxes(picture, drawn)
        np.testing.assert_array_equal(given.boxes, drawn)
        overlaps = iou(drawn, regions.boxes)
        for row, best in enumerate(overlaps.argmax(1)):
            one, other = given.features[row], regions.features[best]
            assert np.dot(one, other) / np.linalg.norm(one) / np.linalg.norm(other) > 0.8


def test_array_and_image_give_the_same(seen: list[tuple[Scene, Image.Image, Regions]]) -> None:
    _, picture, regions = seen[0]
    np.testing.assert_array_equal(extract(np.asarray(picture)).features, regions.features)
    with pytest.raises(ValueError, match=r"\[H, W, 3\]"):
        extract(np.zeros((20, 20), np.uint8))


def test_an_empty_picture_is_one_region() -> None:
    regions = extract(Image.new("RGB", (60, 40), (180, 180, 180)))
    np.testing.assert_array_equal(regions.boxes, [[0, 0, 60, 40]])
    assert np.isfinite(regions.features).all()
