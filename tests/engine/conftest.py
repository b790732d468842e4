"""Runs that several test files look at."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from engine import figures
from tests.engine.small_run import configure, train


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than small runs."""
    for name in ("dsg_timeline", "curves", "scores"):
        monkeypatch.setattr(figures, name, lambda folder: folder)


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data and the configuration, `run.yaml`, of a small run. Nobody writes there."""
    folder = tmp_path_factory.mktemp("data")
    configure(folder)
    return folder


@pytest.fixture(scope="session")
def undisturbed(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a run of it that was left alone, by precision."""

    @cache
    def run(precision: str) -> Path:
        folder = tmp_path_factory.mktemp(precision) / "run"
        assert train(small_data, folder, precision) == 0
        return folder

    return run
