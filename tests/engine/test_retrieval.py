"""Retrieval over the whole pool: the fast way against every pair alone through the plain model, and ranks by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from engine.evaluation import evaluate, retrieval
from engine.evaluation.ranks import best, measures, ranks
from engine.trained import Trained, load_trained
from kernels.backends import using
from pipelines.datasets import TaskData
from pipelines.draft import Draft, filled
from pipelines.packing import pack_texts, skeleton
from pipelines.regions import Regions

TASK = "captions"


@pytest.fixture(scope="module")
def loaded(undisturbed: Callable[[str], Path]) -> Callable[[str], Trained]:
    return lambda precision: load_trained(undisturbed("float32"), overrides=[f"precision={precision}"])


@pytest.fixture(scope="module")
def brute(loaded: Callable[[str], Trained]) -> Callable[[str], NDArray[np.float32]]:
    """[captions, images] by precision, from the plain model: every pair on copies of its own."""
    found: dict[str, NDArray[np.float32]] = {}

    def scores(precision: str) -> NDArray[np.float32]:
        if precision not in found:
            trained = loaded(precision)
            data = trained.data(TASK, "val")
            images = pool_images(data)
            found[precision] = np.stack([plain(trained, data, text, images) for text in range(len(data))])
        return found[precision]

    return scores


def pool_images(data: TaskData) -> NDArray[np.int64]:
    """Store rows."""
    assert data.pool is not None
    return data.pool.images.astype(np.int64)


def plain(trained: Trained, data: TaskData, text: int, images: NDArray[np.int64]) -> NDArray[np.float32]:
    """Scores of a caption with these images, by an ordinary batch in which nothing is shared."""
    token, pairs = trained.token(TASK), np.arange(len(images))
    texts = np.full(len(images), text)
    token_ids, cu_texts = pack_texts(data, texts, token)
    regions = Regions.of(data, images)
    batch = filled(
        Draft(
            skeleton(data, texts, texts, token_ids, cu_texts, regions, pairs, pairs, None, token, trained.dtype),
            regions,
        )
    )
    with torch.inference_mode():
        return trained.model(batch, trained.row(TASK).head, share=False)[:, 0].float().numpy()


def fast(trained: Trained) -> NDArray[np.float32]:
    return retrieval.pair_scores(trained, trained.data(TASK, "val"), lambda what, done, total: None)


def test_the_data_are_worth_it(loaded: Callable[[str], Trained]) -> None:
    data = loaded("float32").data(TASK, "val")
    assert len(set(np.diff(data.token_offsets))) > 3
    assert len(set(data.detector_counts(pool_images(data)))) > 3


def test_a_pair_alone_scores_what_it_scores_among_others(loaded, brute) -> None:
    trained = loaded("float32")
    data = trained.data(TASK, "val")
    images = pool_images(data)
    for text, place in ((0, 0), (7, 11), (39, 4)):
        alone = plain(trained, data, text, images[place : place + 1])
        assert alone[0] == pytest.approx(brute("float32")[text, place], abs=1e-6)


@pytest.mark.parametrize("rows", [1, 17, 4096])
def test_float32_is_exact(loaded, brute, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One image a block, several, all."""
    monkeypatch.setattr(retrieval, "BLOCK_ROWS", rows)
    expected = brute("float32")
    assert expected.std() > 1e-3
    np.testing.assert_allclose(fast(loaded("float32")), expected, rtol=0, atol=2e-6 * np.abs(expected).max())


def test_plain_torch_kernels_say_the_same(loaded, brute) -> None:
    trained, expected = loaded("float32"), brute("float32")
    with using("torch"):
        np.testing.assert_allclose(fast(trained), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_bfloat16_errs_no_more_than_the_plain_model_in_it(loaded, brute) -> None:
    exact, rounded = brute("float32"), brute("bfloat16")
    ours = fast(loaded("bfloat16"))
    assert np.abs(ours - exact).max() <= 2 * np.abs(rounded - exact).max()
    assert np.sqrt(np.mean((ours - exact) ** 2)) <= 1.5 * np.sqrt(np.mean((rounded - exact) ** 2))


def test_ranks_and_measures_are_those_of_all_pairs(loaded, brute, tmp_path: Path) -> None:
    """Straight from the scores of all pairs, caption by caption."""
    trained = loaded("float32")
    data = trained.data(TASK, "val")
    scores = evaluate(trained, [TASK], "val", tmp_path)[TASK]
    lines = [json.loads(line) for line in (tmp_path / f"{TASK}_val.jsonl").read_text().splitlines()]
    keys = [data.store.keys()[row] for row in pool_images(data)]
    places = []
    for number, (row, line) in enumerate(zip(brute("float32").tolist(), lines, strict=True)):
        right = data.store.keys()[data.image_rows[number, 0]]
        places.append(1 + sum(score >= row[keys.index(right)] for score in row) - 1)
        assert line == {
            "id": data.ids[number], "image": right, "rank": places[-1],
            "images": [key for _, key in sorted(zip(row, keys, strict=True), key=lambda pair: -pair[0])],
        }  # fmt: skip
    assert scores.metrics == {
        **{f"r@{k}": pytest.approx(np.mean([place <= k for place in places])) for k in (1, 5, 10)},
        "median_rank": np.floor(np.median(places)),
        "mean_rank": pytest.approx(np.mean(places)),
    }
    assert scores.score == scores.metrics["r@1"] and 1 < np.mean(places) < len(keys)


@pytest.mark.parametrize(
    ("scores", "right", "expected"),
    [
        ([[3.0, 2.0, 1.0]], [0], [0]),
        ([[3.0, 2.0, 1.0]], [2], [2]),
        ([[1.0, 1.0, 1.0]], [0], [2]),  # a constant model finds nothing
        ([[1.0, 2.0, 2.0]], [1], [1]),
        ([[-1.0, -2.0], [-2.0, -1.0]], [0, 0], [0, 1]),
    ],
)
def test_ranks_by_hand(scores, right, expected) -> None:
    assert ranks(np.array(scores, np.float32), np.array(right, np.int32)).tolist() == expected


@pytest.mark.parametrize(
    ("found", "median", "mean"), [([0], 1.0, 1.0), ([0, 1], 1.0, 1.5), ([0, 3], 2.0, 2.5), ([4, 5, 9], 6.0, 7.0)]
)
def test_measures_by_hand(found: list[int], median: float, mean: float) -> None:
    got = measures(np.array(found))
    assert (got["median_rank"], got["mean_rank"]) == (median, mean)
    assert got["r@1"] == np.mean([place == 0 for place in found])
    assert got["r@5"] == np.mean([place < 5 for place in found])


def test_best_are_twenty_of_the_pool_and_equals_in_its_order() -> None:
    assert best(np.array([[1.0, 3.0, 3.0, 2.0]], np.float32)).tolist() == [[1, 2, 3, 0]]
    assert best(np.zeros((2, 30), np.float32)).tolist() == [list(range(20))] * 2


def test_projections_made_before_are_refused_where_gradients_are_wanted(loaded) -> None:
    bridge = loaded("float32").model.trunk.bridges[0]
    x = torch.zeros(2, 16)
    with torch.enable_grad(), pytest.raises(ValueError, match="no gradients"):
        bridge(x, x, None, None, None, (x, x))
