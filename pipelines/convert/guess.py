"""Which FORMAT a source looks like: a hint for whoever named another."""

from __future__ import annotations

from pathlib import Path

from pipelines.convert.source import LMDB_FILES, find_files
from pipelines.errors import BadInput
from pipelines.store.lmdb_file import LmdbFile
from pipelines.store.metadata import METADATA_KEY

_BY_NAME = {"butd-tsv": "*.tsv", "vinvl-pt": "*.pt", "npz": "*.npz"}
_LISTS = (b"keys", b"__keys__")


def guess(source: Path) -> str | None:
    """By the names of its files, or by the first bytes of an LMDB's first image; None where they tell nothing."""
    named = [name for name, pattern in _BY_NAME.items() if source.match(pattern)]
    named += [name for name, pattern in _BY_NAME.items() if source.is_dir() and next(source.rglob(pattern), None)]
    if named:
        return named[0]
    try:
        file = LmdbFile(find_files(source, LMDB_FILES)[0])
        images = [place for place, key in enumerate(file.keys) if key not in (*_LISTS, METADATA_KEY)]
        return "store" if METADATA_KEY in file.keys else _of_value(bytes(file.value(images[0])[:4]))
    except (BadInput, OSError, IndexError):
        return None


def _of_value(head: bytes) -> str | None:
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):  # a pickle's mark and its protocol
        return "vilbert-lmdb"
    of_map = head[:1] and (0x81 <= head[0] <= 0x8F or head[0] in (0xDE, 0xDF))
    return "uniter-lmdb" if of_map or head == b"PK\x03\x04" else None
