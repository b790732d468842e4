"""One op, one name: every op has a plain reference, tests on every backend, and the list of kernels that a run can launch."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from kernels.backends import interpreting
from kernels.names import OPS

ROOT = Path(__file__).resolve().parent.parent.parent
TESTS = Path(__file__).resolve().parent
FUNCTIONS = {"dropout": "drop"}
"""Where an op's function does not carry the op's name."""
REFERENCES = {"coattention": "attention_torch"}
"""The bridge is two attentions."""
NOT_OF_A_MODULE = {"twins", "triton"}
DTYPES = {"float32", "bfloat16", "float16"}


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_a_function_and_a_reference(op: str) -> None:
    module, function = importlib.import_module(f"kernels.{op}"), FUNCTIONS.get(op, op)
    assert callable(getattr(module, function))
    assert callable(getattr(module, REFERENCES.get(op, f"{function}_torch")))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("folder", [TESTS, TESTS / "interpreted"], ids=["cpu", "interpreted"])
def test_every_op_has_its_tests(op: str, folder: Path) -> None:
    assert (folder / f"test_{op}.py").is_file(), f"{op} has no test in {folder.relative_to(ROOT)}"


@pytest.mark.skipif(interpreting(), reason="interpreted kernels are not compiled")
@pytest.mark.parametrize("op", OPS)
def test_every_op_lists_its_kernels(op: str) -> None:
    """For all dtypes, each under a name of its own, with every argument of the kernel given a type."""
    variants = importlib.import_module(f"kernels.{op}").variants()
    assert {variant.dtype for variant in variants} == DTYPES
    assert len({(variant.name, variant.dtype) for variant in variants}) == len(variants)
    for variant in variants:
        assert variant.op == op
        assert list(variant.signature) == variant.kernel.arg_names
        assert {name for name, kind in variant.signature.items() if kind == "constexpr"} == set(variant.constexprs)


def test_every_test_has_its_module() -> None:
    modules = {path.stem for path in (ROOT / "kernels").glob("*.py")}
    tested = {path.stem.removeprefix("test_") for path in TESTS.glob("test_*.py")}
    assert tested - NOT_OF_A_MODULE <= modules, "a test of a kernel that is gone"
