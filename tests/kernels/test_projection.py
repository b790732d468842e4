"""The products of a projection against float64: any number of rows, strided operands, sums added to; the same bits on any
number of threads. Where the CPU has no AMX, the same tests hold torch to the same promises."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import native_library, projection
from kernels.backends import UnusableBackend, choose, using
from kernels.names import parse
from kernels.projection import input_gradient, linear, project, weight_gradient
from tests.kernels.backends import bits_of
from tests.kernels.oracle import DEVICE, normal

ROWS = [1, 2, 7, 16, 31, 32, 33, 63, 64, 65, 97, 101, 256, 306, 1100, 4099]
"""Few and many, primes, both sides of tiles and blocks, more than one chunk of rows, a depth of dW in several parts."""

WIDTHS = [(32, 32), (96, 64), (160, 1024), (768, 96), (64, 3072)]
"""(width, depth): panels that end early among them."""

AMX = DEVICE.type == "cpu" and native_library.available() and native_library.isa() == "amx"
Product = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def bf16(*shape: int, seed: int) -> Tensor:
    """Rows out of a wider tensor, as a split of a projection gives them."""
    rows, width = shape
    return normal(rows, width + 32, seed=seed).to(torch.bfloat16)[:, :width]


def operands(rows: int, width: int, depth: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, W, bias, dy."""
    x, dy = bf16(rows, depth, seed=1), bf16(rows, width, seed=2)
    w, bias = (normal(*shape, seed=3).mul(0.1).to(torch.bfloat16) for shape in ((width, depth), (width,)))
    return x, w, bias, dy


def forward(x: Tensor, w: Tensor, bias: Tensor, dy: Tensor) -> Tensor:
    return project(x, w)


def forward_with_bias(x: Tensor, w: Tensor, bias: Tensor, dy: Tensor) -> Tensor:
    return project(x, w, bias)


def gradient_of_input(x: Tensor, w: Tensor, bias: Tensor, dy: Tensor) -> Tensor:
    return input_gradient(dy, w)


def added_gradient_of_input(x: Tensor, w: Tensor, bias: Tensor, dy: Tensor) -> Tensor:
    return input_gradient(dy, w, x.contiguous().clone())


def gradient_of_weight(x: Tensor, w: Tensor, bias: Tensor, dy: Tensor) -> Tensor:
    memory = torch.full((w.numel() + 7,), torch.nan, dtype=w.dtype, device=w.device)
    written = memory[7:].view(w.shape) if len(x) % 2 else torch.empty_like(w)  # where a gradient lies: aligned or not
    weight_gradient(dy, x, written)
    return written


def gradient_of_bias(x: Tensor, w: Tensor, bias: Tensor, dy: Tensor) -> Tensor:
    written = torch.full_like(bias, torch.nan)
    weight_gradient(dy, x, torch.empty_like(w), written)
    return written


PRODUCTS: list[Product] = [
    forward, forward_with_bias, gradient_of_input, added_gradient_of_input, gradient_of_weight, gradient_of_bias,
]  # fmt: skip


@pytest.mark.parametrize("product", PRODUCTS, ids=lambda product: product.__name__)
@pytest.mark.parametrize(("width", "depth"), WIDTHS)
def test_products_against_float64(product: Product, width: int, depth: int) -> None:
    """At most twice torch's error, and every element near the truth."""
    for rows in ROWS:
        x = operands(rows, width, depth)
        truth = product(*(value.double() for value in x))
        with using({"projection": "torch"}):
            plain = product(*x).double()
        ours = product(*x).double()
        assert ours.shape == truth.shape
        error, allowed = (ours - truth).square().mean().sqrt(), (plain - truth).square().mean().sqrt()
        assert error <= 2 * allowed + 1e-6, (rows, float(error), float(allowed))
        # A result is rounded once, from float32 sums: half a unit of its own last place, and a little of the largest. cuBLAS
        # may round a product before it adds to it.
        largest = 2**-12 if DEVICE.type == "cpu" else 2**-8
        assert ((ours - truth).abs() <= 2**-8 * truth.abs() + largest * truth.abs().max()).all(), rows


@pytest.mark.parametrize("product", PRODUCTS, ids=lambda product: product.__name__)
@pytest.mark.parametrize("rows", [5, 70, 404, 4099])
def test_the_same_bits_on_any_number_of_threads(product: Product, rows: int) -> None:
    if not AMX:
        pytest.skip("torch's products promise no order of their sums")
    x = operands(rows, 192, 256)
    bits_of(lambda: [product(*x)])


@pytest.mark.parametrize("product", PRODUCTS, ids=lambda product: product.__name__)
def test_any_cut_of_rows_has_rows(product: Product) -> None:
    """1,290 rows of 3,072 are eight chunks of 162; rounded up to whole tiles, seven are enough."""
    for rows in (1290, *range(129, 2600, 223)):
        x = operands(rows, 64, 3072)
        ours = product(*x)
        with using({"projection": "torch"}):
            torch.testing.assert_close(ours, product(*x), rtol=2**-6, atol=2**-6 * float(ours.abs().max()))


def test_what_is_no_multiple_of_the_tiles_is_torchs() -> None:
    """An answer head is 3,129 wide; a batch may be empty; float32 is not rounded to bfloat16."""
    x, w, bias, _ = operands(5, 33, 64)
    assert torch.equal(project(x, w, bias), F.linear(x, w, bias))
    assert project(x[:0], w).shape == (0, 33)
    x, w, bias, _ = operands(5, 64, 64)
    assert torch.equal(project(x.float(), w.float()), F.linear(x.float(), w.float()))
    assert project(x[:0], w).shape == (0, 64)
    columns_first = x.t().contiguous().t()
    assert torch.equal(input_gradient(columns_first, w), torch.mm(columns_first, w))


def test_operands_that_do_not_fit_are_refused() -> None:
    """By torch, in its words: nothing of the sort reaches a kernel that reads through bare pointers."""
    x, w, bias, dy = operands(5, 64, 96)
    with pytest.raises(RuntimeError):
        project(x[:, :64], w)
    with pytest.raises(RuntimeError):
        project(x, w, bias[:32])
    with pytest.raises(RuntimeError):
        project(x.float(), w)
    with pytest.raises(RuntimeError):
        input_gradient(dy[:, :32], w)
    with pytest.raises(RuntimeError):
        input_gradient(dy, w, x[:4].contiguous())
    with pytest.raises(RuntimeError):
        weight_gradient(dy[:4], x, torch.empty_like(w))


@pytest.mark.skipif(not AMX, reason="needs a CPU with AMX")
def test_native_products_are_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []

    def noting(name: str, product: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*tensors: Tensor, **options: Tensor) -> Tensor:
            called.append(name)
            return product(*tensors, **options)

        return run

    for name, product in list(projection.NATIVE.items()):
        monkeypatch.setitem(projection.NATIVE, name, noting(name, product))
    x = operands(40, 64, 96)
    for call in PRODUCTS:
        call(*x)
    assert called == ["forward", "forward", "input_gradient", "added_input_gradient"] + 2 * ["weight_gradient"]


def test_choice_of_backend() -> None:
    """Triton has no part in it; a name for all ops at once leaves it to the rule, but for torch."""
    x = torch.zeros(1, dtype=torch.bfloat16)
    assert choose("projection", x) == ("native" if AMX else "torch")
    assert parse("torch")["projection"] == "torch"
    assert "projection" not in parse("native")
    assert "projection" not in parse("triton")
    with pytest.raises(ValueError, match="projection has no triton backend"):
        parse("projection=triton")
    if not AMX:
        with using({"projection": "native"}), pytest.raises(UnusableBackend, match="projection: "):
            choose("projection", x)


def test_autograd_follows_a_projection() -> None:
    x, w, _, dy = operands(40, 64, 96)
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    linear(x, w).backward(dy)
    assert x.grad is not None and torch.equal(x.grad, input_gradient(dy, w.detach()))
    assert w.grad is not None and torch.equal(w.grad, gradient_of_weight(x.detach(), w.detach(), w[:, 0], dy))
