"""The Triton kernels: their tests in the interpreter, in a process of its own, and what compiled ones show without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import dropout
from kernels.variants import Variant
from tests.kernels import interpreted_tests


def test_the_kernels_in_the_interpreter() -> None:
    code, said = interpreted_tests.finished()
    assert code == 0, said


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
