"""Both forms of `copy_runs`: bit for bit torch's conversion, by any number of threads. Whole records: `test_store.py`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipelines import copy_runs

ROOT = Path(__file__).resolve().parent.parent.parent
LENGTHS = (0, 1, 7, 64, 1000, 1, 33)


@pytest.fixture(params=["native", "torch"], autouse=True)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name: str = request.param
    if name == "torch":
        monkeypatch.setattr("pipelines.copy_runs._library", lambda: None)
    elif not copy_runs.native():
        pytest.skip("no C++ compiler")
    return name


def values(dtype: torch.dtype, n: int) -> Tensor:
    """Every bit pattern of a 16-bit type in turn, NaNs left out; else random numbers of all sizes, ties among them."""
    if dtype.itemsize == 2:
        every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
        every = every[~every.isnan()]
        return every.repeat(n // len(every) + 1)[:n].clone()
    if dtype == torch.uint8:
        return torch.arange(n).to(torch.uint8)
    bits = torch.randint(-(2**31), 2**31, (n,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    bits[::3] &= ~0xFFFF
    bits[::3] |= 0x8000  # halfway between two values of bfloat16
    return bits.view(torch.float32).nan_to_num(nan=1.0)


def addresses(x: Tensor, starts: list[int]) -> np.ndarray:
    return np.array([x.data_ptr() + start * x.itemsize for start in starts], np.int64)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("source", list(copy_runs.DTYPES.values()))
def test_runs_are_converted_as_torch_does(source: torch.dtype, target: torch.dtype, threads: int) -> None:
    lengths = [*LENGTHS, 70_000]
    x = values(source, sum(lengths) + 1)
    expected, y = torch.full((2, 3 * len(x)), -7.0).to(target)
    starts, places, place = [], [], 5
    for i, length in enumerate(lengths):
        start = 1 + sum(lengths[:i])  # an odd place: no alignment
        starts.append(start)
        places.append(place)
        expected[place : place + length] = x[start : start + length].float().to(target)
        place += length + 3
    arrays = addresses(x, starts), addresses(y, places), np.array(lengths, np.int64)
    copy_runs.copy_runs(source, target, *arrays, threads=threads)
    bits = torch.int32 if target == torch.float32 else torch.int16
    assert torch.equal(y.view(bits), expected.view(bits))


def test_a_nan_stays_one() -> None:
    for source in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.tensor([float("nan"), float("inf"), float("-inf"), 1.0]).to(source)
        for target in (torch.float32, torch.bfloat16):
            y = torch.zeros(4, dtype=target)
            copy_runs.copy_runs(source, target, addresses(x, [0]), addresses(y, [0]), np.array([4]))
            assert torch.equal(y.float().nan_to_num(nan=5.0), x.float().nan_to_num(nan=5.0))


def test_wrong_arrays_are_refused() -> None:
    good = np.zeros(2, np.int64)
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        copy_runs.copy_runs(torch.float32, torch.float16, good, good, good)
    wrongs: tuple[Any, ...] = np.zeros(3, np.int64), np.zeros(2, np.int32), np.zeros(4, np.int64)[::2]
    for wrong in wrongs:
        with pytest.raises(ValueError, match="contiguous int64"):
            copy_runs.copy_runs(torch.float32, torch.float32, good, good, wrong)


def test_without_a_compiler_one_line_says_so(tmp_path: Path, form: str) -> None:
    if form == "native":
        pytest.skip("once is enough")
    for package in ("kernels", "pipelines"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "bin").mkdir()
    code = "from pipelines import copy_runs; assert not copy_runs.native(); assert not copy_runs.native()"
    inherited = {name: value for name, value in os.environ.items() if name != "CXX"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=inherited | {"PATH": str(tmp_path / "bin")},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("stopgo:") == 1
    assert "no native copying of features (no C++ compiler found)" in done.stderr and "as long" in done.stderr
