"""Captions: COCO and Flickr30k retrieval, Flickr30k Entities (the same captions, phrases linked to boxes) and
Conceptual Captions, in their published files.

A caption names two or three things by colour and shape and sometimes more, so few other pictures fit it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from pipelines.world.files import coco_name, write_json_lines, write_text
from pipelines.world.language import RELATIONS, a, describe, noun_phrase, related, relation_words
from pipelines.world.plan import Plan
from pipelines.world.scenes import Scene, Thing

CAPTIONS = 5
"""For every picture, as published."""
_OPENINGS = ("there is", "a picture of", "we see", "this image shows", "a scene with")


@dataclass(frozen=True)
class Phrase:
    """Words of a caption that mean certain things of the picture."""

    text: str
    things: tuple[Thing, ...]


Caption = list[str | Phrase]


def plain(caption: Caption) -> str:
    """The caption's text."""
    return _sentence(part if isinstance(part, str) else part.text for part in caption)


def draw_caption(random: Random, scene: Scene) -> Caption:
    """One caption of a scene. It does not name two things by the same words."""
    while True:
        caption = _try_caption(random, scene)
        named = [part.things for part in caption if isinstance(part, Phrase)]
        if len(set(named)) == len(named):
            return caption


def _try_caption(random: Random, scene: Scene) -> Caption:
    things = random.sample(scene.things, random.choice((2, 2, 3)))
    if len(things) == 2 and random.random() < 0.4:
        relations = [name for name in RELATIONS if related(things[0], name, things[1])]
        if relations:
            between = relation_words(random, random.choice(relations))
            return [_phrase(random, scene, things[0]), between, _phrase(random, scene, things[1])]
    caption: Caption = [random.choice(_OPENINGS)] if random.random() < 0.6 else []
    for place, thing in enumerate(things):
        if place:
            caption.append("and" if place == len(things) - 1 else ",")
        caption.append(_phrase(random, scene, thing))
    return caption


def _phrase(random: Random, scene: Scene, thing: Thing) -> Phrase:
    """ "a large red star": all things that it fits are meant."""
    more = [name for name in ("size", "pattern") if random.random() < 0.35]
    what = describe(random, thing, (*more, "colour", "shape"))
    return Phrase(a(random, what), tuple(what.matches(scene)))


def _sentence(parts: Iterable[str]) -> str:
    words = " ".join(parts).replace(" ,", ",")
    return f"{words[0].upper()}{words[1:]}."


def write_coco(plan: Plan, folder: Path) -> None:
    """`all_data_final_{train,val,test_set0}_2014.jsonline`: one line a picture."""
    for split, name in (("train", "train"), ("val", "val"), ("test", "test_set0")):
        random = plan.random(f"coco captions {split}")
        write_json_lines(folder / f"all_data_final_{name}_2014.jsonline", (
            {
                "id": image, "img_path": coco_name(image),
                "sentences": [plain(draw_caption(random, plan.scene("coco", image))) for _ in range(CAPTIONS)],
            }
            for image in plan.splits["coco_retrieval"][split]
        ))  # fmt: skip


def write_flickr(plan: Plan, folder: Path, entities: Path) -> None:
    """`all_data_final_*_2014.jsonline`, and for the same captions `Sentences/`, `Annotations/` and the split lists."""
    for split, name in (("train", "train"), ("val", "val"), ("test", "test")):
        random = plan.random(f"flickr captions {split}")
        records = []
        images = plan.splits["flickr30k_retrieval"][split]
        for image in images:
            scene = plan.scene("flickr", image)
            captions = [draw_caption(random, scene) for _ in range(CAPTIONS)]
            texts = [plain(caption) for caption in captions]
            records.append({"id": str(image), "img_path": f"{image}.jpg", "sentences": texts})
            _write_entities(scene, image, captions, entities)
        write_json_lines(folder / f"all_data_final_{name}_2014.jsonline", records)
        write_text(entities / f"{split}.txt", "".join(f"{image}\n" for image in images))


def _write_entities(scene: Scene, image: int, captions: list[Caption], folder: Path) -> None:
    """Things that a phrase means are one entity; its id is the image's own, from 1."""
    entity: dict[tuple[Thing, ...], int] = {}
    lines = []
    for caption in captions:
        marked: list[str] = []
        for part in caption:
            if isinstance(part, str):
                marked.append(part)
                continue
            number = entity.setdefault(part.things, len(entity) + 1)
            marked.append(f"[/EN#{number}/other {part.text}]")
        lines.append(" ".join(marked).replace(" ,", ",") + ".\n")
    write_text(folder / "Sentences" / f"{image}.txt", "".join(lines))
    objects = "".join(_object(number, thing) for things, number in entity.items() for thing in things)
    write_text(folder / "Annotations" / f"{image}.xml", (
        f"<annotation>\n<filename>{image}.jpg</filename>\n<size><width>{scene.width}</width>"
        f"<height>{scene.height}</height><depth>3</depth></size>\n{objects}</annotation>\n"
    ))  # fmt: skip


def _object(number: int, thing: Thing) -> str:
    """Whole pixels, counted from 1."""
    x1, y1, x2, y2 = (round(side) + 1 for side in thing.drawn_box)
    box = f"<xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax>"
    return f"<object><name>{number}</name><bndbox>{box}</bndbox></object>\n"


def write_conceptual_captions(plan: Plan, folder: Path) -> None:
    """The TSV of caption and address; the images are named by the line's number, from 0."""
    for split, name in (("train", "Train_GCC-training"), ("val", "Validation_GCC-1.1.0-Validation")):
        random = plan.random(f"conceptual captions {split}")
        scenes = [plan.scene(f"cc_{split}", line) for line in range(len(plan.sources[f"cc_{split}"]))]
        text = "".join(
            f"{_alt_text(random, scene)}\thttps://images.invalid/{split}/{line}.jpg\n"
            for line, scene in enumerate(scenes)
        )
        write_text(folder / f"{name}.tsv", text)


def _alt_text(random: Random, scene: Scene) -> str:
    """The style of alt texts: lower case, no full stop, sometimes no article."""
    if random.random() < 0.5:
        return plain(draw_caption(random, scene)).lower().removesuffix(".")
    things = random.sample(scene.things, 2)
    return " and ".join(noun_phrase(random, describe(random, thing, ("size", "colour", "shape"))) for thing in things)
