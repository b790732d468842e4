"""The small data sets and one for pretraining, over stores of every type: what batches can be made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import yaml

from pipelines.datasets import DataSpec, load_task
from pipelines.loader import TrainingSource
from pipelines.masking import Masking
from pipelines.sampler import Sampler
from pipelines.sheet import load_sheet
from pipelines.store.reader import FeatureStore
from pipelines.store.writer import StoreWriter
from pipelines.wordpiece import WordPiece
from tests.pipelines import small

CLASSES, BATCH, STEPS = 5, 16, 3
PRETRAINING = DataSpec("pretraining", "tests.pipelines.small:read", 13, 9, 8, 1, "masked")
SPECS = {**small.SPECS, PRETRAINING.name: PRETRAINING}


def build(folder: Path, detected: str, annotated: str) -> Path:
    """A sheet of all `SPECS`, with class distributions, its stores of these types."""
    sheet = small.build(folder)
    for name, dtype in (("detected", detected), ("annotated", annotated)):
        _copy_store(folder / f"{name}.lmdb", folder / f"{name}-copy.lmdb", dtype)
    content = yaml.safe_load(sheet.read_text().replace(".lmdb", "-copy.lmdb"))
    content["sets"][PRETRAINING.name] = content["sets"]["captions"]
    sheet.write_text(yaml.safe_dump(content))
    return sheet


def _copy_store(source: Path, target: Path, dtype: str) -> None:
    store, random = FeatureStore(source), np.random.default_rng(0)
    with StoreWriter(target, small.FEATURES, dtype) as writer:
        for key in store:
            record = store.record(key)
            probs = random.dirichlet(np.ones(CLASSES), len(record.boxes))
            features = np.abs(record.features.astype(np.float32))  # bytes have no sign
            writer.add(key, features, record.boxes, record.width, record.height, probs)


def sources(sheet: Path, **options: Any) -> dict[str, TrainingSource]:
    """A training source of each data set; `options` as `TrainingSource` takes them."""
    found = {}
    for name, spec in SPECS.items():
        loaded = load_sheet(sheet)
        data = load_task(spec, loaded, "train", WordPiece.load(loaded.vocabulary))
        masked = {"masking": Masking(mask_token=4, vocabulary=15), "grid": None} if spec.target == "masked" else {}
        token = None if spec.target == "masked" else spec.number
        found[name] = TrainingSource(data, Sampler(len(data), BATCH, 5, spec.number), token, **{**options, **masked})
    return found
