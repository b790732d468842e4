"""Converters on made-up, damaged and hostile sources."""

from __future__ import annotations

import base64
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmdb
import msgpack
import numpy as np
import pytest
import torch

from pipelines.convert.__main__ import convert
from pipelines.errors import BadInput
from pipelines.store.reader import FeatureStore
from tests.pipelines.stores import HEIGHT, WIDTH, made_up, write_store
from tests.reference import ROOT

FEATURES, BOXES, PROBS = made_up(8, classes=4)


def encoded(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode()


def tsv_line(name: str, columns: int = 6, features: str = encoded(FEATURES), boxes: str = encoded(BOXES)) -> str:
    sizes = [str(WIDTH), str(HEIGHT)] if columns == 6 else [str(HEIGHT), str(WIDTH), *["AAAA"] * 4]
    return "\t".join([name, *sizes, str(len(FEATURES)), boxes, features]) + "\n"


def write_lmdb(path: Path, entries: dict[bytes, bytes]) -> Path:
    with lmdb.open(str(path), map_size=1 << 24) as environment, environment.begin(write=True) as transaction:
        for key, value in entries.items():
            transaction.put(key, value)
    return path


def assert_whole(path: Path, key: str = "7") -> None:
    record = FeatureStore(path).record(key)
    np.testing.assert_array_equal(record.features, FEATURES)
    np.testing.assert_allclose(record.boxes, BOXES, atol=1e-3)
    assert (record.width, record.height) == (WIDTH, HEIGHT)


def refuse(source_format: str, source: Path, match: str) -> None:
    target = source.parent / "refused"
    with pytest.raises(BadInput, match=match):
        convert(source_format, source, target)
    assert not target.exists()
    shutil.rmtree(source.parent / "refused.partial", ignore_errors=True)


@pytest.mark.parametrize("columns", [6, 10])
def test_both_tsv_layouts(tmp_path: Path, columns: int) -> None:
    (tmp_path / "a.tsv").write_text(tsv_line("7", columns))
    assert convert("butd-tsv", tmp_path / "a.tsv", tmp_path / "s", "float32") == (1, 9)
    assert_whole(tmp_path / "s")


def test_a_folder_is_searched_through_and_an_image_counts_once(tmp_path: Path) -> None:
    for part, name in (("a", "COCO_train2014_000000000007"), ("b/c", "8")):
        (tmp_path / part).mkdir(parents=True)
        (tmp_path / part / "x.tsv").write_text(tsv_line(name))
    assert convert("butd-tsv", tmp_path, tmp_path / "s") == (2, 18)
    (tmp_path / "b/c/x.tsv").write_text(tsv_line("9") + tsv_line("7.jpg"))
    refuse("butd-tsv", tmp_path, r"x.tsv:2: a second image 7")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("7\t1\t2\n", "a.tsv:2: 3 columns, expected 6 or 10"),
        (tsv_line("7", features=encoded(FEATURES)[:-6]), "a.tsv:2: "),
        (tsv_line("7", features=encoded(FEATURES)[:-8]), "a.tsv:2: "),
        (tsv_line("7", features="?" + encoded(FEATURES)[1:]), "a.tsv:2: "),
        (tsv_line("7", features=encoded(FEATURES[:, :8])), r"a.tsv:2: features of shape \[9, 8\], expected \[n, 32\]"),
        (tsv_line("7", boxes=encoded(BOXES[:, :3])), r"a.tsv:2: boxes of shape \[9, 3\]"),
        (tsv_line("7").replace(str(WIDTH), "wide"), "a.tsv:2: invalid literal"),
        (tsv_line("7").replace("\t9\t", "\t0\t"), "a.tsv:2: 288 values do not make 0 rows"),
        (tsv_line(""), "no image name"),
    ],
)
def test_a_damaged_tsv_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "a.tsv").write_text(tsv_line("6") + line)
    refuse("butd-tsv", tmp_path / "a.tsv", message)


def test_npz_under_each_name(tmp_path: Path) -> None:
    size = {"image_w": WIDTH, "image_h": HEIGHT}
    shares = np.hstack([BOXES / np.array([WIDTH, HEIGHT, WIDTH, HEIGHT], np.float32), np.zeros((9, 3), np.float32)])
    variants: list[dict[str, Any]] = [
        {"features": FEATURES, "boxes": BOXES, "image_width": [WIDTH], "image_height": [HEIGHT]},
        {"x": FEATURES, "bbox": BOXES, **size, "info": np.array({"objects": 1}, dtype=object)},
        {"x": FEATURES.T, "bbox": BOXES, **size},
        {"features": FEATURES, "norm_bb": shares, **size},
    ]
    for number, arrays in enumerate(variants):
        (tmp_path / str(number)).mkdir()
        np.savez(tmp_path / str(number) / "vg_7.npz", **arrays)
        convert("npz", tmp_path / str(number), tmp_path / f"s{number}", "float32")
        assert_whole(tmp_path / f"s{number}")
    np.savez(tmp_path / "7.npz", features=FEATURES, boxes=BOXES)
    refuse("npz", tmp_path / "7.npz", "no image size.*--sizes")
    (tmp_path / "sizes.json").write_text(f'{{"COCO_val2014_000000000007.jpg": [{WIDTH}, {HEIGHT}]}}')
    convert("npz", tmp_path / "7.npz", tmp_path / "s", "float32", sizes=tmp_path / "sizes.json")
    assert_whole(tmp_path / "s")


def test_npz_without_what_is_needed(tmp_path: Path) -> None:
    np.save(tmp_path / "7.npy", FEATURES)
    refuse("npz", tmp_path / "7.npy", "7.npy: a .npy file has features but no boxes.*numpy.savez")
    path = tmp_path / "7.npz"
    size: dict[str, Any] = {"width": WIDTH, "height": HEIGHT}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"boxes": BOXES, **size}, "7.npz: no array named features or x, only boxes, width, height"),
        ({"features": FEATURES, **size}, "7.npz: no array named boxes, bbox or norm_bb"),
        ({"features": FEATURES, "boxes": BOXES, "width": [1, 2], "height": 3}, "width is not one number"),
        ({"features": FEATURES, "norm_bb": BOXES, **size}, r"norm_bb outside 0\.\.1"),
        ({"features": np.array([{}], dtype=object), "boxes": BOXES, **size}, "no archive of plain arrays"),
    ]
    for arrays, message in cases:
        np.savez(path, **arrays)
        refuse("npz", path, message)
    np.savez(path, features=FEATURES, boxes=BOXES, **size)
    whole = path.read_bytes()
    for length in range(0, len(whole), 97):
        path.write_bytes(whole[:length])
        refuse("npz", path, "no archive of plain arrays|no npz archive")


def test_a_pt_file_is_no_program(tmp_path: Path) -> None:
    path = tmp_path / "7.pt"
    good: dict[str, Any] = {
        "bbox_features": torch.from_numpy(FEATURES), "bbox_coords": torch.from_numpy(BOXES),
        "width": WIDTH, "height": HEIGHT,
    }  # fmt: skip
    torch.save(good, path)
    convert("vinvl-pt", path, tmp_path / "s", "float32")
    assert_whole(tmp_path / "s")
    whole = path.read_bytes()
    for length in (0, 10, 500, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        refuse("vinvl-pt", path, "7.pt: no dictionary of tensors")
    torch.save({**good, "bbox_features": Hostile(tmp_path / "proof")}, path)
    refuse("vinvl-pt", path, "7.pt: no dictionary of tensors")
    assert not (tmp_path / "proof").exists()
    for wrong, message in (
        ([1], "expected a dictionary with bbox_features"),
        ({"bbox_features": 1}, "expected a dictionary"),
        ({**good, "bbox_features": 1}, "no tensor of numbers"),
        ({**good, "bbox_features": good["bbox_features"][0]}, r"features of shape \[32\]"),
    ):
        torch.save(wrong, path)
        refuse("vinvl-pt", path, message)


class Hostile:
    """A pickle of this creates a file when it is loaded carelessly."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.proof,)


def authors_record(**changes: Any) -> bytes:
    content = {"image_id": 7, "image_w": WIDTH, "image_h": HEIGHT, "num_boxes": 9, "boxes": BOXES, "features": FEATURES}
    return pickle.dumps({**content, **changes}, protocol=3)


def test_the_authors_older_base64_records(tmp_path: Path) -> None:
    old = authors_record(boxes=encoded(BOXES), features=encoded(FEATURES).encode())
    convert("vilbert-lmdb", write_lmdb(tmp_path / "old", {b"v7w_7": old}), tmp_path / "s", "float32")
    assert_whole(tmp_path / "s")


def test_a_hostile_or_damaged_authors_lmdb(tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    cases = {
        "the pickle asks for": authors_record(features=Hostile(proof)),
        "not a whole pickle": authors_record()[:-100],
        "expected a dictionary with": pickle.dumps([1]),
        "features are no numbers": authors_record(features=["a"]),
        r"boxes of shape \[9, 3\]": authors_record(boxes=BOXES[:, :3]),
        "a value of the wrong kind": authors_record(image_w="wide"),
    }
    for number, (message, value) in enumerate(cases.items()):
        source = write_lmdb(tmp_path / str(number), {b"6": authors_record(), b"7": value})
        refuse("vilbert-lmdb", source, message)
    listed = pickle.dumps([b"7", b"8"])
    refuse("vilbert-lmdb", write_lmdb(tmp_path / "l", {b"7": authors_record(), b"keys": listed}), "1 listed images")
    hostile_list = write_lmdb(tmp_path / "h", {b"7": authors_record(), b"keys": pickle.dumps([Hostile(proof)])})
    refuse("vilbert-lmdb", hostile_list, "the pickle asks for")
    assert not proof.exists()


UNITER_VALUE = msgpack.packb({"features": {"nd": True}, "norm_bb": {"nd": True}, "soft_labels": {"nd": True}})
OTHERS: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "vilbert-lmdb": (
        "uniter-lmdb",
        lambda path: write_lmdb(path, {b"7": authors_record(), b"keys": pickle.dumps([b"7"])}),
    ),
    "uniter-lmdb": ("vilbert-lmdb", lambda path: write_lmdb(path, {b"__keys__": b'["7"]', b"7": UNITER_VALUE})),
    "store": ("vilbert-lmdb", lambda path: write_store(path, 2)),
    "butd-tsv": ("npz", lambda path: write_text(path / "a.tsv", tsv_line("7"))),
    "npz": ("butd-tsv", lambda path: write_text(path / "a.npz", "")),
}


def write_text(path: Path, text: str) -> Path:
    path.parent.mkdir()
    path.write_text(text)
    return path.parent


@pytest.mark.parametrize("is_format", OTHERS)
def test_the_wrong_format_names_the_right_one(tmp_path: Path, is_format: str) -> None:
    named, write = OTHERS[is_format]
    refuse(named, write(tmp_path / "source"), rf"\(this looks like FORMAT {is_format}, not {named}\)")


@pytest.mark.parametrize("named", ["vilbert-lmdb", "uniter-lmdb", "store", "npz"])
def test_a_source_like_no_format_gets_no_hint(tmp_path: Path, named: str) -> None:
    source = write_lmdb(tmp_path / "source", {b"7": b"hello"})
    with pytest.raises(BadInput) as caught:
        convert(named, source, tmp_path / "out")
    assert "looks like" not in str(caught.value)


def test_a_truncated_foreign_lmdb_is_refused(tmp_path: Path) -> None:
    data = write_lmdb(tmp_path / "a", {str(n).encode(): authors_record() for n in range(30)}) / "data.mdb"
    whole = data.read_bytes()
    for length in range(0, len(whole), len(whole) // 20):
        data.write_bytes(whole[:length])
        refuse("vilbert-lmdb", tmp_path / "a", "truncated|damaged")


def packed(array: np.ndarray, **changes: Any) -> dict[bytes, Any]:
    fields = {b"nd": True, b"type": array.dtype.str, b"kind": b"", b"shape": array.shape, b"data": array.tobytes()}
    return {**fields, **{name.encode(): value for name, value in changes.items()}}


def test_a_damaged_or_hostile_uniter_record(tmp_path: Path) -> None:
    (tmp_path / "sizes.json").write_text(f'{{"7": [{WIDTH}, {HEIGHT}]}}')
    shares = (BOXES / np.array([WIDTH, HEIGHT, WIDTH, HEIGHT], np.float32)).astype(np.float32)
    good = {"features": packed(FEATURES), "norm_bb": packed(shares)}
    cases: list[tuple[Any, str]] = [
        (good, ""),
        ({**good, "features": packed(FEATURES, shape=[10**9, 10**9])}, "do not make the shape"),
        ({**good, "features": packed(FEATURES, shape=[-9, -32])}, "damaged array"),
        ({**good, "features": packed(FEATURES, type="O", data=pickle.dumps(1))}, "not numeric"),
        ({**good, "features": packed(FEATURES, data=None)}, "damaged array"),
        ({"norm_bb": packed(shares)}, "no array named features"),
        ([1], "no map of arrays"),
    ]
    for number, (content, message) in enumerate(cases):
        source = write_lmdb(tmp_path / str(number), {b"coco_train2014_000000000007.npz": msgpack.packb(content)})
        if not message:
            convert("uniter-lmdb", source, tmp_path / "s", "float32", tmp_path / "sizes.json")
            assert_whole(tmp_path / "s")
            continue
        with pytest.raises(BadInput, match=message):
            convert("uniter-lmdb", source, tmp_path / "t", "float32", tmp_path / "sizes.json")
    cut = write_lmdb(tmp_path / "cut", {b"7.npz": msgpack.packb(good)[:-50], b"__keys__": b'["7.npz"]'})
    with pytest.raises(BadInput, match="neither msgpack nor npz"):
        convert("uniter-lmdb", cut, tmp_path / "t", "float32", tmp_path / "sizes.json")
    lists = ((b'["7.npz", "8.npz"]', "1 listed images"), (b"[1]", "not a JSON list"), (b"{", "not a JSON list"))
    for listed, message in lists:
        source = write_lmdb(tmp_path / "list", {b"7.npz": msgpack.packb(good), b"__keys__": listed})
        with pytest.raises(BadInput, match=message):
            convert("uniter-lmdb", source, tmp_path / "t", "float32", tmp_path / "sizes.json")


def test_a_killed_conversion_resumes_and_equals_an_undisturbed_one(tmp_path: Path) -> None:
    source = tmp_path / "a.tsv"
    source.write_text("".join(tsv_line(str(number)) for number in range(3000)))
    convert("butd-tsv", source, tmp_path / "whole")
    script = (
        "import sys; from pathlib import Path; from pipelines.store import writer\n"
        "from pipelines.convert import __main__ as m\n"
        "writer._COMMIT_BYTES = 30_000\n"
        "m.convert('butd-tsv', Path(sys.argv[1]), Path(sys.argv[2]), resume=True,"
        " on_progress=lambda share, images: print(images, flush=True))"
    )
    kills = 0
    for stop in (5, 700, 1400, 2100, 2990, None):
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(source), str(tmp_path / "s")],
            cwd=ROOT, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stdout
        for line in process.stdout:
            if stop and int(line) >= stop:
                process.send_signal(signal.SIGKILL)
                break
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
        if (tmp_path / "s").exists():
            break
    assert kills >= 3
    ours, whole = FeatureStore(tmp_path / "s"), FeatureStore(tmp_path / "whole")
    assert ours.keys() == whole.keys()
    for key in whole:
        np.testing.assert_array_equal(ours.record(key).features, whole.record(key).features)


def test_a_resume_with_another_source_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text(tsv_line("1") + tsv_line("2") + "broken")
    with pytest.raises(BadInput, match=r"a\.tsv:3: 1 columns"):
        convert("butd-tsv", tmp_path / "a.tsv", tmp_path / "refused")
    with pytest.raises(BadInput, match="unfinished store"):
        convert("butd-tsv", tmp_path / "a.tsv", tmp_path / "refused")
    (tmp_path / "b.tsv").write_text(tsv_line("1") + tsv_line("2"))
    with pytest.raises(BadInput, match=r"begun from 'butd-tsv a\.tsv', not 'butd-tsv b\.tsv'"):
        convert("butd-tsv", tmp_path / "b.tsv", tmp_path / "refused", resume=True)
    (tmp_path / "a.tsv").write_text(tsv_line("1"))
    with pytest.raises(BadInput, match="1 of its images are not in"):
        convert("butd-tsv", tmp_path / "a.tsv", tmp_path / "refused", resume=True)
    (tmp_path / "a.tsv").write_text(tsv_line("1") + tsv_line("2") + tsv_line("3"))
    assert convert("butd-tsv", tmp_path / "a.tsv", tmp_path / "refused", resume=True) == (3, 27)
