"""Converters on real features, in the formats in which they were published."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.convert.__main__ import convert, main
from pipelines.errors import BadInput
from pipelines.identity import image_key
from pipelines.store.reader import FeatureStore
from pipelines.store.record import DTYPES
from tests.pipelines.stores import write_store
from tests.reference import reference

DATA = "data"
BUTD, VINVL = "features_butd_caffe", "features_vinvl_emma"
AUTHORS, UNITER = "features_authors_lmdb", "features_uniter_lmdb"


@pytest.fixture(scope="module")
def sizes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Image sizes by one of the published names, as a user of UNITER's stores has to bring them."""
    found: dict[str, list[int]] = {}
    for line in reference(f"{DATA}/{BUTD}/train2014_obj36.tsv").open():
        name, height, width, _ = line.split("\t", 3)
        found[name + ".jpg"] = [int(width), int(height)]
    for file in reference(f"{DATA}/{VINVL}").rglob("*.pt"):
        content = torch.load(file, weights_only=True)
        found[file.stem] = [content["width"], content["height"]]
    path = tmp_path_factory.mktemp("sizes") / "sizes.json"
    path.write_text(json.dumps(found))
    return path


def converted(tmp_path: Path, source_format: str, folder: str, **options: object) -> FeatureStore:
    target = tmp_path / f"{source_format}-{len(list(tmp_path.iterdir()))}"
    convert(source_format, reference(f"{DATA}/{folder}"), target, **options)  # type: ignore[arg-type]
    return FeatureStore(target)


def assert_same_features(a: FeatureStore, b: FeatureStore, keys: set[str], pixels: float, relative: float) -> None:
    for key in keys:
        one, other = a.record(key), b.record(key)
        assert (one.width, one.height) == (other.width, other.height)
        np.testing.assert_allclose(one.boxes, other.boxes, rtol=0, atol=pixels)
        for ours, theirs in ((one.features, other.features), (one.mean, other.mean)):
            scale = np.abs(theirs.astype(np.float32)).max()
            np.testing.assert_allclose(
                ours.astype(np.float32), theirs.astype(np.float32), rtol=relative, atol=relative * scale * 1e-3
            )


def test_bottom_up_tsv(tmp_path: Path) -> None:
    store = converted(tmp_path, "butd-tsv", BUTD, dtype="float32")
    assert len(store) == 10 and set(store.counts) == {36} and store.feature_dim == 2048 and store.classes == 0
    assert "131486" in store and "84002" in store
    assert store.sizes[store.index(["132417"])].tolist() == [[500, 333]]


def test_vinvl_pt_is_exact_in_float32(tmp_path: Path) -> None:
    store = converted(tmp_path, "vinvl-pt", VINVL, dtype="float32")
    files = sorted(reference(f"{DATA}/{VINVL}").rglob("*.pt"))
    assert len(store) == len(files) == 21 and int(store.counts.sum()) == 693 and store.classes == 1595
    for file in files:
        content = torch.load(file, weights_only=True)
        record = store.record(image_key(file.name))
        np.testing.assert_array_equal(record.features, content["bbox_features"])
        np.testing.assert_array_equal(record.boxes, content["bbox_coords"])
        np.testing.assert_array_equal(record.class_probs, content["bbox_probas"].half())


def test_the_authors_lmdb_equals_the_tsv_that_it_was_made_from(tmp_path: Path) -> None:
    tsv = converted(tmp_path, "butd-tsv", BUTD, dtype="float32")
    authors = converted(tmp_path, "vilbert-lmdb", AUTHORS, dtype="float32")
    assert authors.keys() == tsv.keys()
    assert_same_features(authors, tsv, set(tsv.keys()), pixels=0, relative=0)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_uniters_lmdbs_equal_their_sources_to_half_precision(tmp_path: Path, sizes: Path, dtype: str) -> None:
    tsv = converted(tmp_path, "butd-tsv", BUTD, dtype="float32")
    vinvl = converted(tmp_path, "vinvl-pt", VINVL, dtype="float32")
    uniter = converted(tmp_path, "uniter-lmdb", UNITER, sizes=sizes, dtype=dtype)
    assert len(uniter) == 13 and uniter.with_probs.sum() == 8  # msgpack and npz values, with and without classes
    from_tsv = set(uniter.keys()) & set(tsv.keys())
    assert len(from_tsv) == 5
    assert_same_features(uniter, tsv, from_tsv, pixels=0.2, relative=4.9e-4)
    assert_same_features(uniter, vinvl, set(uniter.keys()) - from_tsv, pixels=0.2, relative=4.9e-4)
    for key in set(uniter.keys()) - from_tsv:
        ours, theirs = uniter.record(key).class_probs, vinvl.record(key).class_probs
        assert ours is not None and theirs is not None
        np.testing.assert_allclose(ours, theirs, atol=1e-3)


def test_half_precision_stores_agree_within_its_rounding(tmp_path: Path) -> None:
    exact = converted(tmp_path, "butd-tsv", BUTD, dtype="float32")
    half = converted(tmp_path, "vilbert-lmdb", AUTHORS)
    assert half.dtype == "float16"
    assert_same_features(half, exact, set(exact.keys()), pixels=0, relative=4.9e-4)


def test_a_missing_size_is_named(tmp_path: Path, sizes: Path) -> None:
    with pytest.raises(BadInput, match=r"hold no image size.*--sizes FILE"):
        converted(tmp_path, "uniter-lmdb", UNITER)
    fewer = json.loads(sizes.read_text())
    del fewer["COCO_train2014_000000132417.jpg"]
    (tmp_path / "fewer.json").write_text(json.dumps(fewer))
    with pytest.raises(BadInput, match="no size of image 132417 in the file of --sizes"):
        converted(tmp_path, "uniter-lmdb", UNITER, sizes=tmp_path / "fewer.json")
    for content in ("[]", "{", '{"1": [2]}', '{"1": 3}', "[" * 100_000):
        (tmp_path / "wrong.json").write_text(content)
        with pytest.raises(BadInput, match=r"wrong.json: no JSON object"):
            converted(tmp_path, "uniter-lmdb", UNITER, sizes=tmp_path / "wrong.json")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_store_is_kept_in_another_type(tmp_path: Path, dtype: str) -> None:
    first = FeatureStore(write_store(tmp_path / "a", 12, dtype="float32", classes=5))
    assert convert("store", tmp_path / "a", tmp_path / "b", dtype) == (12, int(first.counts.sum()))
    second = FeatureStore(tmp_path / "b")
    assert second.keys() == first.keys() and second.dtype == dtype
    convert("store", tmp_path / "b", tmp_path / "c", "float16")
    third = FeatureStore(tmp_path / "c")
    assert all(np.array_equal(third.record(key).mean, first.record(key).mean) for key in first), "rounded twice"
    step = {"float32": 0.0, "float16": 2**-11, "bfloat16": 2**-8, "uint8": 0.5 / 255}[dtype]
    for key in first:
        ours, theirs = second.record(key), first.record(key)
        largest = theirs.values().max(axis=1, keepdims=True)
        assert (np.abs(ours.values() - theirs.values()) <= 1.001 * step * largest).all()
        np.testing.assert_array_equal(ours.boxes, theirs.boxes)
        np.testing.assert_array_equal(ours.mean, theirs.mean)
        assert (ours.class_probs is None) == (theirs.class_probs is None)


def test_the_command_says_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = reference(f"{DATA}/{BUTD}/train2014_obj36.tsv"), tmp_path / "s"
    assert main(["butd-tsv", str(source), str(target), "--dtype", "bfloat16", "--limit", "3"]) == 0
    gigabytes = f"{(target / 'data.mdb').stat().st_size / 1e9:.3g}"
    assert capsys.readouterr().out == f"wrote 3 images, 108 regions to {target} (bfloat16, {gigabytes} GB)\n"
    assert main(["butd-tsv", str(source), str(target)]) == 2
    complaint = capsys.readouterr().err
    assert complaint == f"error: {target}: exists already (remove it or choose another name)\n"
    assert main(["butd-tsv", str(source), str(tmp_path / "t"), "--sizes", str(source)]) == 2
    assert main(["butd-tsv", str(source), str(tmp_path / "t"), "--limit", "0"]) == 2
    assert main(["npz", str(source.parent), str(tmp_path / "t")]) == 2
    assert main(["npz", str(tmp_path / "absent"), str(tmp_path / "t")]) == 2
    assert main(["vinvl-pt", str(source.parent), str(tmp_path / "t")]) == 2
    assert not (tmp_path / "t").exists() and len(capsys.readouterr().err.splitlines()) == 5


def test_help_tells_formats_and_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "uniter-lmdb" in text and "DST.partial" in text and "Exit codes" in text
