"""The allow-listed pickle importer: what it reads, and that nothing else runs."""

from __future__ import annotations

import os
import pickle
import pickletools
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest

from pipelines.errors import BadInput
from pipelines.pickles import NUMPY, check_pickle, load_pickle
from tests.reference import reference

PLAIN = {"a": [1, 2.5, None, True, ("x", b"y")], "n": 2**70, 3: "ü", "s": {4}}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_builtin_containers_of_every_protocol(tmp_path: Path, protocol: int) -> None:
    content = {key: value for key, value in PLAIN.items() if key != "s" or protocol >= 4}
    if protocol < 3:
        content["a"] = [1, 2.5, None, True, ("x", "y")]
    path = tmp_path / "plain.pkl"
    path.write_bytes(pickle.dumps(content, protocol))
    assert load_pickle(path) == content


def test_published_refs_need_nothing() -> None:
    refs = load_pickle(reference("data/refcoco/refcocog/refs(umd).p"))
    assert len(refs) == 15
    assert {"ref_id", "ann_id", "image_id", "split", "sentences"} <= refs[0].keys()


ARRAYS = {
    "boxes": np.arange(8, dtype=np.float32).reshape(2, 4),
    "columns": np.asfortranarray(np.arange(6, dtype=np.int16).reshape(2, 3)),
    "big endian": np.array([1.5, 2], dtype=">f8"),
    "id": np.int64(7),
    "names": np.array([b"a", b"bc"]),
    "none": np.zeros((0, 4), np.float32),
}


def as_numpy_1(data: bytes) -> bytes:
    """The same pickle with module names as NumPy 1 wrote them (protocol 3 and below: names end in a line feed)."""
    return data.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


@pytest.mark.parametrize("rename", [bytes, as_numpy_1], ids=["numpy2", "numpy1"])
def test_arrays_in_both_spellings(rename: object) -> None:
    data = rename(pickle.dumps(ARRAYS, protocol=3))  # type: ignore[operator]
    loaded = load_pickle(data, NUMPY)
    for key, value in ARRAYS.items():
        np.testing.assert_array_equal(loaded[key], value)
        assert type(loaded[key]) is type(value)
        assert np.asarray(loaded[key]).dtype == np.asarray(value).dtype.newbyteorder("="), "NumPy swaps as it fills"
    with pytest.raises(BadInput, match=r"the pickle asks for numpy\."):
        load_pickle(data)


def test_one_array_in_two_places_stays_one() -> None:
    array = np.arange(3.0)
    first, second = load_pickle(pickle.dumps([array, array], protocol=3), NUMPY)
    assert first is second


def test_array_data_of_python_2() -> None:
    data = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n(I2\nt"
        b"cnumpy\ndtype\n(S'u1'\nI0\nI1\ntR(I3\nS'|'\nNNNI-1\nI-1\nI0\ntbI00\nS'\\x07\\xff'\ntb."
    )
    np.testing.assert_array_equal(load_pickle(data, NUMPY), np.array([7, 255], np.uint8))


@pytest.mark.parametrize(
    "array", [np.array(["a", None], dtype=object), np.zeros(2, dtype="f4,i4"), np.zeros(2, "M8[s]")], ids=str
)
def test_arrays_of_anything_but_numbers_and_bytes_are_refused(array: np.ndarray) -> None:
    with pytest.raises(BadInput, match="an array of"):
        load_pickle(pickle.dumps(array, protocol=3), NUMPY)


def test_a_bent_array_state_is_refused() -> None:
    data = pickle.dumps(np.arange(4, dtype=np.int32), protocol=3)
    bent = data.replace(b"K\x04\x85", b"K\x05\x85")
    assert bent != data
    with pytest.raises(BadInput, match=r"16 bytes for an array of shape \(5,\), int32"):
        load_pickle(bent, NUMPY)


class Canary:
    """Writes a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return os.open, (str(self.path), os.O_CREAT | os.O_WRONLY)  # type: ignore[return-value]


@pytest.mark.parametrize("allow", [frozenset(), NUMPY], ids=["nothing", "numpy"])
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_hostile_pickle_is_named_and_does_not_run(
    tmp_path: Path, protocol: int, allow: frozenset[tuple[str, str]]
) -> None:
    canary = tmp_path / "canary"
    path = tmp_path / "refs(umd).p"
    path.write_bytes(pickle.dumps([{"ref_id": 1}, Canary(canary)], protocol))
    with pytest.raises(BadInput, match=r"asks for \w+\.open") as caught:
        load_pickle(path, allow)
    assert str(path) in str(caught.value)
    assert not canary.exists()
    with open(path, "rb") as file:
        os.close(pickle.load(file)[1])  # noqa: S301 - the test's own file
    assert canary.exists(), "the canary must be able to sing"


@pytest.mark.parametrize(
    "data",
    [
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"cbuiltins\ngetattr\n.",
        b"cnumpy\nload\n.",
        b"cnumpy.f2py\ncompile\n.",
        b"\x80\x04\x8c\x05numpy\x8c\x0dndarray.dumps\x93.",
        b"(S'1'\nios\nsystem\n.",
    ],
)
def test_other_globals_are_refused_even_with_numpy(data: bytes) -> None:
    with pytest.raises(BadInput, match="asks for"):
        load_pickle(data, NUMPY, where="hostile")


def test_containers_with_a_class_are_refused() -> None:
    with pytest.raises(BadInput, match=r"asks for collections\.OrderedDict"):
        load_pickle(pickle.dumps(OrderedDict(a=1)))


def test_every_truncation_is_bad_input() -> None:
    data = pickle.dumps(PLAIN, 4)
    for length in range(len(data)):
        with pytest.raises(BadInput, match="not a whole pickle"):
            load_pickle(data[:length], where="cut")


def test_random_bytes_are_bad_input_or_plain_data() -> None:
    generator = np.random.default_rng(0)
    whole = np.frombuffer(pickle.dumps(ARRAYS, protocol=3), np.uint8)
    for _ in range(2_000):
        data = whole.copy()
        data[generator.integers(len(data))] = generator.integers(256)
        try:
            load_pickle(data.tobytes(), NUMPY)
        except BadInput:
            continue


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02Nr\xff\xff\xff\xff.",
        b"\x8e" + b"\xff" * 8,
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f",
        b"Pid\n.",
        b"\x82\x01.",
        b"\x96" + (1 << 40).to_bytes(8, "little") + b".",
    ],
    ids=["memo", "bytes8", "frame", "persistent", "extension", "bytearray8"],
)
def test_sizes_that_lie_cost_nothing(data: bytes) -> None:
    try:
        assert load_pickle(data) is None, "a memo index is only a name"
    except BadInput:
        assert data[0] != 0x80 or data[1] == 4


def test_deep_nesting_is_no_crash() -> None:
    depth = 200_000
    value = load_pickle(b"]" * depth + b"a" * (depth - 1) + b".")
    levels = 0
    while value:
        value, levels = value[0], levels + 1
    assert levels == depth - 1


@pytest.mark.parametrize("ending", [b"K\x01s.", b"K\x01u.", b"\x90."], ids=["setitem", "setitems", "additems"])
def test_deep_keys_are_no_crash(ending: bytes) -> None:
    start = b"\x8f(" if ending == b"\x90." else b"}(" if ending == b"K\x01u." else b"}"
    with pytest.raises(BadInput, match="a tuple as a key"):
        load_pickle(start + b")" + b"\x85" * 300_000 + ending)


def test_missing_large_and_unknown(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such file"):
        load_pickle(tmp_path / "absent.pkl")
    path = tmp_path / "large.pkl"
    path.write_bytes(pickle.dumps(PLAIN))
    with pytest.raises(BadInput, match="more than 10"):
        load_pickle(path, max_bytes=10)
    with pytest.raises(ValueError, match="nothing stands in"):
        load_pickle(b".", frozenset({("os", "system")}))


def test_the_canary_pickles_are_what_they_claim() -> None:
    """The hand-written programs above are well-formed: it is the allow-list that stops them, not a parse error."""
    for data in (b"cbuiltins\neval\n(S'1'\ntR.", b"(S'1'\nios\nsystem\n."):
        assert any(opcode.name in ("GLOBAL", "INST") for opcode, _, _ in pickletools.genops(data))


class Holder:
    """A class that an inspected pickle may name; it counts what is done with it."""

    touched = 0

    def __new__(cls) -> Holder:
        Holder.touched += 1
        return super().__new__(cls)

    def __init__(self) -> None:
        self.value = 1

    def __setstate__(self, state: object) -> None:
        Holder.touched += 1


HOLDERS = frozenset(
    {
        (Holder.__module__, "Holder"),
        ("collections", "OrderedDict"),
        ("copy_reg", "_reconstructor"),
        ("__builtin__", "object"),
    }
)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_an_inspection_builds_nothing_and_names_what_is_not_allowed(tmp_path: Path, protocol: int) -> None:
    content = [Holder(), OrderedDict(a=1), {"b": (1, 2)}]
    data = pickle.dumps(content, protocol)
    Holder.touched = 0
    check_pickle(data, HOLDERS, where="file")
    assert Holder.touched == 0
    with pytest.raises(BadInput, match=r"file: the pickle asks for .*(Holder|_reconstructor)"):
        check_pickle(data, frozenset({("collections", "OrderedDict")}), where="file")
    canary = tmp_path / "canary"
    with pytest.raises(BadInput, match=r"asks for \w+\.open"):
        check_pickle(pickle.dumps([*content, Canary(canary)], protocol), HOLDERS, where="file")
    assert not canary.exists()
    pickle.loads(data)  # noqa: S301 - the test's own
    assert Holder.touched, "the holder must be able to tell"


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x04\x8c\x02os\x94\x8c\x06system\x94h\x00h\x01\x93.",  # names from the memo
        b"\x80\x04(\x8c\x06system\x8c\x02os\x8c\x01xt0\x8c\x02os\x8c\x06system\x93.",  # a tuple made and dropped
        b"\x80\x04\x8c\x02os\x8c\x07system \x30\x8c\x06system\x93.",  # another name dropped between
        b"(ios\nsystem\n.",
    ],
    ids=["memo", "tuple", "pop", "inst"],
)
def test_no_trick_with_the_stack_hides_a_name_from_an_inspection(data: bytes) -> None:
    with pytest.raises(BadInput, match=r"asks for os\.system"):
        check_pickle(data, HOLDERS, where="file")


def test_an_inspection_of_damage_is_bad_input() -> None:
    data = pickle.dumps(PLAIN, 4)
    for length in range(len(data)):
        with pytest.raises(BadInput, match="not a whole pickle"):
            check_pickle(data[:length], HOLDERS, where="cut")
