"""What is mined already, in a file beside the target: a run that was ended goes on from there.

    {"format": 1, "settings": {…}}\\n     one line of JSON
    first row, rows, crc32 of the values, crc32 of this head; positions int32 [rows, k]; values float32 [rows, k]
    …                                    one block after the other, in the order of rows

A block is appended and synced when it is done. A block that ends with the file was being written when the run ended, and
is mined again; anything else that does not fit is damage.
"""

from __future__ import annotations

import fcntl
import json
import os
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np

from pipelines.errors import BadInput
from pipelines.files import write_atomic
from pipelines.mine.nearest import Neighbours

_FORMAT = 1
_HEAD = struct.Struct("<QQI")
_HEAD_BYTES = _HEAD.size + 4
_ITEM_BYTES = 8
_LONGEST_LINE = 1 << 16
_AGAIN = "remove it and mine again"


class Partial:
    """The rows mined so far at `<target>.partial`; leave the `with` block and they stay, `remove` them when all is done.

    Settings tell what is mined; a file begun with others is refused, as is a second run on the same file, and, without
    `resume`, any that is there. Raises BadInput.
    """

    def __init__(self, target: Path, settings: Mapping[str, Any], neighbours: int, resume: bool = False) -> None:
        """`settings`: what JSON can hold; `neighbours`: k."""
        self.path = target.with_name(target.name + ".partial")
        self.settings, self.k, self._resume = dict(settings), neighbours, resume
        self.blocks: list[Neighbours] = []

    @property
    def rows(self) -> int:
        """How many rows are mined."""
        return sum(len(block.positions) for block in self.blocks)

    def neighbours(self) -> Neighbours:
        """All rows mined so far."""
        positions, values = zip(*self.blocks, strict=True)
        return Neighbours(np.concatenate(positions), np.concatenate(values))

    def __enter__(self) -> Self:
        try:
            if not self.path.exists():
                header = json.dumps({"format": _FORMAT, "settings": self.settings})
                self.path.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(self.path, header.encode() + b"\n")
            elif not self._resume:
                raise BadInput(self.path, "an unfinished run is here", "go on with --resume, or remove the file")
            self._file: BinaryIO = open(self.path, "r+b")
        except OSError as error:
            raise BadInput(self.path, f"cannot write here: {error.strerror}") from error
        try:
            self._lock()
            self._read()
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, block: Neighbours) -> None:
        """Append the next rows; they are on disk when this returns."""
        content = block.positions.astype("<i4").tobytes() + block.values.astype("<f4").tobytes()
        head = _HEAD.pack(self.rows, len(block.positions), zlib.crc32(content))
        try:
            self._file.write(head + struct.pack("<I", zlib.crc32(head)) + content)
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise BadInput(self.path, f"cannot write: {error.strerror}", "make room, then --resume") from error
        self.blocks.append(block)

    def remove(self) -> None:
        """The rows are no longer wanted."""
        self.path.unlink()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput(self.path, "another process is mining into this file", "wait for it, or end it") from None

    def _read(self) -> None:
        self._check_settings(self._file.readline(_LONGEST_LINE))
        while True:
            start = self._file.tell()
            head = self._file.read(_HEAD_BYTES)
            if len(head) < _HEAD_BYTES:
                break
            first, rows, checksum = _HEAD.unpack_from(head)
            if zlib.crc32(head[: _HEAD.size]) != struct.unpack_from("<I", head, _HEAD.size)[0] or first != self.rows:
                raise BadInput(self.path, f"damaged after row {self.rows}", _AGAIN)
            content = self._file.read(rows * self.k * _ITEM_BYTES)
            if len(content) < rows * self.k * _ITEM_BYTES:
                break
            if zlib.crc32(content) != checksum:
                raise BadInput(self.path, f"damaged after row {self.rows}", _AGAIN)
            positions, values = content[: len(content) // 2], content[len(content) // 2 :]
            self.blocks.append(
                Neighbours(
                    np.frombuffer(positions, "<i4").reshape(rows, self.k),
                    np.frombuffer(values, "<f4").reshape(rows, self.k),
                )
            )
        self._file.seek(start)
        self._file.truncate()

    def _check_settings(self, line: bytes) -> None:
        try:
            header = json.loads(line)
            found = dict(header["settings"])
            known = header["format"] == _FORMAT and line.endswith(b"\n")
        except (ValueError, KeyError, TypeError) as error:
            raise BadInput(self.path, "not the file of an unfinished run", _AGAIN) from error
        if not known:
            raise BadInput(self.path, "of another version, or cut short", _AGAIN)
        other = [key for key, value in self.settings.items() if found.get(key) != value]
        if other:
            ours, theirs = ({key: settings.get(key) for key in other} for settings in (self.settings, found))
            raise BadInput(self.path, f"begun with {theirs}, not {ours}", "resume with the same settings and data")
