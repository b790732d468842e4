"""store: a feature store of ours, to be kept in another type (`--dtype uint8` halves what is read and moved).

Features become what the new type can say of what the old one held; the global row stays what it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from pipelines.convert.source import Regions, Sizes, SourceImage
from pipelines.store.reader import FeatureStore


def images(source: Path, sizes: Sizes | None) -> Iterator[SourceImage]:
    """Every image of the store, each record tested against its checksum."""
    del sizes  # the store holds them
    store = FeatureStore(source)
    for row, key in enumerate(store):
        yield SourceImage(key, f"{source}: image {key}", row / len(store), partial(_regions, store, key))


def _regions(store: FeatureStore, key: str) -> Regions:
    record = store.record(key)
    return Regions(record.values(), record.boxes, record.width, record.height, record.class_probs, record.mean)
