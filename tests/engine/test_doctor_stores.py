"""`stopgo doctor --config`: the stores of a run, sound and damaged."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import lmdb
import pytest
import torch
import yaml

from engine.config import load
from engine.doctor import machine, packages, stores
from tests.engine.doctor_page import line_of, page_of
from tests.engine.small_run import configure
from tests.pipelines.small import FEATURES
from tests.pipelines.stores import write_store

ROOT = Path(__file__).resolve().parent.parent.parent


MOUNTS = """22 27 0:21 / /proc rw - proc proc rw
27 1 252:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
40 27 0:50 / /data rw - nfs4 server:/x rw
41 40 0:51 / /data/with\\040space rw - xfs /dev/vdb rw
"""


@pytest.mark.parametrize(
    ("path", "mount"),
    [("/home/x", ("/", "ext4")), ("/data/a", ("/data", "nfs4")), ("/database", ("/", "ext4")),
     ("/data/with space/b", ("/data/with space", "xfs"))],
)  # fmt: skip
def test_which_file_system_a_store_lies_on(path: str, mount: tuple[str, str]) -> None:
    assert stores.mount_of(Path(path), MOUNTS) == mount


def test_entries_of_processes_that_are_gone() -> None:
    """As LMDB's library lists them; the own process is there, and number 2**22 + 1 is above the largest there can be."""
    table = f"    pid     thread     txnid\n {os.getpid()} 7f00 12\n {2**22 + 1} 7f01 3\n"
    assert stores.stale(table) == [2**22 + 1]
    assert stores.stale("(no active readers)\n") == []


@pytest.fixture
def small(tmp_path: Path) -> Path:
    configure(tmp_path)
    return tmp_path


def test_a_run_whose_data_are_sound(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = page_of(["--config", str(small / "run.yaml")], capsys)
    store = line_of(text, "store")
    assert store.startswith("good") and f"float32 × {FEATURES}" in store
    assert line_of(text, "files").startswith("good")
    assert line_of(text, "page cache").startswith("good")


def test_what_a_run_asks_for_in_vain(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each mend is an override that the run takes."""
    run = yaml.safe_load((small / "run.yaml").read_text())
    run |= {"threads": 4096, "kernels": {"adamw": "apex"}, "device": "cuda" if not torch.cuda.is_available() else "cpu"}
    run |= {"data_path": "dali"}
    (small / "run.yaml").write_text(yaml.safe_dump(run))
    text = page_of(["--config", str(small / "run.yaml"), "--device", "cpu"], capsys)
    threads, ops = line_of(text, "threads"), line_of(text, "ops")
    assert threads.startswith("problem") and ops.startswith("problem")
    mends = [line.partition("mend: ")[2] for line in (threads, ops)]
    config = load(small / "run.yaml", mends)
    assert config.threads == math.floor(machine.usable_cores()) and config.kernels == {"adamw": "torch"}
    if not torch.cuda.is_available():
        assert line_of(text, "gpu").endswith("mend: device=cpu")
    if not packages._is_there("nvidia.dali"):
        assert line_of(text, "dali").startswith("problem") and line_of(text, "dali").endswith("mend: make setup-dali")


def cut_store(small: Path) -> Path:
    """Take the end of one of the run's stores away; the store."""
    data = next(small.rglob("data.mdb"))
    data.write_bytes(data.read_bytes()[:-4096])
    return data.parent


def test_a_truncated_store_is_a_problem_with_its_mend(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = cut_store(small).name
    text = page_of(["--config", str(small / "run.yaml")], capsys)
    line = line_of(text, "store")
    assert line.startswith("problem")
    assert f"{name}/data.mdb: truncated: " in line and f"mend: mv {small / name}" in line


def test_a_missing_file_and_another_width_are_problems(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = yaml.safe_load((small / "run.yaml").read_text())
    run["model"]["v_feature_size"] = 2048
    (small / "run.yaml").write_text(yaml.safe_dump(run))
    sheet = yaml.safe_load((small / "sheet.yaml").read_text())
    (small / sheet["vocabulary"]).unlink()
    text = page_of(["--config", str(small / "run.yaml")], capsys)
    assert f"mend: model.v_feature_size={FEATURES}" in line_of(text, "store")
    assert line_of(text, "files").startswith("problem") and "vocabulary: no such file" in line_of(text, "files")


def test_a_reader_that_died_is_found_in_a_stores_table(tmp_path: Path) -> None:
    """One process keeps the store open, another dies in a transaction: what LMDB's library then leaves behind."""
    store = write_store(tmp_path / "store")
    read = f"import lmdb, os; t = lmdb.open({str(store)!r}, readonly=True).begin(); t.get(b'0'); os._exit(0)"
    look = f"from pathlib import Path; from engine.doctor import stores; print(*stores._readers(Path({str(store)!r})))"
    with lmdb.open(str(store), readonly=True):
        subprocess.run([sys.executable, "-c", read], check=True)
        found = subprocess.run(
            [sys.executable, "-c", look], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
    assert "1 of processes that are gone" in found and "reader_check()" in found
