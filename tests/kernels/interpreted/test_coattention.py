"""Both directions of the bridge, on the Triton kernels: in their interpreter, or compiled where there is a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import attention_triton
from kernels.coattention import coattention
from tests.kernels.backends import forced, gradients_are_right_along
from tests.kernels.test_attention import in_one_dtype
from tests.kernels.test_coattention import (
    DROPOUTS,
    HEADS,
    Dropouts,
    check_coattention,
    inputs,
    pairs_of,
    results,
    sides,
    test_a_direction_is_an_attention,
    test_gradients_are_written_in_place,
    test_one_direction_does_not_move_the_other,
    test_what_does_not_fit_is_refused,
)

__all__ = [
    "test_a_direction_is_an_attention",
    "test_gradients_are_written_in_place",
    "test_one_direction_does_not_move_the_other",
    "test_what_does_not_fit_is_refused",
]


@pytest.fixture(autouse=True)
def backend() -> Iterator[str]:
    yield from forced("triton")


class Counted:
    """A kernel, and how often it was launched."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.launches = kernel, 0

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.launches += 1
        return self.kernel[grid]


@pytest.mark.parametrize("dropouts", DROPOUTS, ids=["no dropout", "both", "text alone"])
def test_against_the_oracle(dropouts: Dropouts) -> None:
    check_coattention(*pairs_of([1, 7], [20, 2]), dropouts)


@pytest.mark.parametrize(
    ("texts", "images"),
    [([11, 31], [101, 40]), ([63], [65]), ([101], [31]), ([40, 1], [37, 64]), ([65], [66]), ([256], [7]), ([5], [306])],
    ids=str,
)
def test_either_side_short_or_long(monkeypatch: pytest.MonkeyPatch, texts: list[int], images: list[int]) -> None:
    in_one_dtype(monkeypatch, torch.bfloat16)
    check_coattention(*pairs_of(texts, images), DROPOUTS[1])


@pytest.mark.parametrize(("texts", "images"), [([12], [70]), ([40], [70]), ([65], [70])], ids=str)
def test_wide_heads(monkeypatch: pytest.MonkeyPatch, texts: list[int], images: list[int]) -> None:
    """Of 128, as the full model's."""
    in_one_dtype(monkeypatch, torch.bfloat16)
    check_coattention(*pairs_of(texts, images), DROPOUTS[1], width=HEADS * 128)


@pytest.mark.parametrize(
    ("texts", "images", "launches"), [([5, 12], [40, 65], 1), ([64], [65], 1), ([65], [66], 2)], ids=str
)
def test_both_directions_share_their_launches(
    monkeypatch: pytest.MonkeyPatch, texts: list[int], images: list[int], launches: int
) -> None:
    forward, backward = Counted(attention_triton._forward), Counted(attention_triton._backward)
    monkeypatch.setattr(attention_triton, "_forward", forward)
    monkeypatch.setattr(attention_triton, "_backward", backward)
    results(texts, images, torch.bfloat16, DROPOUTS[1])
    assert (forward.launches, backward.launches) == (1, launches)


@pytest.mark.parametrize("dropouts", DROPOUTS[:2], ids=["no dropout", "both"])
def test_gradients(dropouts: Dropouts) -> None:
    text_rows, image_rows = pairs_of([1, 5], [20, 2])

    def both(**x: Tensor) -> Tensor:
        return torch.cat(coattention(*sides(x), text_rows, image_rows, HEADS, *dropouts))

    gradients_are_right_along(both, inputs(text_rows, image_rows, 8))


def test_the_same_bits_every_time() -> None:
    first, second = (results([3], [70], torch.bfloat16, DROPOUTS[1]) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
