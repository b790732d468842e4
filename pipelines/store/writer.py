"""Write a feature store: validated, resumable, and at its place only when it is whole."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Self

import lmdb
import numpy as np
from numpy.typing import ArrayLike

from pipelines.boxes import Float32
from pipelines.errors import BadInput
from pipelines.files import sync
from pipelines.identity import image_key
from pipelines.store.lmdb_file import LmdbFile
from pipelines.store.metadata import METADATA_KEY, Metadata, pack_metadata, unpack_metadata
from pipelines.store.record import DTYPES, encode_record, read_header

_COMMIT_BYTES = 64 << 20  # what a kill may lose, and what a full map writes again
_FIRST_MAP_BYTES = 256 << 20
_OUTSIDE_PIXELS = 1.0  # detectors clip to width or to width - 1, and round
_MAX_KEY_BYTES = 511  # LMDB's


class StoreWriter:
    """Writes one store. Records go to `<path>.partial`; leaving the `with` block without an error renames it to `path`.

    After an error or a kill the partial folder keeps what was committed; `resume=True` goes on from there. The lock
    inside it refuses a second writer. Raises `BadInput` for whatever is wrong with a record, the target or the disk.
    """

    def __init__(
        self,
        path: Path | str,
        feature_dim: int,
        dtype: str = "float16",
        source: str = "",
        resume: bool = False,
    ) -> None:
        """`source`: where the features come from, kept in the store; a resume from another one is refused."""
        if dtype not in DTYPES:
            raise BadInput(path, f"unknown feature type {dtype!r}", f"one of {', '.join(DTYPES)}")
        self.path = Path(path)
        self.partial = self.path.with_name(self.path.name + ".partial")
        self.feature_dim, self.dtype, self.source = feature_dim, dtype, source
        self.classes = 0
        """Length of a class distribution, known from the first record that has one."""
        self._resume = resume
        self._index: dict[str, tuple[int, int, int, bool]] = {}
        self._pending: dict[bytes, bytearray] = {}
        self._pending_bytes = 0
        self._disk_failed = False

    @property
    def images(self) -> int:
        """Images in the store so far, those of an interrupted run included."""
        return len(self._index)

    @property
    def regions(self) -> int:
        """Regions in the store so far."""
        return sum(entry[0] for entry in self._index.values())

    def keys(self) -> set[str]:
        """Keys of the images that are in the store already."""
        return set(self._index)

    def __enter__(self) -> Self:
        if self.path.exists():
            raise BadInput(self.path, "exists already", "remove it or choose another name")
        if self.partial.exists() and not self._resume:
            raise BadInput(self.partial, "an unfinished store is here", "go on with --resume, or remove the folder")
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
            self._lock()
        except OSError as error:
            raise self._unwritable(error.strerror, error.errno == errno.ENOSPC) from error
        try:
            if self._resume:
                self._take_over()
            self._env = lmdb.open(str(self.partial), map_size=_FIRST_MAP_BYTES, mode=0o644, lock=False)
            self._commit({METADATA_KEY: pack_metadata(self._metadata(complete=False))})
        except BaseException as error:
            os.close(self._lock_file)
            if isinstance(error, lmdb.Error):
                raise self._unwritable(error, True) from error
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
            elif not self._disk_failed:
                self._flush()  # what was added before the error is good
        finally:
            self._env.close()
            os.close(self._lock_file)
            if not self._index:
                shutil.rmtree(self.partial, ignore_errors=True)

    def add(
        self,
        name: str | int,
        features: ArrayLike,
        boxes: ArrayLike,
        width: int,
        height: int,
        class_probs: ArrayLike | None = None,
        where: str = "",
        mean: ArrayLike | None = None,
    ) -> None:
        """Add one image. `features` [n, F]; `boxes` [n, 4] x1, y1, x2, y2 in pixels; `class_probs` [n, C] or None.

        `mean` [F]: the global row where it is known better than from `features`, which another store has rounded.
        The key is `image_key(name)`. Arrays are taken as float32. `where` names the record's origin in errors, by
        default the store and the key. Raises `BadInput` for wrong shapes, no region, values that are not finite or do
        not fit the stored type, boxes outside the image, and an image given twice.
        """
        key = image_key(name)
        where = where or f"{self.path}: image {key}"
        if key in self._index:
            raise BadInput(where, "given twice", "each image once; the key of a name is pipelines.identity.image_key")
        if len(key.encode()) > _MAX_KEY_BYTES or key.encode() == METADATA_KEY:
            raise BadInput(where, "this name cannot be a key")
        rows = _array(where, "features", features, self.feature_dim)
        corners = _array(where, "boxes", boxes, 4)
        probs = None if class_probs is None else _array(where, "class_probs", class_probs, None)
        self._check(where, rows, corners, width, height, probs)
        row = None if mean is None else _array(where, "mean", np.asarray(mean)[None], self.feature_dim)[0]
        value = encode_record(key.encode(), self.dtype, rows, corners, int(width), int(height), probs, row)
        self._index[key] = (len(rows), int(width), int(height), probs is not None)
        self._pending[key.encode()] = value
        self._pending_bytes += len(value)
        if self._pending_bytes >= _COMMIT_BYTES:
            self._flush()

    def _check(
        self, where: str, features: Float32, boxes: Float32, width: int, height: int, probs: Float32 | None
    ) -> None:
        if not len(features) == len(boxes) > 0 or (probs is not None and len(probs) != len(boxes)):
            given = f"{len(features)} feature rows, {len(boxes)} boxes"
            raise BadInput(where, given + ("" if probs is None else f", {len(probs)} class distributions"))
        if not 0 < width < 2**31 or not 0 < height < 2**31:
            raise BadInput(where, f"image size {width} x {height}")
        if (boxes[:, 2:] < boxes[:, :2]).any():
            raise BadInput(where, "a box ends before it begins", "boxes are x1, y1, x2, y2, not x, y, width, height")
        beyond = boxes[:, 2:] - np.array([width, height], dtype=np.float32)
        if boxes.min() < -_OUTSIDE_PIXELS or beyond.max() > _OUTSIDE_PIXELS:
            raise BadInput(where, f"a box lies outside the image of {width} x {height}", "boxes are in its pixels")
        if self.dtype == "float16" and np.abs(features).max() >= 65520:
            raise BadInput(where, "a feature exceeds float16's 65504", "use --dtype bfloat16 or float32")
        if self.dtype == "uint8" and features.min() < 0:
            raise BadInput(where, "a feature below 0 has no place in uint8", "use --dtype bfloat16 or float32")
        if probs is not None and (probs.min(initial=0) < 0 or probs.max(initial=0) > 1.001):
            raise BadInput(where, "class probabilities outside 0..1")
        if probs is not None and self.classes not in (0, probs.shape[1]):
            raise BadInput(where, f"{probs.shape[1]} classes, the images before have {self.classes}")
        self.classes = self.classes if probs is None else probs.shape[1]

    def _lock(self) -> None:
        self._lock_file = os.open(self.partial / "writer.lock", os.O_CREAT | os.O_RDWR, 0o644)
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock_file)
            raise BadInput(self.partial, "another process is writing this store", "wait for it, or end it") from None

    def _take_over(self) -> None:
        """Read which records an interrupted run has left, and that it had the same settings."""
        data = self.partial / "data.mdb"
        if not data.exists() or not data.stat().st_size:
            return
        file = LmdbFile(data)
        for key, value in file.items():
            if key == METADATA_KEY:
                found = unpack_metadata(self.partial, value)
                theirs, ours = (found.feature_dim, found.dtype), (self.feature_dim, self.dtype)
                if theirs != ours:
                    raise BadInput(self.partial, f"begun with {theirs}, not {ours}", "resume with the same settings")
                if found.source != self.source:
                    what = f"begun from {found.source!r}, not {self.source!r}"
                    raise BadInput(self.partial, what, "resume with the same source, or remove the folder")
                continue
            header = read_header(value)
            if header is None:
                raise BadInput(self.partial, f"record {key!r} is damaged", "remove the folder and convert again")
            _, num_boxes, _, _, width, height, classes, _ = header
            self._index[key.decode()] = (num_boxes, width, height, classes > 0)
            self.classes = max(self.classes, classes)

    def _metadata(self, complete: bool) -> Metadata:
        keys = sorted(self._index, key=str.encode) if complete else []
        rows = np.array([self._index[key] for key in keys], dtype=np.int32).reshape(-1, 4)
        return Metadata(
            feature_dim=self.feature_dim,
            dtype=self.dtype,
            classes=self.classes,
            source=self.source,
            complete=complete,
            keys=tuple(keys),
            counts=rows[:, 0],
            sizes=rows[:, 1:3],
            with_probs=rows[:, 3].astype(np.bool_),
        )

    def _flush(self) -> None:
        self._commit(self._pending)
        self._pending, self._pending_bytes = {}, 0

    def _commit(self, entries: dict[bytes, bytearray] | dict[bytes, bytes]) -> None:
        """Write the entries in one transaction, on disk when this returns; the map grows until they fit."""
        while True:
            try:
                with self._env.begin(write=True) as transaction:
                    for key, value in entries.items():
                        transaction.put(key, value)
                return
            except lmdb.MapFullError:
                self._env.set_mapsize(2 * self._env.info()["map_size"])
            except lmdb.Error as error:
                self._disk_failed = True
                raise self._unwritable(error, True) from error

    def _unwritable(self, why: object, resumable: bool) -> BadInput:
        """`resumable`: once there is room."""
        folder = self.partial if self.partial.exists() else self.partial.parent
        free = f"; {shutil.disk_usage(folder).free / 1e9:.2f} GB free" if folder.exists() else ""
        mend = "make room, then --resume" if resumable else "is it a folder that you may write to?"
        return BadInput(self.partial, f"cannot write here: {why}{free}", mend)

    def _finish(self) -> None:
        if not self._index:
            raise BadInput(self.path, "no image to write")
        self._flush()
        self._commit({METADATA_KEY: pack_metadata(self._metadata(complete=True))})
        self._env.close()
        (self.partial / "writer.lock").unlink()
        sync(self.partial)
        if self.path.exists():
            raise BadInput(self.path, "appeared while this store was written", f"the new one is {self.partial}")
        os.rename(self.partial, self.path)
        sync(self.path.parent)


def _array(where: str, what: str, values: ArrayLike, columns: int | None) -> Float32:
    try:
        array = np.ascontiguousarray(values, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise BadInput(where, f"{what} are no numbers ({error})") from error
    if array.ndim != 2 or (columns is not None and array.shape[1] != columns):
        raise BadInput(where, f"{what} of shape {list(array.shape)}, expected [n, {columns or 'classes'}]")
    if not np.isfinite(array).all():
        raise BadInput(where, f"{what} hold infinite or undefined values", "extract this image again")
    return array
