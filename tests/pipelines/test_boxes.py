"""Box geometry against the definition, element by element."""

from __future__ import annotations

import numpy as np

from pipelines.boxes import iou_inclusive, locations, xywh_to_xyxy


def plain_iou(a: list[float], b: list[float]) -> float:
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]) + 1)
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]) + 1)
    areas = [(box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (a, b)]
    return width * height / (sum(areas) - width * height)


def test_iou_counts_both_end_pixels() -> None:
    assert iou_inclusive([[0, 0, 9, 9]], [[0, 0, 9, 9]]) == 1
    assert iou_inclusive([[0, 0, 9, 9]], [[9, 0, 18, 9]]) == np.float32(10 / 190)
    assert iou_inclusive([[0, 0, 9, 9]], [[10, 10, 12, 12]]) == 0


def test_iou_equals_the_definition_for_random_boxes() -> None:
    rng = np.random.default_rng(0)
    a, b = (np.sort(rng.random((n, 2, 2)) * 60, axis=1).reshape(n, 4) for n in (17, 11))
    expected = [[plain_iou(x, y) for y in b.tolist()] for x in a.tolist()]
    np.testing.assert_allclose(iou_inclusive(a, b), expected, rtol=1e-6)
    assert iou_inclusive(np.zeros((0, 4)), b).shape == (0, 11)


def test_locations_are_shares_and_the_global_row_is_exact() -> None:
    assert locations([[0, 0, 641, 333]], 641, 333).tolist() == [[0, 0, 1, 1, 1]]
    np.testing.assert_allclose(locations([[10, 20, 30, 60]], 100, 200), [[0.1, 0.1, 0.3, 0.3, 0.04]], rtol=1e-6)


def test_locations_take_one_size_per_row() -> None:
    both = locations([[10, 20, 30, 60], [10, 20, 30, 60]], np.array([100, 50]), np.array([200, 100]))
    np.testing.assert_array_equal(both[1], locations([[10, 20, 30, 60]], 50, 100)[0])
    assert both.dtype == np.float32


def test_xywh_becomes_corners() -> None:
    assert xywh_to_xyxy([[1, 2, 3, 4]]).tolist() == [[1, 2, 4, 6]]
    assert xywh_to_xyxy([]).shape == (0, 4)
