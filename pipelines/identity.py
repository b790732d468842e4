"""Which image is it? One rule for every feature format and every annotation file.

The same photo is `COCO_train2014_000000131486.jpg` in one file, `131486` in another and
`coco_train2014_000000131486.npz` in a third. Stores are keyed, examples point at images, and overlaps between data
sets are counted by the one key that all of these give.
"""

from __future__ import annotations

import re
from functools import lru_cache

from pipelines.errors import BadInput

_SUFFIX = re.compile(r"\.(?:jpe?g|png|gif|bmp|webp|tiff?|npz|npy|pt|pth)$", re.IGNORECASE)
_SOURCE = re.compile(r"^(?:(?:ms)?coco|vg|v7w|gqa|nlvr2|flickr30k)_|^(?:train|val|test)20[0-9]{2}_", re.IGNORECASE)
_INTEGER = re.compile(r"[0-9]+")
_COCO_REGION = re.compile(r"([0-9]{12})_[0-9]+")


@lru_cache(maxsize=1 << 20)
def image_key(name: str | int) -> str:
    """The key of an image in a feature store, from any published name of it. Idempotent.

    1. Folders and known suffixes (`.jpg`, `.npz`, `.jpg.npy`, `.pt`, …) go.
    2. A known source prefix goes: `coco_`, `vg_`, `v7w_`, `gqa_`, `nlvr2_`, `flickr30k_` in any case, and COCO's split
       (`train2014_`). Unknown prefixes stay: `scene_7` and `room_7` are two images.
    3. If only digits remain, leading zeros go. `COCO_train2014_000000131486`, `131486`, `v7w_131486.jpg` -> `131486`.
       REFER names a region after its image (`COCO_train2014_000000581857_16.jpg`): the image's number counts.
    4. Anything else stays whole: `n161313` (GQA), `dev-850-0-img0` (NLVR2).

    The integer is the identity within COCO and within Visual Genome; the two number ranges overlap, and a store holds
    images of one of them. Raises `BadInput` where no name remains.
    """
    stem = str(name).strip().rpartition("/")[2]
    stem = _strip_all(_SOURCE, _strip_all(_SUFFIX, stem))
    region = _COCO_REGION.fullmatch(stem)
    if region:
        stem = region.group(1)
    if _INTEGER.fullmatch(stem):
        return stem.lstrip("0") or "0"
    if not stem:
        raise BadInput(repr(name), "no image name in it", "expected something like COCO_train2014_000000131486.jpg")
    return stem


def _strip_all(pattern: re.Pattern[str], text: str) -> str:
    """Strip until nothing matches, so that a key of a key is the key itself."""
    while True:
        stripped = pattern.sub("", text, count=1)
        if stripped == text:
            return text
        text = stripped
