"""The comparison of data paths refuses other batches, and runs."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.data_path import CASES, compare, main, source
from pipelines.errors import BadInput
from tests.pipelines.test_dali import needs_dali


def test_a_batch_that_differs_in_a_bit_is_refused(tmp_path: Path) -> None:
    made = source(tmp_path, 64, *CASES["uint8 store"])
    batch = made(0)
    compare(batch, made(0))
    features = batch.features.clone()
    features.view(torch.int16)[100, 7] ^= 1
    with pytest.raises(BadInput, match="another batch"):
        compare(batch, replace(batch, features=features))


@needs_dali
def test_it_measures_both_ways(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--images", "64", "--seconds", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition("  plain ")[0].strip() for line in lines] == [name.strip() for name in CASES]


def test_without_dali_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    assert main(["--images", "64"]) == 2
    assert "make setup-dali" in capsys.readouterr().err
