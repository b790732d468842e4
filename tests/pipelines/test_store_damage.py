"""Damaged stores: refused with a line, or still identical; never a signal."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import lmdb
import msgpack
import numpy as np
import pytest
import torch

from pipelines import ragged
from pipelines.errors import BadInput
from pipelines.store import metadata, shard
from pipelines.store.lmdb_file import LmdbFile
from pipelines.store.metadata import METADATA_KEY, pack_metadata, unpack_metadata
from pipelines.store.reader import FeatureStore, Verify
from pipelines.store.record import checksum
from pipelines.store.writer import StoreWriter
from tests.pipelines.stores import HEIGHT, WIDTH, made_up, write_store
from tests.reference import ROOT, reference


def read_all(path: Path) -> str:
    """A digest of everything that a store gives out."""
    store = FeatureStore(path)
    digest = hashlib.sha256(repr((store.keys(), store.counts.tolist(), store.sizes.tolist(), store.dtype)).encode())
    for key in store:
        record = store.record(key)
        for part in (record.mean, record.boxes, record.features, record.class_probs, record.scales):
            digest.update(b"" if part is None else part.tobytes())
    starts = ragged.offsets_of(store.counts + 1)
    features = torch.zeros(int(starts[-1]), store.feature_dim)
    store.gather(np.arange(len(store)), starts[:-1], features)
    digest.update(features.numpy().tobytes())
    return digest.hexdigest()


def read_lmdb(path: Path) -> int:
    """A checksum over all entries of a foreign LMDB, which reads every byte of them."""
    return sum(zlib.crc32(value, zlib.crc32(key)) for key, value in LmdbFile(path).items())


def flip_every(path: Path, places: list[int], read: Callable[[Path], object]) -> tuple[int, list[int]]:
    """Flip bits of one byte at a time and read; how many were refused, and where something else came out."""
    data = path / "data.mdb"
    whole, expected, refused, silent = data.read_bytes(), read(path), 0, []
    for turn, place in enumerate(places):
        with data.open("r+b") as file:
            file.seek(place)
            file.write(bytes([whole[place] ^ (0xFF if turn % 2 else 1 << turn % 8)]))
        try:
            if read(path) != expected:
                silent.append(place)
        except BadInput:
            refused += 1
        with data.open("r+b") as file:
            file.seek(place)
            file.write(whole[place : place + 1])
    return refused, silent


def tree_bytes(path: Path) -> np.ndarray:
    """Positions of the bytes of all pages without values: the two first, the tree's, and the tree's former ones."""
    file = LmdbFile(path)
    values = np.zeros(len(file.bytes), bool)
    for offset, size in zip(file.offsets.tolist(), file.sizes.tolist(), strict=True):
        values[offset : offset + size] = True
    return np.flatnonzero(np.repeat(~values.reshape(-1, 4096).any(axis=1), 4096))


_FLIPS = """
import sys, random
from pathlib import Path
from tests.pipelines.test_store_damage import flip_every, read_all, read_lmdb, tree_bytes
path, what, seed = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
rng = random.Random(seed)
size = (path / "data.mdb").stat().st_size
anywhere = [rng.randrange(size) for _ in range(150)]
tree = rng.sample(tree_bytes(path).tolist(), 600) + list(range(160)) + list(range(4096, 4256))
refused, silent = flip_every(path, anywhere + tree, read_all if what == "store" else read_lmdb)
print(refused, silent)
"""


def run_flips(path: Path, what: str, seed: int = 0) -> tuple[int, str]:
    command = [sys.executable, "-c", _FLIPS, str(path), what, str(seed)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr[-2000:]}"  # negative: a signal
    refused, _, silent = done.stdout.strip().partition(" ")
    return int(refused), silent


@pytest.mark.parametrize("dtype", ["float16", "uint8"])
def test_a_flipped_byte_is_found_or_harmless(tmp_path: Path, dtype: str) -> None:
    """Everywhere in the file, and densely in the pages of the tree, where LMDB's own library would crash."""
    refused, silent = run_flips(write_store(tmp_path / "s", 150, dtype=dtype, classes=4), "store")
    assert silent == "[]" and refused > 150


def test_flips_in_a_foreign_lmdb_never_end_the_process(tmp_path: Path) -> None:
    source = reference("data/features_authors_lmdb/coco_butd.lmdb/data.mdb")
    (tmp_path / "data.mdb").write_bytes(source.read_bytes())
    refused, _ = run_flips(tmp_path, "lmdb")
    assert refused > 30


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, (1 << 20).to_bytes(4, "little"), "reaches outside the file"),  # the value's length
        (6, (5000).to_bytes(2, "little"), "reaches outside it"),  # the key's length
        (10, (1 << 40).to_bytes(8, "little"), "points outside the file"),  # the value's page
        (4, (2).to_bytes(2, "little"), "sub-databases or duplicate keys"),  # the node's flags
    ],
)
def test_an_entry_that_points_astray_is_refused(tmp_path: Path, place: int, value: bytes, message: str) -> None:
    """An LMDB node: length (4 bytes), flags (2), key length (2), key (here 2), page of the value (8)."""
    data = write_store(tmp_path / "s", 40) / "data.mdb"
    content = bytearray(data.read_bytes())
    length = LmdbFile(data).sizes[LmdbFile(data).keys.index(b"12")]
    node = content.rfind(int(length).to_bytes(4, "little") + bytes([1, 0, 2, 0]) + b"12")
    content[node + place : node + place + len(value)] = value
    data.write_bytes(content)
    with pytest.raises(BadInput, match=message):
        FeatureStore(tmp_path / "s")


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    data = write_store(tmp_path / "s", 40) / "data.mdb"
    whole = data.read_bytes()
    used = (int.from_bytes(whole[4096 + 136 : 4096 + 144], "little") + 1) * 4096
    lengths = [0, 1, 100, 4095, 4096, 8191, 8192, used // 2, used - 4096, used - 1]
    lengths += np.random.default_rng(0).integers(0, used, 40).tolist()
    for length in lengths:
        data.write_bytes(whole[:length])
        with pytest.raises(BadInput, match=r"truncated|damaged|not an LMDB"):
            FeatureStore(tmp_path / "s")
    data.write_bytes(whole + bytes(4096))
    FeatureStore(tmp_path / "s")


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    for part in ("a", "b"):
        with StoreWriter(tmp_path / "s" / part, 32) as writer:
            writer.add(part, *made_up(8)[:2], WIDTH, HEIGHT)
    data = tmp_path / "s" / "b" / "data.mdb"
    data.write_bytes(data.read_bytes()[:-4096])
    with pytest.raises(BadInput, match=r"b.data\.mdb: truncated"):
        FeatureStore(tmp_path / "s")


def rewrite(path: Path, change: Callable[[dict[bytes, bytes]], None]) -> None:
    """Change entries of a store through LMDB itself: the tree stays sound, the content does not."""
    environment = lmdb.open(str(path), map_size=1 << 26, lock=False)
    with environment, environment.begin(write=True) as transaction:
        before = dict(transaction.cursor())
        after = dict(before)
        change(after)
        for key in before:
            transaction.delete(key)
        for key, value in after.items():
            transaction.put(key, value)


def with_metadata(path: Path, **changes: object) -> None:
    def change(entries: dict[bytes, bytes]) -> None:
        found = unpack_metadata(path, entries[METADATA_KEY])
        entries[METADATA_KEY] = pack_metadata(replace(found, **changes))  # type: ignore[arg-type]

    rewrite(path, change)


def test_another_version_or_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_store(tmp_path / "s")
    file = LmdbFile(path)
    found = unpack_metadata(path, file.value(file.keys.index(METADATA_KEY)))
    with monkeypatch.context() as patch:
        patch.setattr(metadata, "STORE_VERSION", 2)
        later = pack_metadata(found)
    rewrite(path, lambda entries: entries.update({METADATA_KEY: later}))
    with pytest.raises(BadInput, match="store version 2, this code reads 1"):
        FeatureStore(path)
    body = msgpack.packb({"format": "something else"})
    value = msgpack.packb({"crc32": zlib.crc32(body), "body": body})
    rewrite(path, lambda entries: entries.update({METADATA_KEY: value}))
    with pytest.raises(BadInput, match="not a feature store"):
        FeatureStore(path)


def test_metadata_that_lack_a_field_are_refused(tmp_path: Path) -> None:
    path = write_store(tmp_path / "s")
    body = msgpack.packb({"format": metadata.FORMAT, "version": 1, "feature_dim": 32})
    for value in (msgpack.packb({"crc32": zlib.crc32(body), "body": body}), b"", b"\xc1", msgpack.packb([1])):
        rewrite(path, lambda entries, value=value: entries.update({METADATA_KEY: value}))  # type: ignore[misc]
        with pytest.raises(BadInput, match="metadata"):
            FeatureStore(path)


def test_a_record_that_does_not_fit_its_declared_shape_is_refused(tmp_path: Path) -> None:
    path = write_store(tmp_path / "s", feature_dim=512)
    counts = FeatureStore(path).counts.copy()
    counts[3] += 1
    with_metadata(path, counts=counts)
    with pytest.raises(BadInput, match=r"s: image 11: \d+ bytes, but 4 regions need \d+"):
        FeatureStore(path)


def test_a_header_that_does_not_fit_the_index_is_refused(tmp_path: Path) -> None:
    path = write_store(tmp_path / "s")
    sizes = FeatureStore(path).sizes.copy()
    sizes[0] = [1, 1]
    with_metadata(path, sizes=sizes)
    with pytest.raises(BadInput, match="image 0: its header does not fit"):
        FeatureStore(path).record("0")


def test_a_lost_or_foreign_record_is_refused(tmp_path: Path) -> None:
    path = write_store(tmp_path / "s")
    rewrite(path, lambda entries: entries.update({b"stranger": entries.pop(b"3")}))
    with pytest.raises(BadInput, match="index and its records differ"):
        FeatureStore(path)


def test_two_records_of_one_shape_cannot_change_places(tmp_path: Path) -> None:
    path = write_store(tmp_path / "s", 20)

    def swap(entries: dict[bytes, bytes]) -> None:
        entries[b"1"], entries[b"10"] = entries[b"10"], entries[b"1"]

    rewrite(path, swap)
    with pytest.raises(BadInput, match=r"image 1: damaged record \(checksum\)"):
        FeatureStore(path).record("1")


@pytest.mark.parametrize(("verify", "times"), [("first", 1), ("always", 3), ("never", 0)])
def test_how_often_checksums_are_tested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verify: Verify, times: int
) -> None:
    store = FeatureStore(write_store(tmp_path / "s"), verify=verify)
    calls: list[bytes] = []

    def counted(key: bytes, value: memoryview) -> int:
        calls.append(key)
        return checksum(key, value)

    monkeypatch.setattr(shard, "checksum", counted)
    for _ in range(3):
        store.record("5")
    assert calls == [b"5"] * times


def test_a_damaged_record_stays_refused(tmp_path: Path) -> None:
    path = write_store(tmp_path / "s", dtype="float32")

    def damage(entries: dict[bytes, bytes]) -> None:
        value = bytearray(entries[b"5"])
        value[200] ^= 1
        entries[b"5"] = bytes(value)
        assert checksum(b"5", value) != checksum(b"5", entries[b"6"])

    rewrite(path, damage)
    FeatureStore(path, verify="never").record("5")
    checking: tuple[Verify, ...] = ("first", "always")
    for verify in checking:
        store = FeatureStore(path, verify=verify)
        for _ in range(2):
            with pytest.raises(BadInput, match="image 5: damaged record"):
                store.record("5")
        with pytest.raises(BadInput, match="image 5: damaged record"):
            store.gather(store.index(["5"]), [0], torch.zeros(16, 32))
        with pytest.raises(BadInput, match="image 5: damaged record"):
            store.gather_boxes(store.index(["5"]), [0], np.zeros((16, 4), np.float32))
        store.record("6")
