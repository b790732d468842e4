"""The gate: what grew is named, with what explains it; what is planted in a step is found."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench import gate, gate_counts, ours
from bench.batches import pack
from bench.gate import Change, changes
from bench.pipeline_readers import OurReader
from engine.step import train_step
from pipelines import buckets
from pipelines.batch import Batch
from pipelines.errors import BadInput

BEFORE = {"steps/vqa/copies": 3.0, "steps/vqa/of op/clone": 1.0, "steps/vqa/of op/cat": 2.0, "ranks/ZeRO-1/reads": 0.0}


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        (BEFORE, []),
        ({**BEFORE, "steps/vqa/of op/clone": 2.0, "steps/vqa/of op/cat": 1.0}, []),  # one op in place of another
        (
            {**BEFORE, "steps/vqa/copies": 4.0, "steps/vqa/of op/clone": 2.0},
            ["steps/vqa/copies: 3 -> 4 (+33.3%)", "steps/vqa/of op/clone: 1 -> 2 (+100.0%)"],
        ),
        ({**BEFORE, "steps/gqa/syncs": 1.0}, ["steps/gqa/syncs: 0 -> 1"]),
        ({**BEFORE, "ranks/ZeRO-1/reads": 2.0}, ["ranks/ZeRO-1/reads: 0 -> 2"]),
        ({**BEFORE, "steps/vqa/copies": 2.0}, ["steps/vqa/copies: 3 -> 2 (-33.3%)"]),
        ({**BEFORE, "kernels/attention, sm_80/spills": 5.0}, []),  # was not asked for
    ],
)
def test_changes(now: dict[str, float], expected: list[str]) -> None:
    assert [str(change) for change in changes(BEFORE, now, ["steps", "ranks"])] == expected


def test_an_op_alone_is_no_regression() -> None:
    assert Change("steps/vqa/of op/clone", 1, 2).explains and not Change("steps/vqa/copies", 1, 2).explains


@pytest.fixture(scope="module")
def vqa() -> dict[str, float]:
    return dict(gate.flat({"steps": gate_counts.steps(["vqa"])}))


def extra_copy(batch: Batch) -> Batch:
    return replace(batch, features=batch.features.clone())


def extra_read(batch: Batch) -> Batch:
    assert float(batch.features.sum().item()) != 0
    return batch


@pytest.mark.parametrize(
    ("planted", "named"),
    [
        (extra_copy, ["steps/vqa/copies", "steps/vqa/copied bytes", "steps/vqa/of op/clone"]),
        (extra_read, ["steps/vqa/syncs", "steps/vqa/of op/_local_scalar_dense"]),
    ],
)
def test_what_is_planted_in_a_step_is_named(
    vqa: dict[str, float], planted: Callable[[Batch], Batch], named: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        ours,
        "train_step",
        lambda model, optimizer, batch, *a, **k: train_step(model, optimizer, planted(batch), *a, **k),
    )
    now = dict(gate.flat({"steps": gate_counts.steps(["vqa"])}))
    found = {change.name: change for change in changes(vqa, now, ["steps"])}
    assert set(named) <= found.keys() and all(found[name].grew for name in named)
    assert "steps/vqa/rows" not in found


def test_a_padded_row_is_named(vqa: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    grid = buckets.Grid.fitting(128)
    monkeypatch.setattr(ours, "pack", lambda *arguments: buckets.pad(pack(*arguments), grid))
    found = [c.name for c in changes(vqa, dict(gate.flat({"steps": gate_counts.steps(["vqa"])})), ["steps"]) if c.grew]
    assert {"steps/vqa/padded rows", "steps/vqa/rows"} <= set(found)


def test_counting_twice_gives_the_same(vqa: dict[str, float]) -> None:
    assert dict(gate.flat({"steps": gate_counts.steps(["vqa"])})) == vqa


def test_a_copy_of_the_features_of_a_batch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    before = dict(gate.flat({"batches": gate_counts.batches()}))
    batch = OurReader.batch

    def copied(self: Any, keys: list[str]) -> Batch:
        found = batch(self, keys)
        found.features.float().numpy().copy()
        return found

    monkeypatch.setattr(OurReader, "batch", copied)
    found = {
        c.name for c in changes(before, dict(gate.flat({"batches": gate_counts.batches()})), ["batches"]) if c.grew
    }
    assert "batches/of 16 images/allocated KiB" in found and "batches/of 16 images/copied bytes" in found


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """One group, whose counters a test sets."""
    counters: dict[str, Any] = {"vqa": {"copies": 3}}
    monkeypatch.setattr(gate_counts, "GROUPS", {"steps": lambda: counters})
    return counters


def test_the_command(cheap: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "baseline.json"
    asked = ["--baseline", str(file)]
    assert gate.main(asked) == 2 and "bench.gate --update" in capsys.readouterr().err
    assert gate.main([*asked, "--update"]) == 0 and json.loads(file.read_text())["counters"] == {"steps/vqa/copies": 3}
    assert gate.main(asked) == 0
    cheap["vqa"]["copies"] = 4
    assert gate.main(asked) == 1 and "GREW  steps/vqa/copies: 3 -> 4" in capsys.readouterr().out
    cheap["vqa"]["copies"] = 2
    assert gate.main(asked) == 0 and "less than before" in capsys.readouterr().out
    assert gate.main([*asked, "--only", "nothing"]) == 2


def test_a_record_of_other_kernels_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = tmp_path / "bench/results/aot.json"
    record.parent.mkdir(parents=True)
    record.write_text(json.dumps({"sources": "of another day", "variants": [], "traffic": []}))
    monkeypatch.setattr(gate_counts, "RECORD", record)
    with pytest.raises(BadInput, match="of other kernels.*--aot"):
        gate_counts.kernels()
