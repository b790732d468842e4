"""The world's WordPiece vocabulary: its words, and letters so that nothing else is unknown."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipelines.examples import Example
from pipelines.readers import (
    captions,
    conceptual_captions,
    gqa,
    guesswhat,
    nlvr2,
    refer,
    snli_ve,
    visual7w,
    visual_genome,
    vqa,
)
from pipelines.world.files import write_text

SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_READERS: dict[str, Callable[..., Iterator[Example]]] = {
    "vqa": vqa.read, "visual_genome_qa": visual_genome.read, "gqa": gqa.read, "coco_retrieval": captions.read,
    "flickr30k_retrieval": captions.read, "refcoco": refer.read, "refcoco_plus": refer.read, "refcocog": refer.read,
    "visual7w": visual7w.read, "guesswhat_pointing": guesswhat.read, "nlvr2": nlvr2.read, "snli_ve": snli_ve.read,
}  # fmt: skip


def write_vocabulary(folder: Path, sheet: dict[str, Any]) -> None:
    """`vocab.txt`, one entry a line, in the order of its ids: specials, characters, words by frequency.

    The words come from the training texts as the data sets' readers give them.
    """
    counts: Counter[str] = Counter()
    for name, read in _READERS.items():
        arguments = sheet["sets"][name]["train"]
        for example in read(**{key: _paths(key, value, folder) for key, value in arguments.items()}):
            counts.update(re.findall(r"[a-z]+", example.text.lower()))
    for example in conceptual_captions.read(captions=folder / "conceptual_captions" / "Train_GCC-training.tsv"):
        counts.update(re.findall(r"[a-z]+", example.text.lower()))
    write_text(folder / "vocab.txt", "".join(f"{entry}\n" for entry in entries(counts)))


def _paths(argument: str, value: Any, folder: Path) -> Any:
    if argument == "split":
        return value
    return [folder / name for name in value] if isinstance(value, list) else folder / value


def entries(counts: Counter[str]) -> list[str]:
    """The vocabulary's entries."""
    characters = string.ascii_lowercase + string.digits
    words = sorted((word for word in counts if len(word) > 1), key=lambda word: (-counts[word], word))
    return [*SPECIALS, *string.punctuation, *characters, *(f"##{character}" for character in characters), *words]
