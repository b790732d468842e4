"""The feature store: what goes in comes out, in place, and any LMDB tool sees the same."""

from __future__ import annotations

import copy
import multiprocessing
import shutil
from pathlib import Path
from typing import Any

import lmdb
import msgpack
import numpy as np
import pytest
import torch

from pipelines import boxes as box_geometry
from pipelines import ragged
from pipelines.copy_runs import native
from pipelines.errors import BadInput
from pipelines.store.lmdb_file import LmdbFile
from pipelines.store.metadata import METADATA_KEY
from pipelines.store.reader import FeatureStore
from pipelines.store.record import bfloat16_bits, bfloat16_values
from pipelines.store.writer import StoreWriter
from tests.pipelines.stores import HEIGHT, WIDTH, made_up, write_store


def test_float32_round_trip_is_exact(tmp_path: Path) -> None:
    store = FeatureStore(write_store(tmp_path / "s", 20, dtype="float32", classes=7))
    assert len(store) == 20 and store.feature_dim == 32 and store.classes == 7 and store.source == "made up"
    for seed in range(20):
        features, boxes, probs = made_up(seed, classes=7 if seed % 2 else 0)
        record = store.record(str(seed))
        np.testing.assert_array_equal(record.features, features)
        np.testing.assert_array_equal(record.boxes, boxes)
        np.testing.assert_array_equal(record.mean, features.sum(axis=0) / np.float32(len(features)))
        assert (record.width, record.height) == (WIDTH, HEIGHT)
        if probs is None:
            assert record.class_probs is None
        else:
            np.testing.assert_array_equal(record.class_probs, probs.astype(np.float16))


def test_half_precision_is_rounded_to_nearest(tmp_path: Path) -> None:
    features, boxes, _ = made_up(8)
    for dtype, expected in (
        ("float16", features.astype(np.float16)),
        ("bfloat16", torch.from_numpy(features).bfloat16().view(torch.uint16).numpy()),
    ):
        with StoreWriter(tmp_path / dtype, 32, dtype) as writer:
            writer.add("x", features, boxes, WIDTH, HEIGHT)
        record = FeatureStore(tmp_path / dtype).record("x")
        np.testing.assert_array_equal(record.features, expected)
        np.testing.assert_array_equal(record.mean, features.sum(axis=0) / np.float32(9))  # of the unrounded rows


def test_uint8_keeps_each_region_to_half_a_step_of_its_own_scale(tmp_path: Path) -> None:
    features, boxes, _ = made_up(8)
    features[3] = 0
    with StoreWriter(tmp_path / "s", 32, "uint8") as writer:
        writer.add("x", features, boxes, WIDTH, HEIGHT)
        with pytest.raises(BadInput, match="below 0 has no place in uint8"):
            writer.add("y", features - 1, boxes, WIDTH, HEIGHT)
    record = FeatureStore(tmp_path / "s").record("x")
    assert record.scales is not None
    step = np.where(features.max(1) > 0, features.max(1) / 255, 1)
    np.testing.assert_allclose(record.scales, step, rtol=1e-6)
    values = record.features.astype(np.float32) * record.scales[:, None]
    assert (np.abs(values - features) <= step[:, None] * 0.5001).all()
    np.testing.assert_array_equal(record.features.max(1), np.where(features.max(1) > 0, 255, 0))


def test_shards_read_as_one_store(tmp_path: Path) -> None:
    one = FeatureStore(write_store(tmp_path / "one", 12, classes=5))
    for part in range(3):
        with StoreWriter(tmp_path / "many" / f"{part}", 32) as writer:
            for seed in range(part, 12, 3):
                features, boxes, probs = made_up(seed, 32, 5 if seed % 2 else 0)
                writer.add(seed, features, boxes, WIDTH, HEIGHT, probs)
    many = FeatureStore(tmp_path / "many")
    assert many.keys() == one.keys() and many.classes == one.classes
    for name in ("counts", "sizes", "with_probs"):
        np.testing.assert_array_equal(getattr(many, name), getattr(one, name))
    rows = np.array([7, 0, 11, 3])
    starts = ragged.offsets_of(one.counts[rows] + 1)
    copies = [(torch.zeros(int(starts[-1]), 32), np.zeros((int(starts[-1]), 4), np.float32)) for _ in range(2)]
    for store, (rows_out, boxes_out) in zip((one, many), copies, strict=True):
        store.gather(rows, starts[:-1], rows_out)
        store.gather_boxes(rows, starts[:-1], boxes_out)
    assert torch.equal(copies[0][0], copies[1][0])
    np.testing.assert_array_equal(copies[0][1], copies[1][1])
    for key in one:
        np.testing.assert_array_equal(many.record(key).features, one.record(key).features)


def test_shards_must_fit_each_other(tmp_path: Path) -> None:
    write_store(tmp_path / "many" / "a", 3)
    write_store(tmp_path / "many" / "b", 5)
    with pytest.raises(BadInput, match="many: image 0: in two shards"):
        FeatureStore(tmp_path / "many")
    shutil.rmtree(tmp_path / "many" / "b")
    with StoreWriter(tmp_path / "many" / "b", 32, "float32") as writer:
        writer.add("x", *made_up(4)[:2], WIDTH, HEIGHT)
    with pytest.raises(BadInput, match="b: dtype float32 beside float16 of a"):
        FeatureStore(tmp_path / "many")
    (tmp_path / "many" / "b").rename(tmp_path / "many" / "b.partial")
    with pytest.raises(BadInput, match=r"b\.partial: an unfinished shard"):
        FeatureStore(tmp_path / "many")


def test_bfloat16_bits_agree_with_torch() -> None:
    values = np.random.default_rng(0).standard_normal(10_000).astype(np.float32) * 10
    bits = bfloat16_bits(values)
    np.testing.assert_array_equal(bfloat16_values(bits), torch.from_numpy(values).bfloat16().float().numpy())


def test_arrays_are_read_only_aligned_views_that_outlive_the_store(tmp_path: Path) -> None:
    store = FeatureStore(write_store(tmp_path / "s", 12, feature_dim=17, classes=5))
    arrays = []
    for key in store:
        record = store.record(key)
        arrays += [record.mean, record.boxes, record.features]
        arrays += [] if record.class_probs is None else [record.class_probs]
    sums = [float(array.sum()) for array in arrays]
    for array in arrays:
        assert array.ctypes.data % 64 == 0 and not array.flags.writeable and not array.flags.owndata
    del store, record
    assert [float(array.sum()) for array in arrays] == sums


def test_other_lmdb_and_msgpack_readers_see_the_same(tmp_path: Path) -> None:
    path = write_store(tmp_path / "s", 300, feature_dim=8)
    entries = dict(LmdbFile(path).items())
    with lmdb.open(str(path), readonly=True, lock=False) as environment, environment.begin() as transaction:
        assert {key: bytes(value) for key, value in entries.items()} == dict(transaction.cursor())
        unpacker = msgpack.Unpacker()
        unpacker.feed(transaction.get(b"7"))
        assert unpacker.unpack()[:-1] == [1, 8, 8, 0, WIDTH, HEIGHT, 0]
    assert METADATA_KEY in entries and sorted(path.iterdir()) == [path / "data.mdb"]


def test_counts_sizes_and_rows_need_no_record(tmp_path: Path) -> None:
    store = FeatureStore(write_store(tmp_path / "s"))
    assert list(store.keys()) == sorted(map(str, range(12)))
    rows = store.index(["11", "0", "11"])
    assert rows.tolist() == [store.keys().index(key) for key in ("11", "0", "11")]
    assert store.counts[rows].tolist() == [3, 1, 3] and store.sizes[rows[0]].tolist() == [WIDTH, HEIGHT]
    assert "11" in store and "12" not in store and 11 not in store
    with pytest.raises(BadInput, match="s: image 12: no features"):
        store.index(["0", "12"])


@pytest.fixture(params=["native", "torch"])
def copying(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both forms of `copy_runs`."""
    if request.param == "torch":
        monkeypatch.setattr("pipelines.copy_runs._library", lambda: None)
    elif not native():
        pytest.skip("no C++ compiler")


@pytest.mark.usefixtures("copying")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "uint8"])
@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_gather_fills_the_rows_that_it_is_given(tmp_path: Path, dtype: str, out: torch.dtype, threads: int) -> None:
    store = FeatureStore(write_store(tmp_path / "s", dtype=dtype, classes=3))
    keys = ["7", "3", "7"]
    rows = store.index(keys)
    features, boxes = torch.full((32, 32), -1.0, dtype=out), np.full((32, 4), -1, np.float32)
    locations = torch.full((32, 5), -1.0)
    starts = [2, 12, 20]
    store.gather(rows, starts, features, locations, threads=threads)
    store.gather_boxes(rows, starts, boxes)
    untouched = np.ones(32, bool)
    for key, start in zip(keys, starts, strict=True):
        record = store.record(key)
        expected = torch.from_numpy(np.vstack([record.mean, record.values()])).to(out)
        end = start + len(expected)
        assert torch.equal(features[start:end], expected)
        np.testing.assert_array_equal(boxes[start], [0, 0, WIDTH, HEIGHT])
        np.testing.assert_array_equal(boxes[start + 1 : end], record.boxes)
        np.testing.assert_array_equal(locations[start:end], box_geometry.locations(boxes[start:end], WIDTH, HEIGHT))
        untouched[start:end] = False
    assert (features[torch.from_numpy(untouched)] == -1).all() and (boxes[untouched] == -1).all()
    assert (locations[torch.from_numpy(untouched)] == -1).all()


@pytest.mark.usefixtures("copying")
def test_gather_can_cut_and_leave_out_the_global_row(tmp_path: Path) -> None:
    store = FeatureStore(write_store(tmp_path / "s", dtype="float32"))
    features, boxes, locations = torch.zeros(8, 32), np.zeros((8, 4), np.float32), torch.zeros(8, 5)
    record, row = store.record("7"), store.index(["7"])
    store.gather(row, [1], features, locations, taken=[3], sizes=np.array([[10, 20]], np.int32), global_row=False)
    store.gather_boxes(row, [1], boxes, taken=[3], global_row=False)
    np.testing.assert_array_equal(features[1:4], record.features[:3])
    np.testing.assert_array_equal(locations[1:4], box_geometry.locations(record.boxes[:3], 10, 20))
    for x in (features, locations):
        assert not x[0].any() and not x[4:].any()
    assert not boxes[4:].any()
    store.gather(row, [0], features, taken=[2])
    np.testing.assert_array_equal(features[:3], np.vstack([record.mean, record.features[:2]]))
    store.gather(row, [4], None, locations, taken=[0])
    assert locations[4].tolist() == [0, 0, 1, 1, 1] and not locations[5:].any()
    for start in (-1, 0, 7):
        with pytest.raises(IndexError):
            store.gather(row, [start], features)
        with pytest.raises(IndexError):
            store.gather(row, [start], None, locations)
        with pytest.raises(IndexError):
            store.gather_boxes(row, [start], boxes)


WRONG_PLACES: dict[str, tuple[dict[str, Any], str]] = {
    "narrow features": ({"features": torch.zeros(16, 31)}, r"\[16, 31\], wanted contiguous \[rows, 32\]"),
    "every second row": ({"features": torch.zeros(32, 32)[::2]}, "wanted contiguous"),
    "half precision": ({"features": torch.zeros(16, 32, dtype=torch.float16)}, "float32 or bfloat16"),
    "four numbers a box": ({"features": None, "locations": torch.zeros(16, 4)}, r"wanted contiguous \[rows, 5\]"),
    "doubles": ({"features": None, "locations": torch.zeros(16, 5, dtype=torch.float64)}, "float32, not torch.float64"),
    "no size": ({"features": torch.zeros(16, 32), "sizes": np.zeros((0, 2), np.int32)}, r"contiguous int32 \[1, 2\]"),
}


@pytest.mark.usefixtures("copying")
@pytest.mark.parametrize("name", WRONG_PLACES)
def test_gather_writes_to_no_other_place(tmp_path: Path, name: str) -> None:
    arguments, message = WRONG_PLACES[name]
    store = FeatureStore(write_store(tmp_path / "s"))
    with pytest.raises(ValueError, match=message):
        store.gather(store.index(["7"]), [0], **arguments)


def _sum_of(store: FeatureStore, key: str) -> float:
    return float(store.record(key).features.astype(np.float32).sum())


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_store_serves_child_processes(tmp_path: Path, method: str) -> None:
    store = FeatureStore(write_store(tmp_path / "s"), readahead=False)
    expected = [_sum_of(store, key) for key in store]
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.starmap(_sum_of, [(store, key) for key in store]) == expected
    assert copy.copy(store).keys() == store.keys()


def test_what_is_no_finished_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no feature store here"):
        FeatureStore(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="no LMDB here"):
        FeatureStore(tmp_path / "empty")
    with lmdb.open(str(tmp_path / "other")) as environment, environment.begin(write=True) as transaction:
        transaction.put(b"1", b"x")
    with pytest.raises(BadInput, match="not a feature store"):
        FeatureStore(tmp_path / "other")
    features, boxes, _ = made_up(1)
    with pytest.raises(RuntimeError), StoreWriter(tmp_path / "s", 32) as writer:
        writer.add("x", features, boxes, WIDTH, HEIGHT)
        raise RuntimeError
    with pytest.raises(BadInput, match="unfinished"):
        FeatureStore(tmp_path / "s.partial")
