"""The one place that opens a pickle: an allow-list, no import, no code of the file's own.

Published data sets come as pickles (`refs(umd).p`, answer lists, target caches, the authors' LMDB values). A pickle is
a program, so only containers, texts and numbers are built, and NumPy arrays of numbers or bytes where a caller allows.
NumPy's own callables are never handed to the file (bent array states crash them): stand-ins here check and build.
"""

from __future__ import annotations

import io
import math
import pickle
import re
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from pipelines.errors import BadInput

Allowed = frozenset[tuple[str, str]]

NOTHING: Allowed = frozenset()
"""Builtin containers, texts and numbers only."""

MAX_BYTES = 4 << 30
"""Larger pickles are refused before they are read."""


def load_pickle(
    source: Path | bytes, allow: Allowed = NOTHING, *, where: object = "", max_bytes: int = MAX_BYTES
) -> Any:
    """The object in a pickle of builtin containers, texts, numbers and the globals of `allow`, a subset of `NUMPY`.

    `where` names the source in errors, by default the path. Texts of Python 2 are read as Latin-1, which array data
    of that time needs. Raises `BadInput` for a missing file, any other global (named), truncated or malformed bytes.
    """
    where = where or (source if isinstance(source, Path) else "pickle")
    if not allow <= NUMPY:
        raise ValueError(f"nothing stands in for {sorted(allow - NUMPY)}")
    return _loaded(_AllowListed(_bytes_of(source, max_bytes), allow), where)


def check_pickle(data: bytes, allow: Allowed, *, where: object) -> None:
    """Go through a pickle that another library is to load, and raise `BadInput` if it asks for a global outside `allow`.

    All its instructions are followed as an unpickler does, so that no trick with its stack hides a name, but every global
    and every object is the same inert thing: nothing is imported, called or built.
    """
    _loaded(_Inspected(data, allow), where)


def _loaded(unpickler: _AllowListed, where: object) -> Any:
    try:
        return unpickler.load()
    except _Forbidden as forbidden:
        raise BadInput(where, f"the pickle asks for {forbidden}", "not loaded; is the source to be trusted?") from None
    except Exception as error:  # noqa: BLE001 - hostile bytes can raise anything at all: every failure is bad input
        what = f"not a whole pickle ({type(error).__name__}: {error})"
        raise BadInput(where, what, "truncated or damaged? fetch it again") from None


def _bytes_of(source: Path | bytes, max_bytes: int) -> bytes:
    if isinstance(source, bytes):
        return source
    try:
        size = source.stat().st_size
        if size > max_bytes:
            raise BadInput(source, f"a pickle of {size} bytes, more than {max_bytes}", "split it")
        return source.read_bytes()
    except FileNotFoundError:
        raise BadInput(source, "no such file", "check the path in the configuration") from None
    except OSError as error:
        raise BadInput(source, f"cannot be read: {error.strerror}", "check the path and its permissions") from None


class _Dtype:
    """Stands in for `numpy.dtype`: an element of plain numbers or bytes, whose byte order comes with its state."""

    def __init__(self, name: str, _align: int = 0, _copy: int = 0) -> None:
        if not isinstance(name, str) or not re.fullmatch(r"[<>|=]?[?biufSU][0-9]{0,4}", name):
            raise pickle.UnpicklingError(f"an array of {str(name)[:40]!r}")
        self.real = np.dtype(name)

    def set_state(self, state: Any) -> None:
        """`(version, byte order, None, None, None, -1, -1, 0)`; all but the order is for structures."""
        if state[1] in ("<", ">"):
            self.real = self.real.newbyteorder(state[1])


def _empty_array(_type: object, _shape: object, _code: object) -> np.ndarray[Any, Any]:
    """Stands in for `_reconstruct`: an array to be filled by its state."""
    return np.empty(0, np.uint8)


def _scalar(dtype: _Dtype, data: str | bytes) -> Any:
    """Stands in for `scalar`: one NumPy number."""
    return np.frombuffer(_raw(data), dtype.real, count=1)[0]


def _array_state(state: Any) -> tuple[int, tuple[int, ...], np.dtype[Any], bool, bytes]:
    """An array's state `(version, shape, dtype, column order, bytes)`, seen to fit together."""
    version, shape, dtype, fortran, data = state
    raw = _raw(data)
    sizes = tuple(int(size) for size in shape)
    if version != 1 or type(dtype) is not _Dtype or min(sizes, default=0) < 0:
        raise pickle.UnpicklingError("a malformed array state")
    if math.prod(sizes) * dtype.real.itemsize != len(raw):
        raise pickle.UnpicklingError(f"{len(raw)} bytes for an array of shape {sizes}, {dtype.real}")
    return version, sizes, dtype.real, bool(fortran), raw


def _raw(data: Any) -> bytes:
    """Array data; Python 2 wrote it as text."""
    return data.encode("latin1") if isinstance(data, str) else bytes(memoryview(data))


_STAND_INS: dict[tuple[str, str], Any] = {("numpy", "dtype"): _Dtype, ("numpy", "ndarray"): object()}
for _core in ("numpy.core", "numpy._core"):  # NumPy 1 and 2
    _STAND_INS[f"{_core}.multiarray", "_reconstruct"] = _empty_array
    _STAND_INS[f"{_core}.multiarray", "scalar"] = _scalar

NUMPY: Allowed = frozenset(_STAND_INS)
"""What arrays and NumPy scalars need, in the spellings of NumPy 1 and 2."""


class _Forbidden(Exception):
    """A global outside the allow-list."""


class _AllowListed(pickle._Unpickler):
    """The unpickler in Python, about three times slower than the one in C, which a hostile file of nine bytes makes
    allocate 64 GiB (memo indices are array indices there, dictionary keys here)."""

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)
    stack: list[Any]  # values since the last mark

    def __init__(self, data: bytes, allow: Allowed) -> None:
        super().__init__(io.BytesIO(data), encoding="latin1")
        self._allow = allow

    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) not in self._allow:
            raise _Forbidden(f"{module_name}.{global_name}")
        return _STAND_INS[module_name, global_name]

    def load_build(self) -> None:
        """The state of an array or a dtype; nothing else has one."""
        state = self.stack.pop()
        built = self.stack[-1]
        if type(built) is np.ndarray:
            built.__setstate__(_array_state(state))  # type: ignore[arg-type]
        elif type(built) is _Dtype:
            built.set_state(state)
        else:
            raise pickle.UnpicklingError(f"a state for a {type(built).__name__}")

    dispatch[pickle.BUILD[0]] = load_build
    del dispatch[pickle.BYTEARRAY8[0]]  # allocates and clears the size that it states, before there are any bytes


_PLAIN = (str, bytes, int, float, type(None), np.generic)


def _with_plain_keys(opcode: bytes, keys: slice) -> None:
    """Let `opcode` hash only texts and numbers: hashing a tuple nested a million deep overflows the C stack."""
    load = _AllowListed.dispatch[opcode[0]]

    def checked(unpickler: _AllowListed) -> None:
        for key in unpickler.stack[keys]:
            if not isinstance(key, _PLAIN):
                raise pickle.UnpicklingError(f"a {type(key).__name__} as a key")
        load(unpickler)

    _AllowListed.dispatch[opcode[0]] = checked


_with_plain_keys(pickle.SETITEM, slice(-2, -1))
for _pairs in (pickle.SETITEMS, pickle.DICT):
    _with_plain_keys(_pairs, slice(0, None, 2))
for _members in (pickle.ADDITEMS, pickle.FROZENSET):
    _with_plain_keys(_members, slice(None))


class _Inert:
    """Stands in for whatever an allowed global is or gives: takes all that a pickle does to it, and does nothing."""

    def __call__(self, *_: object) -> _Inert:
        return self

    def __setitem__(self, key: object, value: object) -> None: ...

    def append(self, _: object) -> None: ...

    extend = update = add = append


class _Inspected(_AllowListed):
    """Follows a pickle and builds none of its objects."""

    dispatch: ClassVar[dict[int, Any]] = dict(_AllowListed.dispatch)
    _inert = _Inert()

    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) not in self._allow:
            raise _Forbidden(f"{module_name}.{global_name}")
        return self._inert

    def persistent_load(self, pid: Any) -> Any:
        """A tensor's memory, which lies beside the pickle."""
        return self._inert

    def load_build(self) -> None:
        self.stack.pop()

    def load_newobj(self) -> None:
        del self.stack[-2:]
        self.stack.append(self._inert)

    def load_newobj_ex(self) -> None:
        del self.stack[-3:]
        self.stack.append(self._inert)

    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.NEWOBJ[0]] = load_newobj
    dispatch[pickle.NEWOBJ_EX[0]] = load_newobj_ex
