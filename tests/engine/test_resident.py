"""Features that stay on the device: the same batches, and the same training, as those that travel."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.assembly import assemble
from pipelines.errors import BadInput
from pipelines.loader import validation_batches
from pipelines.packing import pack
from pipelines.resident import Resident
from tests.engine.small_run import configure
from tests.engine.test_loop import run, same, weights
from tests.pipelines.test_packing import assert_equal

SETTINGS = [[], ["precision=bfloat16"], ["blind=true"], ["share_prefixes=false"]]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_batches_are_the_same(tmp_path: Path, settings: list[str]) -> None:
    plain, kept = (assemble(configure(tmp_path, *settings, f"resident_features={on}")) for on in ("false", "true"))
    for name, task in kept.tasks.items():
        for step in range(3):
            batch, expected = task.train(step), plain.tasks[name].train(step)
            assert batch.slab is not None and expected.slab is not None
            assert not len(batch.features) and batch.slab.numel() < expected.slab.numel()
            moved = batch.to("cpu").with_features()
            assert torch.equal(moved.features, expected.features)
            assert_equal(moved.target, expected.target)
            assert torch.equal(moved.boxes, expected.boxes) and torch.equal(moved.token_ids, expected.token_ids)
        for batch, expected in zip(kept.validation(task), plain.validation(plain.tasks[name]), strict=True):
            assert torch.equal(batch.with_features().features, expected.features)


def test_padded_batches_are_the_same(tmp_path: Path) -> None:
    from pipelines.buckets import Grid  # what cuda_graphs makes of a run

    kept = assemble(configure(tmp_path, "resident_features=true"))
    for task in kept.tasks.values():
        source, both = task.train, []
        for resident in (source.resident, None):
            both.append(
                pack(
                    source.data, source.sampler.indices(0), epoch=0, seed=0, training=True, task_token=task.token,
                    grid=Grid.fitting(16), resident=resident,
                ).with_features()
            )  # fmt: skip
        assert both[0].padding > 0 and torch.equal(both[0].features, both[1].features)


def test_training_is_the_same(tmp_path: Path) -> None:
    plain, kept = (assemble(configure(tmp_path, f"resident_features={on}")) for on in ("false", "true"))
    run(plain, tmp_path / "plain")
    run(kept, tmp_path / "kept")
    assert same(weights(plain), weights(kept))


def test_only_images_in_use_are_copied(tmp_path: Path) -> None:
    parts = assemble(configure(tmp_path))
    data = parts.tasks["answers"].train.data
    resident = Resident.of([data], torch.float32, torch.device("cpu"))
    used = torch.as_tensor(data.image_rows).unique().numpy()
    assert len(resident.table) == 1 + int((data.store.counts[used] + 1).sum())
    assert not resident.table[0].any()


def test_without_the_room_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = assemble(configure(tmp_path)).tasks["answers"].train.data
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1024, 2048))
    with pytest.raises(BadInput, match=r"resident_features: .* GiB of features, 0.0 GiB free on cuda"):
        Resident.of([data], torch.float32, torch.device("cuda"))


def test_validation_may_be_blind_all_the_same(tmp_path: Path) -> None:
    parts = assemble(configure(tmp_path, "resident_features=true"))
    task = parts.tasks["answers"]
    blind = next(parts.validation(task, blind=True)).with_features()
    assert not blind.features.any()
    plain = next(validation_batches(task.val, 8, seed=0, task_token=task.token))
    assert plain.features.any()
