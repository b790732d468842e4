"""The native library: every instruction set that this CPU can run gives the same numbers; what happens without a compiler."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels import native_library
from kernels.adamw import adamw, square_sum
from kernels.attention import attention
from kernels.backends import using
from kernels.bias_dropout_residual_layernorm import bias_dropout_residual_layernorm
from kernels.bias_gelu import bias_gelu
from kernels.coattention import coattention
from kernels.dropout import Dropout, drop, keep_mask_torch
from kernels.masked_lm_loss import masked_lm_loss
from kernels.masked_region_loss import masked_region_loss
from kernels.region_embedding import region_embedding
from kernels.soft_label_bce import soft_label_bce
from pipelines import copy_runs
from tests.kernels.oracle import DEVICE, normal, rows_of

ROOT = Path(__file__).resolve().parent.parent.parent
WITHIN = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""Largest error, root mean square, relative to float64's value."""
ISAS = list(native_library._ISA_FLAGS)[list(native_library._ISA_FLAGS).index(native_library.best_isa()) :]
"""The best one that this CPU can run, and what it can run besides."""

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="the native kernels are for the CPU")


def numbers(dtype: torch.dtype, backend: str) -> dict[str, Tensor]:
    """One result of every op and the gradients of its inputs, in float64, from inputs rounded to `dtype`. The backend torch
    computes in float64."""
    found: dict[str, Tensor] = {}
    with using(backend):
        for op, leaves, results in _every_op(dtype, torch.float64 if backend == "torch" else dtype):
            outputs = [result for result in results if result.requires_grad]
            upstream = [normal(*y.shape, seed=7).to(torch.bfloat16).to(y.dtype) for y in outputs]
            torch.autograd.backward(outputs, upstream)
            gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
            assert len(gradients) == len(leaves)
            found |= {f"{op} {i}": x.detach().double() for i, x in enumerate([*results, *gradients])}
        found |= _optimizer(dtype)
    return found


def _every_op(rounded: torch.dtype, dtype: torch.dtype) -> Iterator[tuple[str, list[Tensor], tuple[Tensor, ...]]]:
    """Name, inputs that get gradients, results."""

    def leaf(*shape: int, seed: int = 0) -> Tensor:
        return normal(*shape, seed=seed).to(rounded).to(dtype).requires_grad_()

    def one(op: str, leaves: list[Tensor], result: Tensor) -> tuple[str, list[Tensor], tuple[Tensor, ...]]:
        return op, leaves, (result,)

    rows, others, dropout = rows_of([1, 7, 30]), rows_of([12, 5, 1]), Dropout(0.1, 1, 2, 3)
    x, residual, width = leaf(38, 101), leaf(38, 101, seed=1), leaf(101)
    weight, shift = leaf(101, seed=2), leaf(101, seed=3)
    yield one("dropout", [x], drop(x, dropout, rows.row_key, rows.row_index))
    x = leaf(38, 101)
    yield one("bias_gelu", [x, width], bias_gelu(x, width))
    x, width = leaf(38, 101), leaf(101)
    normed = bias_dropout_residual_layernorm(x, width, residual, weight, shift, rows, dropout)
    yield one("layernorm", [x, width, residual, weight, shift], normed)
    x, width, boxes = leaf(38, 101), leaf(101), normal(38, 5).float()
    location, bias, weight, shift = leaf(101, 5), leaf(101, seed=4), leaf(101, seed=2), leaf(101, seed=3)
    embedded = region_embedding(x, width, boxes, location, bias, weight, shift, rows, dropout)
    yield one("region_embedding", [x, width, location, bias, weight, shift], embedded)
    q, k, v = leaf(38, 48), leaf(18, 48, seed=1), leaf(18, 48, seed=2)
    yield one("attention", [q, k, v], attention(q, k, v, rows, others, 3, dropout))
    text, image = [leaf(38, 48, seed=i) for i in range(3)], [leaf(18, 48, seed=i) for i in range(3, 6)]
    both = coattention(tuple(text), tuple(image), rows, others, 3, dropout, dropout)  # type: ignore[arg-type]
    yield "coattention", [*text, *image], both
    logits, labels = leaf(4, 203), torch.tensor([3, 3, 200, 7, 0])
    loss = soft_label_bce(logits, torch.tensor([0, 2, 3, 3, 5]), labels, torch.tensor([0.3, 0.6, 1.0, 0.9, 0.3]))
    yield "soft_label_bce", [logits], loss
    hidden, classes, bias = leaf(21, 40), leaf(203, 40, seed=1), leaf(203)
    yield one("masked_lm_loss", [hidden, classes, bias], masked_lm_loss(hidden, classes, bias, torch.arange(21) * 9))
    hidden, classes, bias = leaf(21, 40), leaf(203, 40, seed=1), leaf(203)
    target = normal(21, 203).softmax(-1).float()
    yield one("masked_region_loss", [hidden, classes, bias], masked_region_loss(hidden, classes, bias, target))


def _optimizer(dtype: torch.dtype) -> dict[str, Tensor]:
    gradient = normal(1001).to(dtype)
    master, exp_avg, exp_avg_sq = normal(1001, seed=1).float(), torch.zeros(1001), torch.zeros(1001)
    rule = {"betas": (0.5, 0.75), "eps": 1e-6, "weight_decay": 0.01}  # exact in float32
    adamw(gradient, master, exp_avg, exp_avg_sq, None, lr=1e-2, skipped=torch.tensor(0.0), **rule)  # type: ignore[arg-type]
    states = {"master": master, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "square_sum": square_sum(gradient)}
    return {f"adamw {name}": state.double() for name, state in states.items()}


def python(code: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter, since a process has one library. PATH and CXX as given, the rest as here."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("STOPGO_")}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=inherited | environment, capture_output=True, text=True
    )


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_gives_the_same_numbers(isa: str, tmp_path: Path) -> None:
    if not native_library.available():
        pytest.skip(f"no native kernels here: {native_library.reason()}")
    file = tmp_path / "numbers.pt"
    done = python(
        "import torch\n"
        "from kernels import native_library\n"
        "from kernels.dropout import Dropout, keep_mask\n"
        "from tests.kernels import test_native_library as here\n"
        f"assert native_library.isa() == {isa!r}\n"
        "found = {str(dtype): here.numbers(dtype, 'native') for dtype in here.WITHIN}\n"
        "key = torch.arange(9)\n"
        "masks = [keep_mask(Dropout(0.5, 1, 2, 3), key, key, width, 64) for width in (64, 101)]\n"
        f"torch.save((found, masks), {str(file)!r})",
        STOPGO_ISA=isa,
    )
    assert done.returncode == 0, done.stderr
    found, masks = torch.load(file)
    for dtype, within in WITHIN.items():
        truth = numbers(dtype, "torch")
        assert truth.keys() == found[str(dtype)].keys()
        for name, value in truth.items():
            error = float((found[str(dtype)][name] - value).square().mean().sqrt())
            size = float(value.square().mean().sqrt())
            assert error <= within * size + 1e-7, f"{name} in {dtype}: off by {error:.1e}, size {size:.1e}"
    key = torch.arange(9)
    for mask in masks:
        assert torch.equal(mask, keep_mask_torch(Dropout(0.5, 1, 2, 3), key, key, mask.shape[1], 64))


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS[1:])
def test_every_instruction_set_passes_the_tests_of_the_ops(isa: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "native", "tests/kernels"]
    command += ["--ignore", "tests/kernels/interpreted", "--ignore", "tests/kernels/test_native_library.py"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"STOPGO_ISA": isa}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-2_000:]


TORCH_PATH = """
import torch
from kernels import backends, native_library
from kernels.bias_gelu import bias_gelu, bias_gelu_torch
x, bias = torch.randn(5, 7), torch.randn(7)
assert backends.choose("bias_gelu", x) == "torch"
assert torch.equal(bias_gelu(x, bias), bias_gelu_torch(x, bias))
assert not native_library.available()
print(native_library.reason())
"""


@pytest.fixture
def unbuilt(tmp_path: Path) -> Path:
    """A checkout in which nothing has been built."""
    for folder in ("kernels", "pipelines/native"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def test_without_a_compiler_one_line_says_so_and_torch_computes(unbuilt: Path) -> None:
    empty = unbuilt / "bin"
    empty.mkdir()
    inherited = {"CXX": ""} if "CXX" in os.environ else {}
    done = python(TORCH_PATH, unbuilt, PATH=str(empty), **inherited)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "no C++ compiler found\n"
    assert done.stderr.count("stopgo:") == 1
    assert "stopgo: no native kernels (no C++ compiler found)" in done.stderr
    assert "time" in done.stderr  # it names the cost


@pytest.mark.parametrize("compiler", ["false", "no-such-compiler"])
def test_a_compiler_that_fails_is_named(unbuilt: Path, compiler: str) -> None:
    done = python(TORCH_PATH, unbuilt, CXX=compiler)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("stopgo:") == 1
    assert done.stdout.startswith(compiler)
    assert not list((unbuilt / "build").iterdir())


def test_an_instruction_set_that_does_not_exist_is_refused() -> None:
    done = python("from kernels import native_library; native_library.available()", STOPGO_ISA="mmx")
    assert done.returncode == 1
    assert done.stderr.strip().endswith("STOPGO_ISA=mmx: there are amx, avx512bf16, avx512, avx2, portable")


def test_cmake_has_the_same_instruction_sets_flags_and_sources(unbuilt: Path) -> None:
    """Which is what the digests in the names cover. Configured only; `tests/test_house.py` builds one."""
    if shutil.which("cmake") is None or shutil.which("c++") is None:
        pytest.skip("cmake or a C++ compiler is missing")
    shutil.copy(ROOT / "CMakeLists.txt", unbuilt)
    isas = list(native_library._ISA_FLAGS)
    configure = ["cmake", "-S", ".", "-B", "build/cmake", f"-DSTOPGO_ISAS={';'.join(isas)}"]
    done = subprocess.run(configure, cwd=unbuilt, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    links = [file.read_text() for file in (unbuilt / "build/cmake/CMakeFiles").glob("*/link.txt")]
    found = {name for link in links for name in re.findall(r"libstopgo_\w+-[\w-]+\.so", link)}
    assert found == {native_library.path_of(isa).name for isa in isas} | {copy_runs.path().name}


def test_cmake_picks_the_instruction_set_that_the_engine_picks(unbuilt: Path) -> None:
    if shutil.which("cmake") is None or shutil.which("c++") is None:
        pytest.skip("cmake or a C++ compiler is missing")
    shutil.copy(ROOT / "CMakeLists.txt", unbuilt)
    done = subprocess.run(["cmake", "-S", ".", "-B", "build/cmake"], cwd=unbuilt, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    cache = (unbuilt / "build/cmake/CMakeCache.txt").read_text()
    assert f"STOPGO_ISAS:STRING={native_library.best_isa()}\n" in cache
