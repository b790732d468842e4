"""How other code gets region features from disk into a batch: the authors' way, and UNITER's. For comparison only.

Both write stores of their own from the same images, so that the bytes read are the peers', not ours.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lmdb
import msgpack
import numpy as np
import torch
from torch import Tensor

from bench.pipeline_images import HEIGHT, WIDTH, Image

KEYS = 120_000
"""Entries of the list of ids that the authors search: as many as COCO has images."""

ROWS, WORDS = 101, 23
"""Region rows and text tokens that the authors pad VQA to."""

Padded = tuple[Tensor, ...]
"""float32 [B, rows, F] features, [B, rows, 5 or 7] locations, and the masks that go with them."""


class AuthorsReader:
    """The image side of the authors' samples. Spec section 5.1: a pickled dictionary of float32 arrays per image (no base64:
    that was an older form), looked up by linear search in the list of ids. Sections 3.1 and 7.2: the mean, the padding in
    float64, the conversion back, the image mask from a list and a co-attention mask of zeros, for every sample, in Python.
    The boxes in pixels too, which no data set uses (`vilbert/datasets/_image_features_reader.py` of their repository)."""

    first_row = 1

    def __init__(self, path: Path) -> None:
        self._env = lmdb.open(str(path), readonly=True, lock=False, readahead=False, meminit=False)
        with self._env.begin() as transaction:
            stored = sorted(key for key, _ in transaction.cursor())
        # The images lie spread over the list, as a batch's would.
        self._ids = [b"%d" % (400_000 + i) for i in range(KEYS)]
        for place, key in enumerate(stored):
            self._ids[place * KEYS // len(stored)] = key

    @staticmethod
    def write(path: Path, images: Iterable[Image]) -> None:
        with lmdb.open(str(path), map_size=1 << 40) as env:
            for image in images:
                record = {
                    "image_id": image.key, "image_h": HEIGHT, "image_w": WIDTH, "num_boxes": len(image.boxes),
                    "boxes": image.boxes, "features": image.features,
                }  # fmt: skip
                with env.begin(write=True) as transaction:
                    transaction.put(image.key.encode(), pickle.dumps(record))

    def batch(self, keys: list[str]) -> Padded:
        samples = [self._sample(key) for key in keys]
        return tuple(torch.stack(column) for column in zip(*samples, strict=True))

    def _sample(self, key: str) -> Padded:
        features, locations, _ = self._read(key)
        rows = len(features)
        padded = np.zeros((ROWS, features.shape[1]))
        padded_locations = np.zeros((ROWS, 5))
        padded[:rows], padded_locations[:rows] = features, locations
        mask = [1] * rows
        while len(mask) < ROWS:
            mask.append(0)
        co_attention_mask = torch.zeros((ROWS, WORDS))
        locations = torch.tensor(padded_locations).float()
        return torch.tensor(padded).float(), locations, torch.tensor(mask).long(), co_attention_mask

    def _read(self, key: str) -> tuple[Any, Any, Any]:
        self._ids.index(key.encode())
        with self._env.begin(write=False) as transaction:
            item = pickle.loads(transaction.get(key.encode()) or b"")  # noqa: S301  (written by this benchmark)
        features, boxes = item["features"].reshape(-1, 2048), item["boxes"].reshape(-1, 4)
        mean = np.sum(features, axis=0) / len(boxes)
        features = np.concatenate([np.expand_dims(mean, axis=0), features], axis=0)
        locations = np.zeros((len(boxes), 5), dtype=np.float32)
        locations[:, :4] = boxes
        area = (boxes[:, 3] - boxes[:, 1]) * (boxes[:, 2] - boxes[:, 0])
        width, height = int(item["image_w"]), int(item["image_h"])
        locations[:, 4] = area / (float(width) * float(height))
        pixels = copy.deepcopy(locations)
        for column, size in enumerate((width, height, width, height)):
            locations[:, column] = locations[:, column] / float(size)
        whole = np.expand_dims(np.array([0, 0, 1, 1, 1]), axis=0)
        whole_pixels = np.expand_dims(np.array([0, 0, width, height, width * height]), axis=0)
        locations = np.concatenate([whole, locations], axis=0)
        return features, locations, np.concatenate([whole_pixels, pixels], axis=0)


class UniterReader:
    """UNITER's way: msgpack with float16 arrays, turned into float32 tensors image by image, padded by copying."""

    first_row = 0

    def __init__(self, path: Path) -> None:
        self._env = lmdb.open(str(path), readonly=True, lock=False, readahead=False, create=False)
        self._transaction = self._env.begin(buffers=True)

    @staticmethod
    def write(path: Path, images: Iterable[Image]) -> None:
        scale = np.array([WIDTH, HEIGHT, WIDTH, HEIGHT], np.float32)
        with lmdb.open(str(path), map_size=1 << 40) as env:
            for image in images:
                boxes = image.boxes / scale
                sides = boxes[:, 2:] - boxes[:, :2]
                shares = np.concatenate([boxes, sides, sides.prod(1, keepdims=True)], 1).astype(np.float16)
                arrays = {"features": image.features.astype(np.float16), "norm_bb": shares}
                with env.begin(write=True) as transaction:
                    transaction.put(image.key.encode(), msgpack.packb({k: _packed(v) for k, v in arrays.items()}))

    def batch(self, keys: list[str]) -> Padded:
        images = [self._read(key) for key in keys]
        return _pad([features for features, _ in images]), _pad([places for _, places in images])

    def _read(self, key: str) -> tuple[Tensor, Tensor]:
        arrays = msgpack.loads(self._transaction.get(key.encode()), object_hook=_unpacked)
        features = torch.tensor(arrays["features"]).float()
        boxes = torch.tensor(arrays["norm_bb"]).float()[:, :6]
        return features, torch.cat([boxes, boxes[:, 4:5] * boxes[:, 5:]], dim=-1)


def _packed(array: Any) -> dict[str, Any]:
    return {"nd": True, "type": array.dtype.str, "shape": array.shape, "data": array.tobytes()}


def _unpacked(value: Any) -> Any:
    return np.frombuffer(value["data"], value["type"]).reshape(value["shape"]) if "nd" in value else value


def _pad(tensors: list[Tensor]) -> Tensor:
    longest = max(len(x) for x in tensors)
    padded = torch.zeros(len(tensors), longest, tensors[0].shape[1], dtype=tensors[0].dtype)
    for place, x in enumerate(tensors):
        padded[place, : len(x)] = x
    return padded
