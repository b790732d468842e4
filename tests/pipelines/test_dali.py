"""Batches through DALI, on the CPU: those of the plain way to the bit; their memory; errors."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from bench.memory import anonymous_bytes
from pipelines.arena import Arena
from pipelines.batch import Batch
from pipelines.buckets import Grid
from pipelines.dali import RawSource, Stage
from pipelines.draft import arena
from pipelines.errors import BadInput
from pipelines.loader import Loader, TrainingSource
from pipelines.raw import Head, RawBatch
from pipelines.slab import in_one_slab
from pipelines.store.lmdb_file import LmdbFile
from pipelines.store.metadata import METADATA_KEY
from tests.pipelines.small_batches import STEPS, build, sources
from tests.pipelines.test_packing import assert_equal
from tests.pipelines.test_raw import STORES, without_slab

CPU = torch.device("cpu")
INSTALLED = find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None
needs_dali = pytest.mark.skipif(not INSTALLED, reason="DALI is not installed (make setup-dali)")


def stage_of(made: dict[str, TrainingSource]) -> Stage:
    return Stage({name: source.raw for name, source in made.items()}, next(iter(made.values())).dtype, CPU)


@pytest.fixture(scope="module", params=STORES)
def sheet(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("dali"), *STORES[request.param])


@needs_dali
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("share", "grid"), [(True, None), (False, None), (True, Grid()), (False, Grid())])
def test_batches_are_the_plain_ones(sheet: Path, dtype: torch.dtype, share: bool, grid: Grid | None) -> None:
    made = sources(sheet, dtype=dtype, share=share, grid=grid)
    stage = stage_of(made)
    for step in range(STEPS):
        for name, source in made.items():
            found, plain = stage.batch(name, step), source(step)
            assert_equal(without_slab(found), without_slab(plain))
            if found.slab is not None:
                assert_equal(found, plain)
            assert (found.slab is not None) == (source.raw(step).work is None)
            assert bool(found.padding) == (grid is not None and name != "pretraining")


@needs_dali
def test_blind_batches_are_the_plain_ones(sheet: Path) -> None:
    made = sources(sheet, blind=True)
    stage = stage_of(made)
    for name, source in made.items():
        assert_equal(stage.batch(name, 0), source(0))
        assert not source(0).features.any()


@needs_dali
def test_batches_come_in_any_order_whatever_was_prefetched(sheet: Path) -> None:
    """Prefetched and taken later, prefetched and never taken, taken without having been asked for."""
    made = sources(sheet, dtype=torch.bfloat16)
    wanted = ["answers 0", "pairs 4", "pretraining 1", "answers 1", "captions 0", "pretraining 0", "answers 0"]
    asked = ["pretraining 0", "pretraining 1", "answers 1", "pointing 2"]
    with Loader(stage_of(made).sources()) as loader:
        for each in asked:
            name, step = each.split()
            assert loader.request(name, int(step))
        for each in wanted:
            name, step = each.split()
            assert_equal(without_slab(loader.take(name, int(step))), without_slab(made[name](int(step))))


@needs_dali
def test_threads_take_turns(sheet: Path) -> None:
    made = sources(sheet)
    stage = stage_of(made)
    asked = [(name, step) for step in range(6) for name in made]
    with ThreadPoolExecutor(4) as pool:
        for (name, step), found in zip(asked, pool.map(lambda each: stage.batch(*each), asked), strict=True):
            assert_equal(without_slab(found), without_slab(made[name](step)))


def large(step: int, memory: Arena) -> RawBatch:
    """A batch of a few MB that differ from step to step, and so do its values."""
    rows = 300 + 37 * (step % 7)
    batch = Batch(
        task="large", examples=1, task_token=None, token_ids=torch.zeros(2, dtype=torch.int64),
        cu_texts=torch.tensor([0, 2], dtype=torch.int32), features=torch.full((rows, 2048), float(step)),
        boxes=torch.full((rows, 5), float(step)), cu_images=torch.tensor([0, rows], dtype=torch.int32),
        pair_text=torch.zeros(1, dtype=torch.int64), pair_image=torch.zeros(1, dtype=torch.int64),
        text_key=torch.zeros(1, dtype=torch.int64), image_key=torch.zeros(1, dtype=torch.int64), target=None,
        max_text=2, max_image=rows,
    )  # fmt: skip
    batch = in_one_slab(batch, memory.take)
    assert batch.slab is not None
    return RawBatch(batch.slab, Head(replace(batch, slab=None), None), None)


@needs_dali
def test_a_batch_that_is_kept_stays_as_it_was() -> None:
    memory = Arena(pin=False)
    stage = Stage({"large": lambda step: large(step, memory)}, torch.float32, CPU)
    kept = [stage.batch("large", step) for step in range(12)]
    held = memory.allocated
    for step in range(12, 40):
        stage.batch("large", step)
    for step, batch in enumerate(kept):
        assert len(batch.features) == 300 + 37 * (step % 7)
        assert bool((batch.features == step).all()) and bool((batch.boxes == step).all())
    assert memory.allocated == held <= 3 * (8 << 20), "the host's memory is not held by who keeps a batch"


@needs_dali
def test_memory_is_fed_until_the_pipeline_has_read_it() -> None:
    """Whatever becomes of the host's memory afterwards: here it is overwritten at once."""
    memory = Arena(pin=False)
    fed: list[RawBatch] = []

    def source(step: int) -> RawBatch:
        for raw in fed:
            raw.slab.fill_(255)
        fed.append(large(step, memory))
        return fed[-1]

    stage = Stage({"large": source}, torch.float32, CPU)
    for step, batch in enumerate([stage.batch("large", step) for step in range(9)]):
        assert bool((batch.features == step).all())


@needs_dali
def test_memory_does_not_grow_with_the_number_of_batches(tmp_path: Path) -> None:
    memory = Arena(pin=False)
    made = sources(build(tmp_path, "uint8", "uint8"))
    raw: dict[str, RawSource] = {name: source.raw for name, source in made.items()}
    stage = Stage(raw | {"large": lambda step: large(step, memory)}, torch.float32, CPU)
    with Loader(stage.sources()) as loader:
        for step in range(120):
            for name in ("large", "pretraining", "answers"):
                loader.request(name, step + 1)
                loader.take(name, step)
            if step == 40:
                settled, held = anonymous_bytes(), memory.allocated + arena().allocated
    assert anonymous_bytes() - settled < 32 << 20, "80 more batches of 3 MB"
    assert memory.allocated + arena().allocated == held


def damage(store: Path) -> None:
    """Flip a bit in the middle of every record."""
    file, data = LmdbFile(store), store / "data.mdb"
    content = bytearray(data.read_bytes())
    for key, offset, size in zip(file.keys, file.offsets.tolist(), file.sizes.tolist(), strict=True):
        if key != METADATA_KEY:
            content[offset + size // 2] ^= 1
    data.write_bytes(content)


@needs_dali
@pytest.mark.parametrize("turns", [0, 1], ids=["as first batch", "later"])
def test_a_damaged_record_is_named_as_without_dali(tmp_path: Path, turns: int) -> None:
    sheet = build(tmp_path, "float32", "float32")
    damage(tmp_path / "detected-copy.lmdb")
    memory, made = Arena(pin=False), sources(sheet)
    stage = Stage({"large": lambda step: large(step, memory), "answers": made["answers"].raw}, torch.float32, CPU)
    for step in range(turns):
        stage.batch("large", step)
    with pytest.raises(BadInput) as plain:
        made["answers"](0)
    for step in range(2):
        with pytest.raises(BadInput) as found:
            stage.batch("answers", 0)
        assert str(found.value) == str(plain.value)
        assert "detected-copy.lmdb: image " in str(plain.value) and "damaged record" in str(plain.value)
        assert bool((stage.batch("large", step).features == step).all()), "the pipeline is none the worse"


def test_without_dali_the_mend_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(BadInput, match=r"^data_path: .* nvidia\.dali is not installed \(make setup-dali\)$"):
        Stage({}, torch.float32, CPU)
