"""The Triton kernels: their tests in the interpreter, in a process of its own, and what compiled ones show without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import dropout
from kernels.variants import Variant

ROOT = Path(__file__).resolve().parent.parent.parent


def test_the_kernels_in_the_interpreter() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "STOPGO_KERNELS"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels/interpreted"],
        cwd=ROOT,
        env=environment | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2_000:]


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(
    "variant", [v for v in dropout.variants() if v.constexprs["WIDTH"] == 1024], ids=lambda variant: str(variant.dtype)
)
def test_a_mask_is_drawn_where_it_is_used(
    variant: Variant, arch: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each thread draws for the values that it holds: no shared memory. See `held_like` in kernels/dropout.py."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    pointers = [i for i, kind in enumerate(variant.signature.values()) if kind.startswith("*")]
    aligned = {(i,): [["tt.divisibility", 16]] for i in pointers}
    source = ASTSource(variant.kernel, variant.signature, variant.constexprs, aligned)
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    assert compiled.metadata.shared == 0
