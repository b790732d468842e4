"""Both directions of the bridge against loops over items and heads in float64, on every backend of the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from kernels.attention import attention, attention_torch
from kernels.coattention import QKV, coattention, coattention_backward, coattention_forward
from kernels.dropout import Dropout
from kernels.rows import Rows
from tests.kernels.backends import HERE, bits_of, forced, in_float32
from tests.kernels.oracle import check, gradients_are_right, normal, rows_of
from tests.kernels.test_attention import attention_oracle, in_one_dtype

Dropouts = tuple[Dropout | None, Dropout | None]

HEADS, WIDTH = 2, 16
NAMES = ("q_text", "k_text", "v_text", "q_image", "k_image", "v_image")
SHAPES = [
    ([1, 2, 7, 63, 65], [101, 64, 1, 65, 13]),
    ([1], [1]),
    ([11], [101]),
    ([64, 33], [101, 40]),
    ([101, 3], [31, 37]),
    ([5, 5], [37, 37]),
    ([256, 1], [306, 2]),
]
"""Either side short, or both, or neither; one length, and many."""
DROPOUTS: list[Dropouts] = [
    (None, None),
    (Dropout(0.1, 5, 6, 7), Dropout(0.1, 5, 6, 8)),
    (Dropout(0.1, 5, 6, 7), None),
]


@pytest.fixture(params=HERE, autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from forced(request.param)


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


def inputs(text_rows: Rows, image_rows: Rows, width: int = WIDTH) -> dict[str, Tensor]:
    totals = {"text": text_rows.total, "image": image_rows.total}
    return {name: normal(totals[name.split("_")[1]], width, seed=i) for i, name in enumerate(NAMES)}


def pairs_of(texts: list[int], images: list[int]) -> tuple[Rows, Rows]:
    """The two row spaces of pairs: their items have one key."""
    text_rows = rows_of(texts)
    return text_rows, Rows(rows_of(images).cu_seqlens, sum(images), max(images), text_rows.item_key)


def check_coattention(text_rows: Rows, image_rows: Rows, dropouts: Dropouts, width: int = WIDTH) -> None:
    check(
        lambda **x: coattention(*sides(x), text_rows, image_rows, HEADS, *dropouts),
        lambda **x: plain(*sides(x), attention_torch, text_rows, image_rows, dropouts),
        lambda **x: plain(*sides(x), attention_oracle, text_rows, image_rows, dropouts),
        inputs(text_rows, image_rows, width),
    )


def results(texts: list[int], images: list[int], dtype: torch.dtype, dropouts: Dropouts) -> list[Tensor]:
    """Both contexts, and the gradients of all six inputs."""
    text_rows, image_rows = pairs_of(texts, images)
    leaves = {name: x.to(dtype).requires_grad_() for name, x in inputs(text_rows, image_rows).items()}
    contexts = coattention(*sides(leaves), text_rows, image_rows, HEADS, *dropouts)
    torch.autograd.backward(contexts, [normal(*context.shape, seed=7).to(dtype) for context in contexts])
    return [*contexts, *(leaf.grad for leaf in leaves.values() if leaf.grad is not None)]


@pytest.mark.parametrize("dropouts", DROPOUTS, ids=["no dropout", "both", "text alone"])
@pytest.mark.parametrize(("texts", "images"), SHAPES, ids=str)
def test_against_the_oracle(texts: list[int], images: list[int], dropouts: Dropouts) -> None:
    check_coattention(*pairs_of(texts, images), dropouts)


def test_wide_heads() -> None:
    check_coattention(*pairs_of([12, 5], [101, 40]), DROPOUTS[1], width=HEADS * 128)


def test_long_items() -> None:
    check_coattention(*pairs_of([256, 1], [306, 101]), DROPOUTS[1])


def test_in_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    in_one_dtype(monkeypatch, torch.float16)
    check_coattention(*pairs_of([12, 63], [101, 40]), DROPOUTS[1])


def test_one_direction_does_not_move_the_other() -> None:
    """Dropout where text reads the image leaves the image's context alone."""
    text_rows, image_rows = pairs_of([3, 4], [5, 2])
    text, image = sides({name: x.float() for name, x in inputs(text_rows, image_rows).items()})
    without = coattention(text, image, text_rows, image_rows, HEADS)
    dropped = coattention(text, image, text_rows, image_rows, HEADS, Dropout(0.5, 1, 2, 3), None)
    assert not torch.equal(without[0], dropped[0])
    assert torch.equal(without[1], dropped[1])


@pytest.mark.parametrize(("texts", "images"), [([3, 17], [40, 2]), ([70, 3], [5, 101])], ids=str)
def test_a_direction_is_an_attention(texts: list[int], images: list[int]) -> None:
    """The masks are those of the directions alone: whatever shares a launch changes no draw."""
    text_rows, image_rows = pairs_of(texts, images)
    text, image = sides({name: x.float() for name, x in inputs(text_rows, image_rows).items()})
    both = coattention(text, image, text_rows, image_rows, HEADS, *DROPOUTS[1])
    alone = plain(text, image, attention, text_rows, image_rows, DROPOUTS[1])
    for one, other in zip(both, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dropouts", DROPOUTS[:2], ids=["no dropout", "both"])
def test_gradients(dropouts: Dropouts) -> None:
    text_rows, image_rows = pairs_of([1, 2], [3, 2])

    def both(**x: Tensor) -> Tensor:
        return torch.cat(coattention(*sides(x), text_rows, image_rows, HEADS, *dropouts))

    gradients_are_right(in_float32(both), inputs(text_rows, image_rows, 4))


def test_gradients_are_written_in_place() -> None:
    """Into columns of each stream's packed gradient; the same bits as through autograd."""
    text_rows, image_rows = pairs_of([3, 17], [40, 2])
    x = {name: value.bfloat16() for name, value in inputs(text_rows, image_rows).items()}
    text, image = sides(x)
    *contexts, saved = coattention_forward(text, image, text_rows, image_rows, HEADS, *DROPOUTS[1])
    packed = [torch.full((rows.total, 3 * WIDTH), 7.0).to(text[0]) for rows in (text_rows, image_rows)]
    dtext, dimage = ((p[:, :WIDTH], p[:, WIDTH : 2 * WIDTH], p[:, 2 * WIDTH :]) for p in packed)
    upstream = [normal(*context.shape, seed=7).bfloat16() for context in contexts]
    coattention_backward(saved, upstream[0], upstream[1], dtext, dimage)
    expected = results([3, 17], [40, 2], torch.bfloat16, DROPOUTS[1])
    assert all(torch.equal(one, other) for one, other in zip([*contexts, *dtext, *dimage], expected, strict=True))


def test_the_same_bits_on_any_number_of_threads() -> None:
    bits_of(lambda: results([33, 1, 70, 12], [40, 101, 3, 2], torch.bfloat16, DROPOUTS[1]))


@pytest.mark.parametrize("backend", [name for name in HERE if name != "torch"], indirect=True)
def test_what_does_not_fit_is_refused(backend: str) -> None:
    text_rows, image_rows = pairs_of([3, 4], [5, 2])
    text, image = sides({name: x.float() for name, x in inputs(text_rows, image_rows).items()})
    with pytest.raises(ValueError, match="q has 7 rows, its items have 9"):
        coattention_forward(text, image, pairs_of([3, 6], [5, 2])[0], image_rows, HEADS, None, None)
    narrow_text = (text[0], text[1][:, :8], text[2][:, :8])
    narrow_image = (image[0][:, :8], image[1], image[2])
    with pytest.raises(ValueError, match="text is 16 wide"):
        coattention_forward(narrow_text, narrow_image, text_rows, image_rows, HEADS, None, None)
