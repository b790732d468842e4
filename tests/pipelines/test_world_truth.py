"""What the embedded world's annotations say is so in its scenes, by another reading of the texts than the one that
wrote them."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest

from pipelines.examples import Choice, Example, Region, SoftAnswers
from pipelines.world.scenes import COLOURS, PATTERNS, SHAPES, SIZES, Scene, Thing
from tests.pipelines.small_world import examples, plan

SYNONYMS = {"little": "small", "big": "large", "spotted": "dotted", "disc": "circle", "hoop": "ring", "plus": "cross"}
PLACES = {"left": "left", "right": "right", "top": "top", "upper": "top", "bottom": "bottom", "lower": "bottom"}
MEANING = {value: value for value in (*SHAPES, *COLOURS, *SIZES, *PATTERNS)} | SYNONYMS
MEANING |= {form + ending: value for form, value in MEANING.items() for ending in ("s", "es")}
RELATIONS = r" (?:to the )?(?:left|right) of | above | below | under "


def words(text: str) -> list[str]:
    return [MEANING.get(word, word) for word in re.findall(r"[a-z]+", text.lower())]


def fitting(scene: Scene, text: str) -> list[Thing]:
    said = words(text)
    return [
        thing for thing in scene.things
        if all(word == thing.colour for word in said if word in COLOURS)
        and all(word == thing.shape for word in said if word in SHAPES)
        and all(word == thing.size for word in said if word in SIZES)
        and all(word == thing.pattern for word in said if word in PATTERNS)
        and all(PLACES[word] in thing.places for word in said if word in PLACES)
    ]  # fmt: skip


def scene_of(source: str, example: Example) -> Scene:
    return plan().scene(source, int(example.images[0]))


def best_answer(example: Example) -> str:
    target = example.target
    assert isinstance(target, SoftAnswers)
    return str(target.answers[int(np.argmax(target.scores))])


def test_counts_and_existence_are_true() -> None:
    checked: Counter[str] = Counter()
    for name, source in (("vqa", "coco"), ("visual_genome_qa", "vg"), ("gqa", "vg")):
        for example in examples(name, "train"):
            number = len(fitting(scene_of(source, example), example.text))
            if re.match(r"(how many|what number)", example.text.lower()):
                assert best_answer(example) == str(number), example
                checked["count"] += 1
            elif re.match(r"(is there an?|do you see|can you see|are there any) ", example.text.lower()):
                assert best_answer(example) == ("yes" if number else "no"), example
                checked["exists"] += 1
    assert checked["count"] > 100 and checked["exists"] > 150


def test_colours_asked_for_are_those_of_the_one_thing_meant() -> None:
    asked = [
        e for e in examples("visual_genome_qa", "train") if re.match(r"wh(at|ich) (is the )?color", e.text.lower())
    ]
    assert len(asked) > 200
    for example in asked:
        things = fitting(scene_of("vg", example), example.text)
        assert [thing.colour for thing in things] == [best_answer(example)], example


@pytest.mark.parametrize("name", ["refcoco", "refcoco_plus"])
def test_expressions_mean_one_thing(name: str) -> None:
    for example in examples(name, "train") + examples(name, "test"):
        things = fitting(scene_of("coco", example), example.text)
        assert len(things) == 1, example
        assert isinstance(example.target, Region)
        assert example.target.boxes[0] == pytest.approx(things[0].box, abs=1.6)
        assert name != "refcoco_plus" or not set(words(example.text)) & set(PLACES)
    places = [bool(set(words(example.text)) & set(PLACES)) for example in examples("refcoco", "train")]
    assert 0.4 < np.mean(places) < 0.9


def test_games_leave_one_thing() -> None:
    for example in examples("guesswhat_pointing", "train"):
        scene = scene_of("coco", example)
        left = list(scene.things)
        for question, answer in re.findall(r"start (.*?)\? answer (yes|no)", example.text.lower()):
            fit = fitting(scene, question)
            left = [thing for thing in left if (thing in fit) == (answer == "yes")]
        choice = example.target
        assert isinstance(choice, Choice) and len(choice.candidates) == len(scene.things)
        assert left == [scene.things[choice.choices[choice.answer]]], example


def test_pointing_has_one_right_option() -> None:
    for example in examples("visual7w", "train"):
        scene = scene_of("vg", example)
        choice = example.target
        assert isinstance(choice, Choice) and len(choice.choices) == 4
        options = [scene.things[row] for row in choice.choices]
        assert [thing for thing in fitting(scene, example.text) if thing in options] == [options[choice.answer]]


def test_captions_are_true_and_few_other_pictures_fit() -> None:
    others = [plan().scene("coco", image) for image in plan().splits["coco_retrieval"]["train"]]
    elsewhere = []
    for example in examples("coco_retrieval", "train"):
        parts = re.split(rf",| and |{RELATIONS}", example.text)
        assert all(fitting(scene_of("coco", example), part) for part in parts), example
        elsewhere.append(np.mean([all(fitting(scene, part) for part in parts) for scene in others[:40]]))
    assert np.mean(elsewhere) < 0.05


def test_phrases_name_their_boxes() -> None:
    for example in examples("flickr30k_grounding", "val"):
        target = example.target
        assert isinstance(target, Region)
        things = fitting(scene_of("flickr", example), example.text)
        assert sorted(target.boxes) == [
            pytest.approx(t.drawn_box, abs=0.51) for t in sorted(things, key=lambda t: tuple(map(round, t.drawn_box)))
        ]
