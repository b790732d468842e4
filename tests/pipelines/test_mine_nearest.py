"""Mined neighbours against brute force in float64: every pair, sorted by value, then by position."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pipelines.mine.job import Ranking
from pipelines.mine.nearest import NearestByDistance, Neighbours, block_side
from pipelines.mine.wording import STEPS, NearestByCaptions

CPU = torch.device("cpu")
AMPLE, SCARCE = 10**9, 1
IMAGES, K = 1000, 100

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]


def all_rows(ranking: Ranking, images: int) -> Neighbours:
    starts = range(0, images, ranking.rows_at_once)
    blocks = [ranking.nearest(start, min(start + ranking.rows_at_once, images)) for start in starts]
    return Neighbours(np.concatenate([b.positions for b in blocks]), np.concatenate([b.values for b in blocks]))


def brute_force(values: Float64, k: int) -> NDArray[np.int64]:
    """The k positions of least value in each row, its own left out."""
    values = values.copy()
    np.fill_diagonal(values, np.inf)
    return np.argsort(values, axis=1, kind="stable")[:, :k]


def squared_distances(features: Float32) -> Float64:
    exact = features.astype(np.float64)
    return np.stack([((exact - row) ** 2).sum(axis=1) for row in exact])


def ordinary(random: np.random.Generator) -> Float32:
    """Like a detector's; with twins, empty images, and whole numbers, many of which are at one distance."""
    features = random.gamma(0.5, size=(IMAGES, 64)).astype(np.float32)
    features[100:240] = features[7]
    features[300] = features[301]
    features[400:420] = 0
    features[500:800] = random.integers(0, 2, (300, 64))
    return features


def far_clusters(random: np.random.Generator) -> Float32:
    """Two heaps far apart: the products of float32 know nothing of the order within one."""
    side = np.where(np.arange(IMAGES) % 2, 1e3, -1e3)[:, None]
    return (side + random.normal(0, 1e-3, (IMAGES, 64))).astype(np.float32)


def one_outlier(random: np.random.Generator) -> Float32:
    features = random.normal(0, 1, (IMAGES, 64)).astype(np.float32)
    features[17] *= 1e6
    return features


def all_equally_far(random: np.random.Generator) -> Float32:
    return np.eye(300, dtype=np.float32)


def all_the_same(random: np.random.Generator) -> Float32:
    return np.ones((300, 8), np.float32)


def tiny(random: np.random.Generator) -> Float32:
    """Clusters so small that in float32 all products vanish."""
    return far_clusters(random)[:300] * np.float32(1e-25)


@pytest.mark.parametrize("make", [ordinary, far_clusters, one_outlier, all_equally_far, all_the_same, tiny])
def test_nearest_by_distance_is_brute_force(make: Callable[[np.random.Generator], Float32]) -> None:
    features = make(np.random.default_rng(0))
    squares = squared_distances(features)
    ranking = NearestByDistance(features, K, AMPLE, CPU)
    found = all_rows(ranking, len(features))
    expected = brute_force(squares, K)
    np.testing.assert_array_equal(found.positions, expected)
    distances = np.sqrt(np.take_along_axis(squares, expected, axis=1)).astype(np.float32)
    np.testing.assert_array_equal(found.values, distances)
    assert ranking.value(3, int(expected[3, 0])) == pytest.approx(distances[3, 0], rel=1e-6)


@pytest.mark.parametrize("rows", [32, 77, 512, 999])
@pytest.mark.parametrize("make", [ordinary, far_clusters])
def test_blocks_change_no_bit_of_distances(make: Callable[[np.random.Generator], Float32], rows: int) -> None:
    features = make(np.random.default_rng(1))
    whole = all_rows(NearestByDistance(features, K, AMPLE, CPU), IMAGES)
    blocked = NearestByDistance(features, K, AMPLE, CPU)
    blocked.rows_at_once = rows
    found = all_rows(blocked, IMAGES)
    np.testing.assert_array_equal(found.positions, whole.positions)
    np.testing.assert_array_equal(found.values, whole.values)


def test_products_of_less_than_float32_are_refused() -> None:
    torch.set_float32_matmul_precision("medium")
    try:
        with pytest.raises(ValueError, match="whole float32 products"):
            NearestByDistance(np.zeros((3, 2), np.float32), 1, AMPLE, CPU)
    finally:
        torch.set_float32_matmul_precision("highest")


def test_blocks_fit_the_memory_given() -> None:
    sides = [block_side(memory, 2048, 132) for memory in (10**7, 10**8, 10**9)]
    assert sides == sorted(sides) and sides[0] < sides[-1]
    for side, memory in zip(sides, (10**7, 10**8, 10**9), strict=True):
        assert side * 2048 * (4 + 4 + 8) + side * side * 4 <= memory
    assert block_side(SCARCE, 2048, 132) == 32


def captions(images: int) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int32]]:
    """Captions in no order, one to six of an image; some empty, many alike, some words in all of them."""
    random = np.random.default_rng(2)
    image = np.repeat(np.arange(images), random.integers(1, 7, images)).astype(np.int32)
    random.shuffle(image)
    common = [[5, 9, 5], [5], [5, 11, 12], []]
    texts = [
        common[random.integers(4)] if random.random() < 0.3 else [5, *(random.zipf(1.4, random.integers(0, 12)) % 400)]
        for _ in image
    ]
    offsets = np.cumsum([0, *map(len, texts)])
    return np.array([word for text in texts for word in text], np.int32), offsets, image


def similarities(words: NDArray[np.int32], offsets: NDArray[np.int64], image: NDArray[np.int32]) -> Float64:
    """Dense TF-IDF, a caption a row; [m, m]: the products of each image's mean unit vector, in steps of 1 / 4096."""
    counts = np.zeros((len(image), words.max() + 1))
    for caption, row in enumerate(counts):
        np.add.at(row, words[offsets[caption] : offsets[caption + 1]], 1)
    having = (counts > 0).sum(axis=0)
    rows = counts * np.log(len(image) / np.maximum(having, 1))
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    units = rows / np.where(lengths > 0, lengths, 1)
    means = np.stack([units[image == owner].mean(axis=0) for owner in range(image.max() + 1)])
    pairs = np.stack([[(units[image == a] @ units[image == b].T).mean() for b in range(9)] for a in range(9)])
    np.testing.assert_allclose(means[:9] @ means[:9].T, pairs, atol=1e-12)  # the mean cosine of all pairs of captions
    steps = np.floor(means * 4096) / 4096
    assert np.abs(steps @ steps.T - means @ means.T).max() < 0.01
    return steps @ steps.T


def test_nearest_by_captions_is_dense_tf_idf_to_the_bit() -> None:
    words, offsets, image = captions(IMAGES)
    expected = similarities(words, offsets, image)
    ranking = NearestByCaptions(words, offsets, image, K, AMPLE, CPU)
    found = all_rows(ranking, IMAGES)
    best = brute_force(-expected, K)
    np.testing.assert_array_equal(found.positions, best)
    np.testing.assert_array_equal(found.values, np.take_along_axis(expected, best, axis=1))
    assert len(np.unique(found.values[:, 0])) > IMAGES / 10, "the captions must tell images apart"
    assert (found.values[:, :-1] == found.values[:, 1:]).any(), "there must be ties"
    for other in (0, 500, 999):
        assert ranking.value(7, other) == expected[7, other]


@pytest.mark.parametrize(("rows", "columns"), [(1, 1000), (16, 256), (77, 30), (300, 999)])
def test_blocks_change_no_bit_of_similarities(rows: int, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    words, offsets, image = captions(300)
    whole = all_rows(NearestByCaptions(words, offsets, image, K, AMPLE, CPU), 300)
    monkeypatch.setattr("pipelines.mine.wording.SIZES", ((rows, rows), (columns, columns)))
    blocked = NearestByCaptions(words, offsets, image, K, AMPLE, CPU)
    assert (blocked.rows_at_once, blocked.columns_at_once) == (rows, columns)
    found = all_rows(blocked, 300)
    np.testing.assert_array_equal(found.positions, whole.positions)
    np.testing.assert_array_equal(found.values, whole.values)


def test_weights_are_steps_and_no_longer_than_one() -> None:
    part = NearestByCaptions(*captions(300), K, SCARCE, CPU).weights
    steps = part.weights.astype(np.float64) * STEPS
    assert (steps == np.round(steps)).all() and steps.min() >= 1
    squares = np.bincount(np.repeat(np.arange(300), np.diff(part.offsets)), steps**2)
    assert 0.99 < squares.max() / STEPS**2 <= 1


def test_captions_without_a_word_are_all_equally_far() -> None:
    found = all_rows(NearestByCaptions(np.zeros(0, np.int32), np.zeros(5, np.int64), np.arange(4), 2, AMPLE, CPU), 4)
    assert found.positions.tolist() == [[1, 2], [0, 2], [0, 1], [0, 1]]
    assert not found.values.any()


def test_fewer_images_than_neighbours_give_them_all() -> None:
    features = np.array([[0.0], [1.0], [3.0]], np.float32)
    by_distance = NearestByDistance(features, K, AMPLE, CPU)
    assert by_distance.nearest(0, 3).positions.tolist() == [[1, 2], [0, 2], [1, 0]]
    words, offsets = np.array([1, 2, 2, 3], np.int32), np.array([0, 1, 3, 4])
    by_captions = NearestByCaptions(words, offsets, np.arange(3), K, AMPLE, CPU)
    assert by_captions.nearest(0, 3).positions.shape == (3, 2)
