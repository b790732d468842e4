"""GuessWhat games: yes/no questions until one thing of the picture is left, in the published JSON lines."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

from pipelines.world.expressions import annotation_id, xywh
from pipelines.world.files import coco_name, write_json_lines
from pipelines.world.language import ATTRIBUTES, Description, a, where, word
from pipelines.world.plan import Plan
from pipelines.world.scenes import SHAPES, Scene, Thing

Turn = tuple[str, bool]
_SUBJECTS = ("it", "it", "the object", "the thing")
_LONGEST = 7  # turns


def draw_dialogue(random: Random, scene: Scene, target: Thing) -> list[Turn] | None:
    """Questions and answers that leave only the target, or None if it would take too long.

    Over half of the questions guess an attribute that the target has, so that answers are yes about as often as no.
    Some go on when only one thing is left, to be sure, as people do.
    """
    left = list(scene.things)
    enough = random.choice((2, 3, 3, 4, 5))
    turns: list[Turn] = []
    asked: set[tuple[str, str]] = set()
    for _ in range(40):
        if len(left) == 1 and len(turns) >= enough:
            return turns
        thing = target if random.random() < 0.6 else random.choice(left)
        attribute = random.choice((*ATTRIBUTES, "colour", "shape", "place"))
        if attribute == "place" and not thing.places:
            continue
        value = random.choice(sorted(thing.places)) if attribute == "place" else getattr(thing, attribute)
        what = Description(**{attribute: value})
        if (attribute, value) in asked or any(what.fits(other) != what.may_fit(other) for other in left):
            continue
        asked.add((attribute, value))
        answer = what.fits(target)
        remaining = [other for other in left if what.fits(other) == answer]
        if 1 < len(remaining) == len(left):  # a question that tells nothing is not asked
            continue
        left = remaining
        turns.append((_question(random, attribute, value), answer))
        if len(turns) > _LONGEST:
            return None
    return None


def _question(random: Random, attribute: str, value: str) -> str:
    if attribute == "place":
        said = where(random, value)
    else:
        said = a(random, Description(shape=value)) if attribute == "shape" else word(random, value)
    return f"Is {random.choice(_SUBJECTS)} {said}?"


def write_guesswhat(plan: Plan, folder: Path) -> None:
    """`guesswhat.{train,valid,test}.jsonl`."""
    number = 0
    for split, name in (("train", "train"), ("val", "valid"), ("test", "test")):
        random = plan.random(f"guesswhat {split}")
        images = plan.splits["guesswhat_pointing"][split]
        games: list[dict[str, Any]] = []
        while len(games) < plan.examples("guesswhat_pointing", split):
            image = random.choice(images)
            scene = plan.scene("coco", image)
            target = random.randrange(len(scene.things))
            turns = draw_dialogue(random, scene, scene.things[target])
            if turns:
                games.append(_game(number, image, scene, target, turns))
                number += 1
        write_json_lines(folder / f"guesswhat.{name}.jsonl", games)


def _game(number: int, image: int, scene: Scene, target: int, turns: list[Turn]) -> dict[str, Any]:
    return {
        "id": number, "status": "success", "questioner_id": 0,
        "image": {"id": image, "file_name": coco_name(image), "width": scene.width, "height": scene.height},
        "object_id": annotation_id(image, target),
        "objects": [
            {"id": annotation_id(image, place), "bbox": xywh(thing), "category": thing.shape,
             "category_id": SHAPES.index(thing.shape) + 1, "area": round(xywh(thing)[2] * xywh(thing)[3], 2)}
            for place, thing in enumerate(scene.things)
        ],
        "qas": [
            {"id": 100 * number + turn, "question": question, "answer": "Yes" if answer else "No"}
            for turn, (question, answer) in enumerate(turns)
        ],
    }  # fmt: skip
