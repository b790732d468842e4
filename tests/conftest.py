"""Settings that all tests share."""

from __future__ import annotations

import os

import pytest
from hypothesis import settings

# On CPUs that are not Intel's, MKL's sums depend on where memory lies, by a last bit: tests that compare bits would fail.
os.environ.setdefault("MKL_CBWR", "AVX2,STRICT")

import engine  # noqa: F401 - its thread settings must be there before torch is

import torch  # isort: skip
from tests.kernels import interpreted_tests  # isort: skip

# Shared machines stall now and then: no deadline per example. CI draws the same examples every time.
settings.register_profile("stopgo", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("stopgo")

THREADS = torch.get_num_threads()


@pytest.fixture(autouse=True)
def own_threads() -> None:
    """Commands, also those of wider fixtures, run in the tests' own process: no test inherits the threads they ask for."""
    torch.set_num_threads(THREADS)


def pytest_collection_finish(session: pytest.Session) -> None:
    """The longest test runs beside the others."""
    session.items.sort(key=lambda item: item.name == interpreted_tests.TEST)
    if len(session.items) > interpreted_tests.MANY and session.items[-1].name == interpreted_tests.TEST:
        interpreted_tests.started()


def pytest_sessionfinish() -> None:
    interpreted_tests.stop()
