"""Read an LMDB file that may be damaged, without risking the process.

The LMDB library trusts its file: a truncated one ends the process by SIGBUS, a flipped byte in its tree by SIGSEGV or
an assertion. So the tree is walked here first, every offset checked against the file's length, and values are then
taken straight from a memory map. The views that this hands out keep the map alive, survive a fork, and need no
transaction. Only the tree's pages are touched (1 in some 15,000 bytes of a feature store), not the values.

The format is LMDB's data version 1, that of all 0.9 releases, on a 64-bit little-endian machine.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import BadInput

_MAGIC, _DATA_VERSION = 0xBEEFC0DE, 1
_PAGE_HEADER = 16
_BRANCH, _LEAF = 0x01, 0x02
_BIG, _SUB_DATABASE, _DUPLICATES = 0x01, 0x02, 0x04
_NO_ROOT = 2**64 - 1
_RELEASED = 64  # pages of the tree; the kernel maps up to megabytes of the file around each
_MEND = "copy or convert it again"


class LmdbFile:
    """All entries of one LMDB environment, checked: keys in order, and where each value lies.

    `path` is the environment's folder or the data file itself. Raises `BadInput` if the file is missing, truncated,
    of another format, damaged in its tree, or uses sub-databases or duplicate keys.
    """

    def __init__(self, path: Path | str) -> None:
        given = Path(path)
        self.path = given / "data.mdb" if given.is_dir() else given
        if not self.path.is_file():
            raise BadInput(given, "no LMDB here", "expected a folder with a file data.mdb")
        with self.path.open("rb") as file:
            if self.path.stat().st_size < 2 * 4096:
                raise BadInput(self.path, "truncated: shorter than LMDB's two first pages", _MEND)
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.bytes: NDArray[np.uint8] = np.frombuffer(self.map, dtype=np.uint8)
        self.keys: list[bytes] = []
        """Ascending."""
        self.offsets: NDArray[np.int64]
        """int64 [entries]: where each value begins in the file."""
        self.sizes: NDArray[np.int64]
        """int64 [entries]: its length in bytes."""
        self._walk()

    def value(self, position: int) -> memoryview:
        """The value of entry `position`, a view of the memory map."""
        start = int(self.offsets[position])
        return memoryview(self.map)[start : start + int(self.sizes[position])]

    def items(self) -> Iterator[tuple[bytes, memoryview]]:
        """Every key and value, in key order."""
        for position, key in enumerate(self.keys):
            yield key, self.value(position)

    def _broken(self, what: str) -> BadInput:
        return BadInput(self.path, f"damaged LMDB: {what}", _MEND)

    def _walk(self) -> None:
        page_size, flags, entries, root, last_page = self._newest_meta()
        self._page_size, self._page_count = page_size, last_page + 1
        if len(self.bytes) < self._page_count * page_size:
            expected = self._page_count * page_size
            raise BadInput(self.path, f"truncated: {len(self.bytes)} bytes, should have {expected}", _MEND)
        if flags & _DUPLICATES:
            raise BadInput(self.path, "an LMDB with duplicate keys holds no features")
        parts = [] if root == _NO_ROOT else list(self._leaves(root))
        offsets = [offset for offset, _ in parts]
        sizes = [size for _, size in parts]
        self.offsets = np.concatenate(offsets) if parts else np.zeros(0, np.int64)
        self.sizes = np.concatenate(sizes) if parts else np.zeros(0, np.int64)
        if len(self.keys) != entries:
            raise self._broken(f"{len(self.keys)} entries in the tree, {entries} announced")
        if any(a >= b for a, b in zip(self.keys, self.keys[1:], strict=False)):
            raise self._broken("keys out of order")

    def _newest_meta(self) -> tuple[int, int, int, int, int]:
        """page size, flags, entries and root of the main tree, last page; of the last committed transaction."""
        newest = (-1, 0, 0, 0, 0)
        page_size = struct.unpack_from("<I", self.map, 40)[0]
        if page_size not in (4096, 8192, 16384, 32768, 65536):
            raise BadInput(self.path, "not an LMDB file, or a damaged one", _MEND)
        for page in (0, page_size):
            if page + 152 > len(self.bytes):
                raise BadInput(self.path, "truncated: shorter than LMDB's two first pages", _MEND)
            magic, version = struct.unpack_from("<II", self.map, page + 16)
            if magic != _MAGIC or version != _DATA_VERSION:
                raise BadInput(self.path, "not an LMDB file of data version 1, or a damaged one", _MEND)
            flags = struct.unpack_from("<H", self.map, page + 92)[0]
            entries, root, last_page, transaction = struct.unpack_from("<QQQQ", self.map, page + 120)
            newest = max(newest, (transaction, flags, entries, root, last_page))
        _, flags, entries, root, last_page = newest
        return page_size, flags, entries, root, last_page

    def _leaves(self, root: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Value offsets and sizes of every leaf page, left to right; keys are appended on the way."""
        seen: set[int] = set()
        pending = [root]
        while pending:
            number = pending.pop()
            if number in seen or not 2 <= number < self._page_count:
                raise self._broken(f"page {number} does not belong where it is")
            seen.add(number)
            if len(seen) % _RELEASED == 0:
                self.map.madvise(mmap.MADV_DONTNEED)
            page = self.bytes[number * self._page_size : (number + 1) * self._page_size]
            kind, nodes = self._nodes(page, number)
            if kind == _BRANCH:
                low, high, top = (nodes[:, column].astype(np.int64) for column in (1, 2, 3))
                pending.extend((low | high << 16 | top << 32)[::-1].tolist())
            else:
                yield self._leaf(page, number, nodes)

    def _nodes(self, page: NDArray[np.uint8], number: int) -> tuple[int, NDArray[np.int64]]:
        """Kind of the page and the heads of its nodes [n, 5]: offset in the page, three 16-bit words, key size."""
        own_number, _, flags, lower, upper = struct.unpack_from("<QHHHH", page.data)
        kind = flags & 0x7F & ~0x10
        count = (lower - _PAGE_HEADER) // 2
        if own_number != number or kind not in (_BRANCH, _LEAF) or not _PAGE_HEADER < lower <= upper <= len(page):
            raise self._broken(f"page {number} is no page of the tree")
        words = page.view(np.uint16).astype(np.int64)
        offsets = words[8 : 8 + count]
        if (offsets < upper).any() or (offsets + 8 > len(page)).any() or (offsets & 1).any():
            raise self._broken(f"page {number} points outside itself")
        nodes = np.stack([offsets, *(words[offsets // 2 + word] for word in range(4))], axis=1)
        return kind, nodes

    def _leaf(
        self, page: NDArray[np.uint8], number: int, nodes: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        offsets, low, high, flags, key_sizes = nodes.T
        if (flags & (_SUB_DATABASE | _DUPLICATES)).any():
            raise BadInput(self.path, "it holds sub-databases or duplicate keys", "features lie in the main database")
        data = offsets + 8 + key_sizes
        sizes = low | high << 16
        big = (flags & _BIG) != 0
        if (data + np.where(big, 8, sizes) > len(page)).any():
            raise self._broken(f"an entry of page {number} reaches outside it")
        starts = number * self._page_size + data
        if big.any():
            own_pages = page[data[big, None] + np.arange(8)].copy().view(np.uint64)[:, 0]
            if (own_pages >= self._page_count).any():
                raise self._broken(f"page {number} points outside the file")
            starts[big] = own_pages.astype(np.int64) * self._page_size + _PAGE_HEADER
        if (starts + sizes > self._page_count * self._page_size).any():
            raise self._broken(f"a value of page {number} reaches outside the file")
        raw = page.tobytes()
        for offset, size in zip(offsets.tolist(), key_sizes.tolist(), strict=True):
            self.keys.append(raw[offset + 8 : offset + 8 + size])
        return starts, sizes
