"""The images that annotations name, for what looks at no feature."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


class NamedImages:
    """Stands in for a feature store where only keys are asked for: rows in the order of the keys' bytes, as in a store."""

    def __init__(self, path: Path, keys: Iterable[str]) -> None:
        """`path`: where they are named, for messages."""
        self.path = path
        self._keys = tuple(sorted(set(keys), key=str.encode))
        self._rows = {key: row for row, key in enumerate(self._keys)}

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key: object) -> bool:
        return key in self._rows

    def keys(self) -> tuple[str, ...]:
        """Image keys; position = row."""
        return self._keys

    def index(self, keys: Iterable[str]) -> NDArray[np.int64]:
        """Rows of these images, int64 [n]."""
        return np.fromiter((self._rows[key] for key in keys), np.int64)
