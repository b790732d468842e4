"""One op, one name: every op has its plain reference beside it, and its test here."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
MODULES = sorted(path.stem for path in (ROOT / "kernels").glob("*.py") if path.stem != "__init__")
OPS = [name for name in MODULES if hasattr(importlib.import_module(f"kernels.{name}"), name)]
"""A file is an op if it has a function of its own name."""


def test_the_ops_are_found() -> None:
    assert {"attention", "coattention", "bias_gelu", "masked_lm_loss"} <= set(OPS)


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_a_reference_and_a_test(op: str) -> None:
    assert (ROOT / "tests" / "kernels" / f"test_{op}.py").is_file(), f"kernels/{op}.py has no test"
    reference = "attention_torch" if op == "coattention" else f"{op}_torch"  # the bridge is two attentions
    assert callable(getattr(importlib.import_module(f"kernels.{op}"), reference))


def test_every_test_has_its_module() -> None:
    tested = {path.stem.removeprefix("test_") for path in Path(__file__).parent.glob("test_*.py")}
    assert tested - {"twins"} <= set(MODULES), "a test of a kernel that is gone"
