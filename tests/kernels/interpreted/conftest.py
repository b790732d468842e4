"""Triton kernels on CPU tensors. Whether a kernel is interpreted is settled when it is imported, so these tests need a process
of their own, with TRITON_INTERPRET=1 from the start: `tests/kernels/test_triton.py` starts it.
"""

from __future__ import annotations

from kernels.backends import interpreting

collect_ignore_glob: list[str] = []
if interpreting():
    from tests.kernels import interpreter

    interpreter.install()
else:
    collect_ignore_glob.append("test_*.py")


def pytest_report_collectionfinish() -> str:
    where = "tests/kernels/interpreted"
    return "" if interpreting() else f"{where}: not here, TRITON_INTERPRET=1 is not set (test_triton.py runs them)"
