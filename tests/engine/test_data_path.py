"""`data_path`: a run through DALI and a plain one end with the same weights, also where one continues the other."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.assembly import assemble
from engine.config import config_hash, load
from engine.train import main
from tests.engine import test_pretraining
from tests.engine.small_run import TASKS, resume, train
from tests.engine.test_kill import assert_same, train_and_kill
from tests.engine.test_loop import run, same, weights
from tests.pipelines.test_dali import needs_dali

DALI = "data_path=dali"


pytestmark = pytest.mark.usefixtures("no_figures")


@needs_dali
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_both_ways_end_with_the_same_weights(
    small_data: Path, tmp_path: Path, undisturbed: Callable[[str], Path], precision: str
) -> None:
    assert train(small_data, tmp_path / "dali", precision, DALI) == 0
    assert "data_path: dali" in (tmp_path / "dali" / "config.yaml").read_text()
    assert_same(undisturbed(precision), tmp_path / "dali")


@needs_dali
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_pretraining_ends_with_the_same_weights(tmp_path: Path, precision: str) -> None:
    """Here regions are hidden and global rows made behind DALI."""
    found = []
    for way in ("plain", "dali"):
        parts = assemble(test_pretraining.configure("max_iterations=3", f"precision={precision}", f"data_path={way}"))
        assert run(parts, tmp_path / way)[0]
        found.append(weights(parts))
    assert same(*found)


@needs_dali
@pytest.mark.parametrize(("starts", "goes_on"), [("dali", "dali"), ("dali", "plain"), ("plain", "dali")])
def test_a_killed_run_continues_to_the_bit_either_way(
    small_data: Path, tmp_path: Path, undisturbed: Callable[[str], Path], starts: str, goes_on: str
) -> None:
    """Killed in the middle of an iteration, with batches ahead."""
    folder = tmp_path / "killed"
    train_and_kill(small_data, folder, "float32", 5 * TASKS + 2, f"data_path={starts}")
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace(f"data_path: {starts}", f"data_path: {goes_on}"))
    assert resume(folder) == 0
    assert_same(undisturbed("float32"), folder)


def test_the_way_is_no_part_of_what_a_run_computes(small_data: Path) -> None:
    plain, dali, other = (load(small_data / "run.yaml", list(overrides)) for overrides in ((), (DALI,), ("seed=1",)))
    assert config_hash(plain) == config_hash(dali) != config_hash(other)


def test_without_dali_a_run_does_not_start(
    small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    assert main(["--config", str(small_data / "run.yaml"), f"output={tmp_path / 'run'}", DALI]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: data_path: dali asked for") and "make setup-dali" in line
    assert not (tmp_path / "run").exists()
