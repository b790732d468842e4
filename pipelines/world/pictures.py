"""Image files and feature stores of a world: every scene rendered once, seen once by the extractor."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.extractor import FEATURE_DIM, Regions, extract, extract_boxes
from pipelines.store.writer import StoreWriter
from pipelines.world.files import coco_name, write_text
from pipelines.world.plan import Plan
from pipelines.world.rendering import jpeg, render
from pipelines.world.scenes import Scene
from pipelines.world.statements import nlvr2_images

Progress = Callable[[str, int, int], None]
"""Called with what is done, how much of it, of how much."""
_CHUNK = 40  # scenes a worker takes at a time
_ALONE = 600  # fewer scenes than this are not worth starting processes for


@dataclass(frozen=True)
class Picture:
    """A rendered scene."""

    width: int
    height: int
    file: bytes
    """JPEG."""
    detected: Regions
    annotated: Regions | None
    """The annotators' boxes, in the order of the scene's things; None where no data set asks for them."""


def draw_picture(scene: Scene, annotated: bool = False) -> Picture:
    """Render a scene, compress it, and let the extractor look at what a reader of the file would see."""
    file = jpeg(render(scene))
    pixels = np.asarray(Image.open(BytesIO(file)))
    boxes = np.array([thing.drawn_box for thing in scene.things], np.float32)
    return Picture(
        scene.width, scene.height, file, extract(pixels), extract_boxes(pixels, boxes) if annotated else None
    )


def draw_pictures(plan: Plan, progress: Progress) -> list[Picture]:
    """The pictures of all scenes, on all cores where it pays."""
    total = len(plan.scenes)
    pictures: list[Picture] = []
    for chunk in _chunks(plan):
        pictures += chunk
        progress("pictures", len(pictures), total)
    return pictures


def _chunks(plan: Plan) -> Iterator[list[Picture]]:
    pointed = {plan.sources[source][image] for _, data_set, source in _ANNOTATED for image in _images(plan, data_set)}
    jobs = [
        [(plan.scenes[n], n in pointed) for n in range(start, min(start + _CHUNK, len(plan.scenes)))]
        for start in range(0, len(plan.scenes), _CHUNK)
    ]
    workers = min(len(os.sched_getaffinity(0)), 8)
    if workers == 1 or len(plan.scenes) < _ALONE:
        yield from map(_draw_chunk, jobs)
        return
    # spawned, not forked: the caller may have threads (torch), which a fork would leave behind half-done
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_draw_chunk, jobs)


def _draw_chunk(chunk: list[tuple[Scene, bool]]) -> list[Picture]:
    return [draw_picture(scene, annotated) for scene, annotated in chunk]


_ANNOTATED = (("visual7w_boxes", "visual7w", "vg"), ("guesswhat_boxes", "guesswhat_pointing", "coco"))
"""Stores of annotated boxes: name, data set, source."""


def _images(plan: Plan, data_set: str) -> list[int]:
    return [image for split in plan.splits[data_set].values() for image in split]


def write_pictures(plan: Plan, folder: Path, progress: Progress) -> None:
    """`images/<source>/`, `features/<source>.lmdb`, the stores of annotated boxes, and Visual Genome's image data."""
    pictures = draw_pictures(plan, progress)
    sources: dict[str, Mapping[int, int] | dict[str, int]] = {**plan.sources, "nlvr2": nlvr2_images(plan)}
    for done, (source, images) in enumerate(sources.items()):
        files = ((_file_name(plan, source, image), pictures[n].file) for image, n in images.items())
        write_files(folder / "images" / source, files)
        _write_store(folder, source, ((image, pictures[n], pictures[n].detected) for image, n in images.items()))
        progress("stores", done + 1, len(sources) + len(_ANNOTATED))
    for done, (name, data_set, source) in enumerate(_ANNOTATED, start=len(sources)):
        of_images = [(image, pictures[plan.sources[source][image]]) for image in _images(plan, data_set)]
        records = ((image, picture, picture.annotated) for image, picture in of_images if picture.annotated)
        _write_store(folder, name, records)
        progress("stores", done + 1, len(sources) + len(_ANNOTATED))
    _write_image_data(plan, folder / "visual_genome" / "image_data.json", pictures)


def _file_name(plan: Plan, source: str, image: int | str) -> str:
    if source != "coco":
        return f"{image}.jpg"
    vqa = plan.splits["vqa"]
    return coco_name(int(image), "test2015" if image in vqa["test"] else "train2014")


def write_files(folder: Path, files: Iterable[tuple[str, bytes]]) -> None:
    """Name and content each."""
    folder.mkdir(parents=True)
    for name, content in files:
        (folder / name).write_bytes(content)


def _write_store(folder: Path, name: str, records: Iterable[tuple[int | str, Picture, Regions]]) -> None:
    path = folder / "features" / f"{name}.lmdb"
    with StoreWriter(path, FEATURE_DIM, dtype="float16", source="pipelines.extractor") as store:
        for image, picture, regions in records:
            store.add(image, regions.features, regions.boxes, picture.width, picture.height, regions.class_probs)


def _write_image_data(plan: Plan, path: Path, pictures: list[Picture]) -> None:
    """`image_data.json`: which Visual Genome pictures are COCO's."""
    records = [
        {"width": pictures[scene].width, "height": pictures[scene].height, "url": f"images/vg/{image}.jpg",
         "image_id": image, "coco_id": plan.coco_of_vg.get(image), "flickr_id": None}
        for image, scene in plan.sources["vg"].items()
    ]  # fmt: skip
    write_text(path, json.dumps(records) + "\n")
