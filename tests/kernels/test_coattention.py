"""Both directions of the bridge against loops over items and heads in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels.attention import attention_torch
from kernels.coattention import coattention
from kernels.dropout import Dropout
from kernels.rows import Rows
from tests.kernels.oracle import check, gradients_are_right, normal, rows_of
from tests.kernels.test_attention import attention_oracle

QKV = tuple[Tensor, Tensor, Tensor]
Dropouts = tuple[Dropout | None, Dropout | None]

HEADS, WIDTH = 2, 16
NAMES = ("q_text", "k_text", "v_text", "q_image", "k_image", "v_image")
SHAPES = [([1, 2, 7, 63, 65], [101, 64, 1, 65, 13]), ([1], [1]), ([11], [101]), ([5, 5], [37, 37])]
DROPOUTS: list[Dropouts] = [
    (None, None),
    (Dropout(0.1, 5, 6, 7), Dropout(0.1, 5, 6, 8)),
    (Dropout(0.1, 5, 6, 7), None),
]


def plain(
    text: QKV, image: QKV, one: Callable[..., Tensor], text_rows: Rows, image_rows: Rows, dropouts: Dropouts
) -> tuple[Tensor, Tensor]:
    """Text reads image, then image reads text, by one attention each."""
    return (
        one(text[0], image[1], image[2], text_rows, image_rows, HEADS, dropouts[0]),
        one(image[0], text[1], text[2], image_rows, text_rows, HEADS, dropouts[1]),
    )


def sides(x: dict[str, Tensor]) -> tuple[QKV, QKV]:
    return (x["q_text"], x["k_text"], x["v_text"]), (x["q_image"], x["k_image"], x["v_image"])


def inputs(text_rows: Rows, image_rows: Rows, width: int) -> dict[str, Tensor]:
    totals = {"text": text_rows.total, "image": image_rows.total}
    return {name: normal(totals[name.split("_")[1]], width, seed=i) for i, name in enumerate(NAMES)}


def pairs_of(texts: list[int], images: list[int]) -> tuple[Rows, Rows]:
    """The two row spaces of pairs: their items have one key."""
    text_rows = rows_of(texts)
    return text_rows, Rows(rows_of(images).cu_seqlens, sum(images), max(images), text_rows.item_key)


@pytest.mark.parametrize("dropouts", DROPOUTS, ids=["no dropout", "both", "text alone"])
@pytest.mark.parametrize(("texts", "images"), SHAPES, ids=str)
def test_against_the_oracle(texts: list[int], images: list[int], dropouts: Dropouts) -> None:
    text_rows, image_rows = pairs_of(texts, images)
    check(
        lambda **x: coattention(*sides(x), text_rows, image_rows, HEADS, *dropouts),
        lambda **x: plain(*sides(x), attention_torch, text_rows, image_rows, dropouts),
        lambda **x: plain(*sides(x), attention_oracle, text_rows, image_rows, dropouts),
        inputs(text_rows, image_rows, WIDTH),
    )


def test_one_direction_does_not_move_the_other() -> None:
    """Dropout where text reads the image leaves the image's context alone."""
    text_rows, image_rows = pairs_of([3, 4], [5, 2])
    text, image = sides(inputs(text_rows, image_rows, WIDTH))
    without = coattention(text, image, text_rows, image_rows, HEADS)
    dropped = coattention(text, image, text_rows, image_rows, HEADS, Dropout(0.5, 1, 2, 3), None)
    assert not torch.equal(without[0], dropped[0])
    assert torch.equal(without[1], dropped[1])


@pytest.mark.parametrize("dropouts", DROPOUTS[:2], ids=["no dropout", "both"])
def test_gradients(dropouts: Dropouts) -> None:
    text_rows, image_rows = pairs_of([1, 2], [3, 2])
    gradients_are_right(
        lambda **x: coattention(*sides(x), text_rows, image_rows, HEADS, *dropouts), inputs(text_rows, image_rows, 4)
    )
