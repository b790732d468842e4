"""Small data sets of every target kind, made up in memory, over real stores on disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from pipelines.datasets import DataSpec, TaskData, load_task
from pipelines.examples import Choice, Example, Label, Matching, Region, SoftAnswers, Target
from pipelines.sheet import load_sheet
from pipelines.store.writer import StoreWriter
from pipelines.wordpiece import WordPiece

WIDTH, HEIGHT, FEATURES = 120, 90, 8
WORDS = ["red", "blue", "big", "small", "ring", "star", "left", "right", "what", "is"]
ANSWERS = ["yes", "no", "2", "red"]
IMAGES = [f"{number}" for number in range(1, 13)]
EXAMPLES: dict[str, list[Example]] = {}

Random = np.random.Generator
Boxes = dict[str, NDArray[np.float32]]

SPECS = {
    "answers": DataSpec("answers", "tests.pipelines.small:read", 1, 9, 8, 1, "soft_labels"),
    "captions": DataSpec("captions", "tests.pipelines.small:read", 7, 9, 8, 1, "options", 4),
    "phrases": DataSpec("phrases", "tests.pipelines.small:read", 9, 9, 8, 1, "regions"),
    "pointing": DataSpec("pointing", "tests.pipelines.small:read", 4, 9, 10, 1, "choices"),
    "pairs": DataSpec("pairs", "tests.pipelines.small:read", 12, 9, 8, 2, "classes"),
}


def read(*, examples: str) -> Iterator[Example]:
    """The reader of these data sets: what the test has put under this name."""
    yield from EXAMPLES[examples]


def target(name: str, index: int) -> Any:
    """What example `index` of data set `name` asks for."""
    return EXAMPLES[name][index].target


def random_boxes(random: Random, n: int) -> NDArray[np.float32]:
    corners = random.uniform(0, 0.6, (n, 2)) * (WIDTH, HEIGHT)
    sizes = random.uniform(0.1, 0.39, (n, 2)) * (WIDTH, HEIGHT)
    return np.concatenate([corners, corners + sizes], axis=1).astype(np.float32)


def write_store(path: Path, boxes: Boxes, seed: int = 0, dtype: str = "float32") -> None:
    random = np.random.default_rng(seed)
    with StoreWriter(path, FEATURES, dtype=dtype) as writer:
        for image, image_boxes in boxes.items():
            features = random.standard_normal((len(image_boxes), FEATURES)).astype(np.float32)
            writer.add(image, features, image_boxes, WIDTH, HEIGHT)


def build(folder: Path, examples: int = 40, seed: int = 0) -> Path:
    """A sheet with all five data sets, its stores and its vocabulary; returns the sheet's path."""
    random = np.random.default_rng(seed)
    detected = {image: random_boxes(random, int(random.integers(3, 10))) for image in IMAGES}
    annotated = {image: random_boxes(random, int(random.integers(3, 6))) for image in IMAGES}
    write_store(folder / "detected.lmdb", detected)
    write_store(folder / "annotated.lmdb", annotated, seed=1)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
    (folder / "answers.json").write_text(str(ANSWERS).replace("'", '"'))
    for name, spec in SPECS.items():
        EXAMPLES[name] = [_example(random, spec, number, detected, annotated) for number in range(examples)]
    sets = {name: _entry(name) for name in SPECS}
    sheet = folder / "sheet.yaml"
    sheet.write_text(yaml.safe_dump({"format": 1, "vocabulary": "vocab.txt", "sets": sets}))
    return sheet


def _entry(name: str) -> dict[str, object]:
    entry: dict[str, object] = {"features": "detected.lmdb", "train": {"examples": name}, "val": {"examples": name}}
    if name == "answers":
        entry["answers"] = "answers.json"
    if name == "pointing":
        entry["candidates"] = "annotated.lmdb"
    return entry


def _example(random: Random, spec: DataSpec, number: int, detected: Boxes, annotated: Boxes) -> Example:
    images = tuple(str(image) for image in random.choice(IMAGES, spec.images, replace=False))
    text = " ".join(random.choice(WORDS, random.integers(1, 12)))
    return Example(
        f"{spec.name}-{number}",
        text,
        images,
        _target(random, spec, images[0], detected, annotated),
        group="odd" if number % 2 else "even",
    )


def _target(random: Random, spec: DataSpec, image: str, detected: Boxes, annotated: Boxes) -> Target:
    if spec.target == "soft_labels":
        chosen = random.choice([*ANSWERS, "unheard of"], random.integers(0, 4), replace=False)
        return SoftAnswers(tuple(str(answer) for answer in chosen), tuple(0.3 * (i + 1) for i in range(len(chosen))))
    if spec.target == "options":
        return Matching()
    if spec.target == "regions":
        near, far = detected[image][: random.integers(1, 3)] + random.uniform(-4, 4), random_boxes(random, 1)
        boxes = far if random.random() < 0.3 else near
        return Region(tuple(map(tuple, boxes.tolist())))
    if spec.target == "choices":
        choices = random.permutation(len(annotated[image]))[:3]
        return Choice(tuple(map(tuple, annotated[image].tolist())), tuple(sorted(choices.tolist())), 1)
    return Label(int(random.integers(-1, 2)))


def load(sheet: Path, name: str, split: str = "train", **options: object) -> TaskData:
    loaded = load_sheet(sheet)
    return load_task(SPECS[name], loaded, split, WordPiece.load(loaded.vocabulary), **options)  # type: ignore[arg-type]
