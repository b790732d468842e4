"""Triton kernels on CPU tensors. Whether a kernel is interpreted is settled when it is imported, so these tests need a process
of their own, with TRITON_INTERPRET=1 from the start: `tests/kernels/test_triton.py` starts it.
"""

from __future__ import annotations

from kernels.backends import interpreting
from tests.kernels.oracle import DEVICE

collect_ignore_glob: list[str] = []
if interpreting():
    from tests.kernels import interpreter

    interpreter.install()
elif DEVICE.type == "cpu":
    collect_ignore_glob.append("test_*.py")
else:  # the same tests, of compiled kernels
    collect_ignore_glob.append("test_interpreter.py")


def pytest_report_collectionfinish() -> str:
    if interpreting() or DEVICE.type != "cpu":
        return ""
    return "tests/kernels/interpreted: not here, TRITON_INTERPRET=1 is not set (test_triton.py runs them)"
