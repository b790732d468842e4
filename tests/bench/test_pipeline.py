"""bench.pipeline: readers give what was written, a wrong one is found, and the numbers follow from the times."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench import pipeline, pipeline_scale, pipeline_training
from bench.pipeline import KINDS, MEMCPY, OURS, Measured, Setting, check, summary
from bench.pipeline_images import images, key_of
from pipelines.errors import BadInput
from pipelines.store.reader import FeatureStore


def test_images_are_functions_of_their_number_and_exact_in_half_precision() -> None:
    first, again = list(images(3, 5, 16)), list(images(2, 5, 16, first=1))
    for a, b in zip(first[1:], again, strict=True):
        np.testing.assert_array_equal(a.features, b.features)
    values = torch.from_numpy(first[0].features)
    assert torch.equal(values.half().float(), values) and torch.equal(values.bfloat16().float(), values)


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    found = Setting(tmp_path_factory.mktemp("pipeline"), images=6, regions=4, batch=3, rounds=2)
    for kind in KINDS.values():
        if not found.path(kind).exists():
            kind.write(found.path(kind), found.made())
    return found


@pytest.mark.parametrize("name", [name for name in KINDS if name != MEMCPY])
def test_every_reader_gives_what_was_written(setting: Setting, name: str) -> None:
    check(setting, name)


@pytest.mark.parametrize("name", [name for name in KINDS if name != MEMCPY])
def test_one_wrong_value_is_found(setting: Setting, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(self: Setting) -> Any:
        made = list(images(self.images, self.regions, pipeline.WIDTH))
        made[4].features[2, 77] += 4
        return made

    monkeypatch.setattr(Setting, "made", other)
    with pytest.raises(BadInput, match="image 100004: a batch holds other features"):
        check(setting, name)


def test_memcpy_moves_the_bytes_of_the_features(setting: Setting) -> None:
    copied = KINDS[MEMCPY].open(setting.path(KINDS[MEMCPY])).batch([key_of(3), key_of(0)])
    record = FeatureStore(setting.path(KINDS[MEMCPY])).record(key_of(3))
    assert bytes(copied.numpy())[: record.features.nbytes] == record.features.tobytes()


def test_ratios_are_medians_over_rounds() -> None:
    setting = Setting(Path(), images=10, regions=100, batch=64, rounds=3)
    ours = Measured([1.0, 2.0, 4.0], [1.0, 1.0], 7)
    found = summary(setting, {OURS: ours, MEMCPY: Measured([0.5, 1.8, 4.0], [1.0, 1.0], 0),
                              "pickle": Measured([10.0, 10.0, 10.0], [3.0, 5.0], 0)})  # fmt: skip
    assert found["images_per_s"] == 32
    assert found["ratio"] == {"pickle": 5.0} and found["cold_ratio"] == {"pickle": 4.0}
    assert found["memcpy_share"] == 0.9
    assert found["readers"][OURS]["gb_per_s"] == pytest.approx(32 * 100 * 2048 * 2 / 1e9)


@pytest.mark.slow
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--images", "6", "--regions", "4", "--batch", "3", "--rounds", "2", "--simulate", "0.004"]
    assert pipeline.main([*arguments, "--folder", str(tmp_path), "--json", str(tmp_path / "f.json")]) == 0
    found = json.loads((tmp_path / "f.json").read_text())
    assert set(found["ratio"]) == {"pickle", "uniter"} and found["memcpy_share"] > 0 and found["images_per_s"] > 0
    assert [row["shards"] for row in found["scale"]] == [1, 1, 1, 4]
    assert [row["images"] for row in found["scale"]] == [2, 4, 9, 9]
    assert not list(tmp_path.glob("scale-*"))
    assert "x pickle warm" in capsys.readouterr().out
    assert pipeline.main(["--against", "tfrecord", "--folder", str(tmp_path)]) == 2
    assert "no reader 'tfrecord'" in capsys.readouterr().err


def test_room_is_looked_for_first(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="GB free"):
        pipeline_scale.measure(tmp_path, 1e6, print)


def test_waiting_is_counted_after_the_warm_up(tmp_path: Path) -> None:
    rows = [
        {"iteration": iteration, "task": task, "data_wait_ms": wait, "step_ms": 10.0}
        for iteration, wait in ((1, 90.0), (2, 90.0), (3, 0.0), (4, 1.0))
        for task in ("a", "b")
    ]
    rows[-1]["data_wait_ms"] = 5.0
    (tmp_path / "m").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = pipeline_training._waiting(tmp_path / "m")
    assert found["worst_task"] == "b" and found["worst_share"] == pytest.approx(5 / 25)
    assert found["share"] == pytest.approx(6 / 46)
