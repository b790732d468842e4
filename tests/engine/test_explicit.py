"""Blocks with a backward of their own: their gradients against finite differences in float64, and whose memory they use."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from engine.model.bridge import Bridge
from engine.model.config import ModelConfig
from engine.model.embeddings import TextEmbedding
from engine.model.flat import FlatBlock, add_rows
from engine.model.randomness import Randomness
from engine.model.transformer_layer import TransformerLayer
from tests.engine.small_run import MODEL
from tests.kernels.oracle import normal, rows_of

CONFIG = ModelConfig.model_validate(
    MODEL
    | {"hidden_size": 4, "v_hidden_size": 4, "bi_hidden_size": 4, "intermediate_size": 6, "v_intermediate_size": 6}
)
TEXTS, IMAGES = rows_of([3, 1, 4], seed=1), rows_of([2, 5, 1], seed=1)
MODES = [Randomness(), Randomness(seed=3, step=4, training=True)]
STEP = 1e-3
"""Of finite differences: wide, because softmax works in float32 whatever it is given."""
IDS = torch.tensor([7, 2, 9, 7, 2, 2, 9, 9])


def layer() -> TransformerLayer:
    return TransformerLayer("layer.", 4, 2, 6, 0.3, 0.3)


def block_and_call(name: str, random: Randomness) -> tuple[FlatBlock, Callable[..., object], list[Tensor]]:
    """A block, its call on inputs, and inputs."""
    text, image = normal(TEXTS.total, 4, seed=2), normal(IMAGES.total, 4, seed=3)
    if name == "layer":
        one = layer()
        return one, lambda x: one(x, TEXTS, random), [text]
    if name == "first rows":
        first = layer()
        return first, lambda x: first(x, TEXTS, random, first_only=True), [text]
    if name == "text embedding":
        embedding = TextEmbedding(CONFIG)
        return embedding, lambda: embedding(IDS, rows_of([3, 2, 3]), False, random), []
    if name == "text embedding with a task token":
        embedding = TextEmbedding(CONFIG)
        return embedding, lambda: embedding(IDS, rows_of([3, 2, 3]), True, random), []
    bridge = Bridge("bridge.", CONFIG)
    if name == "bridge":
        return bridge, lambda t, i: bridge(t, i, TEXTS, IMAGES, random), [text, image]
    return bridge, lambda t, i: bridge.image_side(t, i, TEXTS, IMAGES, random), [text, image]


BLOCKS = ["layer", "first rows", "bridge", "image side", "text embedding", "text embedding with a task token"]


@pytest.mark.parametrize("random", MODES, ids=["no dropout", "dropout"])
@pytest.mark.parametrize("name", BLOCKS)
def test_gradients_are_those_of_finite_differences(name: str, random: Randomness) -> None:
    block, call, inputs = block_and_call(name, random)
    block.initialise(0.5, torch.Generator().manual_seed(0))
    block.double()
    with torch.no_grad():
        block.vectors.add_(0.1 * normal(*block.vectors.shape))

    leaves = [block.matrices, block.vectors, *(x.clone().requires_grad_() for x in inputs)]

    def loss() -> Tensor:
        outputs = call(*leaves[2:])
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return torch.stack([(out * normal(*out.shape, seed=5 + i)).sum() for i, out in enumerate(outputs)]).sum()

    gradients = torch.autograd.grad(loss(), leaves)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        for place in range(0, leaf.numel(), max(leaf.numel() // 50, 1)):
            by_difference = (moved(loss, leaf, place, STEP) - moved(loss, leaf, place, -STEP)) / (2 * STEP)
            assert abs(by_difference - float(gradient.view(-1)[place])) < 1e-3 * max(abs(by_difference), 1), place


@torch.no_grad()
def moved(loss: Callable[[], Tensor], leaf: Tensor, place: int, by: float) -> float:
    """The loss with one value of a leaf moved."""
    values = leaf.detach().view(-1)
    before = values[place].item()
    values[place] += by
    result = float(loss())
    values[place] = before
    return result


def test_a_weight_gradient_is_written_where_it_stays() -> None:
    block, x = layer(), normal(TEXTS.total, 4).float()
    block.initialise(0.5, torch.Generator().manual_seed(0))
    places = []
    for _ in range(3):
        block(x, TEXTS, Randomness()).sum().backward()
        assert block.matrices.grad is not None
        places.append(block.matrices.grad.data_ptr())
        block.drop_gradients()
    assert len(set(places)) == 1, "autograd copied the gradient, or the block took new memory"


def gradient_of(block: FlatBlock, *losses: Tensor) -> Tensor:
    block.drop_gradients()
    for loss in losses:
        loss.backward()
    assert block.matrices.grad is not None
    return block.matrices.grad.clone()


def test_gradients_add_up_over_backwards_and_within_one() -> None:
    block = layer()
    block.initialise(0.5, torch.Generator().manual_seed(0))
    one, two = (normal(TEXTS.total, 4, seed=seed).float() for seed in (1, 2))

    def loss(x: Tensor) -> Tensor:
        return block(x, TEXTS, Randomness()).square().sum()

    expected = gradient_of(block, loss(one)) + gradient_of(block, loss(two))
    torch.testing.assert_close(gradient_of(block, loss(one), loss(two)), expected)
    torch.testing.assert_close(gradient_of(block, loss(one) + loss(two)), expected)


def test_a_second_backward_is_refused() -> None:
    block = layer()
    loss = block(normal(TEXTS.total, 4).float(), TEXTS, Randomness()).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        loss.backward()


def test_nothing_is_kept_where_no_gradient_is_wanted() -> None:
    block, x = layer(), normal(TEXTS.total, 4).float()
    with torch.no_grad():
        assert block(x, TEXTS, Randomness()).grad_fn is None


def test_a_block_follows_its_parameters_to_another_dtype() -> None:
    block, x = layer(), normal(TEXTS.total, 4).float()
    block.initialise(0.5, torch.Generator().manual_seed(0))
    before = block(x, TEXTS, Randomness())
    block.bfloat16()
    after = block(x.bfloat16(), TEXTS, Randomness())
    assert after.dtype is torch.bfloat16
    torch.testing.assert_close(after.float(), before, rtol=0.05, atol=0.05)


def test_many_small_gradients_of_one_word_are_not_lost_in_bfloat16() -> None:
    table = torch.full((5, 3), 9.0, dtype=torch.bfloat16)
    rows = torch.full((1000, 3), 1.0, dtype=torch.bfloat16)
    add_rows(table, torch.full((1000,), 2), rows)
    assert table[2].tolist() == [1000.0] * 3  # summed in bfloat16, ones stop counting at 256
    assert not table[[0, 1, 3, 4]].any()
