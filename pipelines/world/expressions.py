"""Expressions that refer to one thing: RefCOCO, RefCOCO+, RefCOCOg (REFER's files) and Visual7W's pointing questions.

RefCOCO may say where a thing is; RefCOCO+ may not; RefCOCOg uses whole phrases, some of them relations.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from pipelines.world.files import coco_name, write_json
from pipelines.world.language import (
    ATTRIBUTES,
    RELATIONS,
    Description,
    a,
    describe,
    noun_phrase,
    related,
    relation_words,
    tell_apart,
    the,
    where,
    word,
)
from pipelines.world.plan import Plan
from pipelines.world.scenes import SHAPES, Scene, Thing

Wording = Callable[[Random, Scene, Thing], str | None]


def with_place(random: Random, scene: Scene, thing: Thing) -> str | None:
    """RefCOCO: "left red star", "big circle at the top"."""
    needed = ("place",) if random.random() < 0.6 else ()
    what = tell_apart(random, scene, thing, ("size", "colour", "shape", "place"), needed)
    return noun_phrase(random, what, place_first=random.random() < 0.6) if what else None


def by_looks(random: Random, scene: Scene, thing: Thing) -> str | None:
    """RefCOCO+: "small striped star"."""
    what = tell_apart(random, scene, thing, ATTRIBUTES)
    return noun_phrase(random, what) if what else None


def in_full(random: Random, scene: Scene, thing: Thing) -> str | None:
    """RefCOCOg: "the star that is large and red", "the star which is to the left of the blue circle"."""
    style = random.random()
    if style < 0.35:
        return _by_relation(random, scene, thing)
    what = tell_apart(random, scene, thing, (*ATTRIBUTES, "place"))
    if what is None:
        return None
    if style < 0.6 and what.place:
        noun = noun_phrase(random, what._replace(place=None))
        return f"the {noun} that is {where(random, what.place)} of the picture"
    said = [name for name in ("size", "pattern", "colour") if getattr(what, name)]
    if what.shape and said and not what.place:
        looks = " and ".join(word(random, getattr(what, name)) for name in said)
        return f"the {noun_phrase(random, Description(shape=what.shape))} {random.choice(('that', 'which'))} is {looks}"
    return the(random, what)


def _by_relation(random: Random, scene: Scene, thing: Thing) -> str | None:
    """A kind of which there may be more, told apart by its relation to another thing."""
    anchor = random.choice([other for other in scene.things if other is not thing])
    by_anchor = tell_apart(random, scene, anchor, ("colour", "shape"))
    what = describe(random, thing, random.choice((("shape",), ("colour", "shape"))))
    relations = [name for name in RELATIONS if related(thing, name, anchor)]
    if by_anchor is None or not relations:
        return None
    relation = random.choice(relations)
    others = [other for other in what.matches(scene) if other is not thing and other is not anchor]
    if any(related(other, relation, anchor) is not False for other in others):
        return None
    link = random.choice(("", "that is ", "which is "))
    return f"{the(random, what)} {link}{relation_words(random, relation)} {the(random, by_anchor)}"


STYLES: dict[str, tuple[Wording, int, str, tuple[str, ...]]] = {
    "refcoco": (with_place, 3, "unc", ("train", "val", "testA", "testB")),
    "refcoco_plus": (by_looks, 3, "unc", ("train", "val", "testA", "testB")),
    "refcocog": (in_full, 2, "umd", ("train", "val", "test")),
}
"""Data set -> wording, sentences a referent, who split it, splits."""


def write_refer(plan: Plan, data_set: str, folder: Path) -> None:
    """`refs(<who>).json`, the list that the published pickle holds, and `instances.json`."""
    wording, sentences, who, splits = STYLES[data_set]
    refs: list[dict[str, Any]] = []
    for split in splits:
        random = plan.random(f"{data_set} {split}")
        images = plan.splits[data_set][split]
        places = [(image, number) for image in images for number in range(len(plan.scene("coco", image).things))]
        random.shuffle(places)
        wanted = len(refs) + plan.examples(data_set, split)
        for image, number in places:
            if len(refs) == wanted:
                break
            texts = _texts(random, plan.scene("coco", image), number, wording, sentences)
            if texts:
                refs.append(_ref(len(refs), image, number, plan.scene("coco", image), split, texts))
    write_json(folder / f"refs({who}).json", refs)
    images = sorted({image for of_split in plan.splits[data_set].values() for image in of_split})
    write_json(folder / "instances.json", instances(plan, images))


def _texts(random: Random, scene: Scene, number: int, wording: Wording, count: int) -> list[str]:
    drawn = [wording(random, scene, scene.things[number]) for _ in range(4 * count)]
    different = list(dict.fromkeys(text for text in drawn if text))
    return different[:count] if len(different) >= count else []


def _ref(number: int, image: int, thing: int, scene: Scene, split: str, texts: list[str]) -> dict[str, Any]:
    ids = [3 * number + place for place in range(len(texts))]
    return {
        "sent_ids": ids, "file_name": coco_name(image).replace(".jpg", f"_{thing}.jpg"),
        "ann_id": annotation_id(image, thing), "ref_id": number, "image_id": image, "split": split,
        "sentences": [
            {"tokens": text.split(), "raw": text, "sent_id": sentence, "sent": text}
            for sentence, text in zip(ids, texts, strict=True)
        ],
        "category_id": SHAPES.index(scene.things[thing].shape) + 1,
    }  # fmt: skip


def annotation_id(image: int, thing: int) -> int:
    """The id of a thing's box, in ascending order of the scene's things."""
    return image * 100 + thing


def xywh(thing: Thing) -> list[float]:
    """The annotator's box in COCO's form."""
    x1, y1, x2, y2 = thing.drawn_box
    return [x1, y1, round(x2 - x1, 2), round(y2 - y1, 2)]


def instances(plan: Plan, images: list[int]) -> dict[str, Any]:
    """COCO's instances file for these pictures."""
    annotations = []
    for image in images:
        for number, thing in enumerate(plan.scene("coco", image).things):
            box = xywh(thing)
            annotations.append({
                "id": annotation_id(image, number), "image_id": image, "category_id": SHAPES.index(thing.shape) + 1,
                "bbox": box, "area": round(box[2] * box[3], 2), "iscrowd": 0,
            })  # fmt: skip
    return {
        "info": {"description": "stopgo world"},
        "images": [
            {"id": image, "file_name": coco_name(image), "width": plan.scene("coco", image).width,
             "height": plan.scene("coco", image).height}
            for image in images
        ],
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for number, name in enumerate(SHAPES, start=1)],
    }  # fmt: skip


def write_visual7w(plan: Plan, folder: Path) -> None:
    """`dataset_v7w_pointing.json`: "Which star is red?", four boxes to choose from."""
    images: list[dict[str, Any]] = []
    boxes: list[dict[str, Any]] = []
    number = 0
    for split in ("train", "val", "test"):
        random = plan.random(f"visual7w {split}")
        asked: dict[int, dict[str, dict[str, Any]]] = {image: {} for image in plan.splits["visual7w"][split]}
        wanted = number + plan.examples("visual7w", split)
        for _ in range(20 * plan.examples("visual7w", split)):
            if number == wanted:
                break
            image = random.choice(plan.splits["visual7w"][split])
            qa = _which(random, plan.scene("vg", image), image)
            if qa and qa["question"] not in asked[image]:
                asked[image][qa["question"]] = {"qa_id": number, "image_id": image, **qa}
                number += 1
        for image, of_image in asked.items():
            qa_pairs = list(of_image.values())
            images.append({"image_id": image, "filename": f"v7w_{image}.jpg", "split": split, "qa_pairs": qa_pairs})
            for place, thing in enumerate(plan.scene("vg", image).things):
                x, y, width, height = xywh(thing)
                boxes.append({"box_id": annotation_id(image, place), "image_id": image, "name": thing.shape,
                              "x": x, "y": y, "width": width, "height": height})  # fmt: skip
    write_json(folder / "dataset_v7w_pointing.json", {"dataset": "visual7w-pointing", "images": images, "boxes": boxes})


def _which(random: Random, scene: Scene, image: int) -> dict[str, Any] | None:
    """A question about one thing, three others as wrong options: those most like it first."""
    number = random.randrange(len(scene.things))
    thing = scene.things[number]
    what = tell_apart(random, scene, thing, (*ATTRIBUTES, "place"))
    if what is None:
        return None
    others = [place for place in range(len(scene.things)) if place != number]
    random.shuffle(others)
    others.sort(key=lambda place: -_alike(scene.things[place], thing) - random.random())
    return {
        "question": _which_question(random, what), "type": "which", "answer": annotation_id(image, number),
        "multiple_choices": [annotation_id(image, place) for place in others[:3]],
    }  # fmt: skip


def _which_question(random: Random, what: Description) -> str:
    """One attribute is asked for, the others stand with the noun."""
    asked = random.choice([name for name, value in what._asdict().items() if value])
    subject = noun_phrase(random, what._replace(**{asked: None}))
    value = getattr(what, asked)
    if asked == "shape":
        said = a(random, Description(shape=value))
    else:
        said = where(random, value) if asked == "place" else word(random, value)
    return f"Which {subject} is {said}?"


def _alike(one: Thing, other: Thing) -> int:
    return sum(getattr(one, name) == getattr(other, name) for name in ATTRIBUTES)
