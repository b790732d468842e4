"""The three ways of `bench.retrieval` score the same pairs alike, and what is said of them is counted right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import retrieval
from bench.peers.model import PaddedModel
from bench.peers.retrieval import AuthorsLoop, PairwiseLoop
from bench.retrieval import main
from bench.retrieval_pool import Pool
from bench.retrieval_ways import Loop, Ours, counted, models
from engine.model.config import ModelConfig
from engine.model.vilbert import ViLBERT
from engine.tasks import load_table
from tests.bench.test_peers import small

ROW = load_table().row("coco_retrieval")
CAPTIONS, IMAGES, REGIONS = 5, 7, 101


def pool(config: ModelConfig) -> Pool:
    """Images of different numbers of regions, too, which the published features do not have."""
    drawn = Pool.drawn(ROW, config, CAPTIONS, IMAGES, seed=1)
    assert len({len(text) for text in drawn.texts}) > 1
    for place in range(0, IMAGES, 2):
        drawn.features[place], drawn.boxes[place] = drawn.features[place][: 9 + place], drawn.boxes[place][: 9 + place]
    return drawn


def ways(
    config: ModelConfig, block: int = 3
) -> tuple[tuple[Ours, Loop, Loop], tuple[ViLBERT, PaddedModel, PaddedModel]]:
    ours, padded, exact = models(config, torch.float32, seed=2)
    drawn = pool(config)
    return (
        Ours(ours, drawn, torch.float32, 2, block),
        Loop(PairwiseLoop(padded), drawn, torch.float32, 2, block),
        Loop(AuthorsLoop(exact), drawn, torch.float32, 1, 5),
    ), (ours, padded, exact)


@pytest.mark.parametrize(
    "bridges",
    [
        {},
        {
            "v_biattention_id": (1, 2),
            "t_biattention_id": (1, 3),
        },  # an image layer before the first bridge, none behind the last
        {"v_biattention_id": (1,), "t_biattention_id": (0,)},  # one bridge, no text layer before it
    ],
)
def test_the_same_scores(bridges: dict[str, tuple[int, ...]]) -> None:
    found = [way.scores(CAPTIONS, IMAGES) for way in ways(small(**bridges))[0]]
    assert found[0].shape == (CAPTIONS, IMAGES) and float(found[0].std(1).min()) > 1e-3
    for other in found[1:]:
        torch.testing.assert_close(found[0], other, atol=2e-6, rtol=1e-5)


def test_the_published_model_with_one_text_is_that_with_the_text_repeated() -> None:
    config = small()
    drawn = pool(config)
    model = PaddedModel(config).eval()
    model.initialise(0)
    text, images = drawn.padded_text(0), drawn.padded_images(0, IMAGES, torch.float32)
    shared = AuthorsLoop(model).scores(text, images)
    torch.testing.assert_close(shared, PairwiseLoop(model).scores(text, images), atol=1e-6, rtol=1e-5)


def test_rows_and_bytes_by_hand() -> None:
    """Three text layers (the bridges stand before the second and third), two image layers, two bridges; see `small`."""
    config = small()
    (ours, padded, authors), (model, padded_model, authors_model) = ways(config, block=1)
    text = [len(x) + 1 for x in ours.pool.texts]
    regions = len(ours.pool.boxes[0])
    with counted(model) as alone:
        ours.texts([0])
    assert (alone.rows, alone.feature_bytes) == (text[0], 0)  # one layer in front of the first bridge
    with counted(model) as image:
        ours.images(0, 1)
    assert (image.rows, image.feature_bytes) == (0, regions * 12 * 4)  # no layer
    with counted(model) as pair:
        ours.pieces()["pairs"].run(0)
    behind = sum(2 * t + t + 1 for t in text[:2])  # two bridges, a layer, and row 0 of the last layer
    assert pair.rows == behind + 2 * (2 * regions + regions + 1) and pair.feature_bytes == 0
    with counted(padded_model) as loop:
        padded.pieces()["pairs"].run(0)
    tokens = ROW.max_tokens + 1
    assert loop.rows == 2 * (5 * tokens + 4 * REGIONS) and loop.feature_bytes == 2 * REGIONS * 12 * 4
    with counted(authors_model) as call:
        authors.pieces()["pairs"].run(0)
    assert call.rows == tokens + 5 * (4 * tokens + 4 * REGIONS) and call.feature_bytes == 5 * REGIONS * 12 * 4


@pytest.mark.parametrize(
    ("ours", "padded", "turned", "beyond"),
    [
        ([3.0, 2.0, 1.0], [3.0, 2.0, 1.0], 0, 0),
        ([2.0, 3.0, 1.0], [3.6, 2.0, 1.0], 1, 0),  # 1 apart, and the dtype errs by 0.6
        ([2.0, 3.0, 1.0], [3.1, 2.0, 1.0], 1, 1),
        ([1.0, 2.0, 3.0], [3.6, 2.0, 1.0], 3, 1),
        ([3.0, 3.0, 1.0], [3.0, 2.0, 1.0], 0, 0),  # a tie turns nothing
    ],
)
def test_order(ours: list[float], padded: list[float], turned: int, beyond: int) -> None:
    exact = torch.tensor([[3.0, 2.0, 1.0]])
    found = retrieval._order(torch.tensor([ours]), torch.tensor([padded]), exact)
    assert (found["pairs_of_images"], found["turned"], found["beyond"]) == (3, turned, beyond)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    part = {"captions": 2, "block": 2, "call": 3, "ranked_captions": 2, "ranked_images": 3}
    monkeypatch.setitem(retrieval.SLICES, "tiny", part)
    path = tmp_path / "results" / "retrieval.json"
    path.parent.mkdir()
    path.write_text('{"another": 1}')
    sizes = ["--captions", "4", "--images", "3", "--seconds", "0", "--whole", "--precision", "float32"]
    assert main(["--model", "tiny", *sizes, "--json", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "authors" in shown and "ours by the clock" in shown
    written = json.loads(path.read_text())
    assert written["another"] == 1
    result = written["tiny float32"]
    units, of_all = result["seconds_of_a_unit"], result["seconds_of_all"]
    own = 4 * units["ours texts"]["median"] + 3 * units["ours images"]["median"] + 12 * units["ours pairs"]["median"]
    assert of_all["ours"] == pytest.approx(own)
    assert of_all["authors"] == pytest.approx(12 * units["authors pairs"]["median"])
    assert result["whole_seconds"] > 0 and result["order"]["largest_error"]["ours"] < 1e-5
    assert main(["--model", "huge", "--json", str(path)]) == 2
    assert "error: --model huge" in capsys.readouterr().err
