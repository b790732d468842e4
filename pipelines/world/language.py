"""Descriptions of things: which things they fit, and how people word them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from random import Random
from typing import NamedTuple

from pipelines.world.scenes import COLOURS, PATTERNS, PLACES, SHAPES, SIZES, Scene, Thing

ATTRIBUTES = ("size", "pattern", "colour", "shape")
VALUES: dict[str, tuple[str, ...]] = {
    "size": SIZES, "pattern": PATTERNS, "colour": COLOURS, "shape": SHAPES, "place": PLACES
}  # fmt: skip

_SYNONYMS: dict[str, tuple[str, ...]] = {
    "small": ("small", "little"),
    "large": ("large", "big"),
    "dotted": ("dotted", "spotted"),
    "circle": ("circle", "disc"),
    "ring": ("ring", "hoop"),
    "cross": ("cross", "plus"),
}
_ANYTHING = ("object", "thing")
_BEFORE = {"left": ("left",), "right": ("right",), "top": ("top", "upper"), "bottom": ("bottom", "lower")}
_AFTER = {
    "left": ("on the left", "at the left"),
    "right": ("on the right", "at the right"),
    "top": ("at the top", "near the top"),
    "bottom": ("at the bottom", "near the bottom"),
}


class Description(NamedTuple):
    """What is said of a thing; None where nothing is said."""

    size: str | None = None
    pattern: str | None = None
    colour: str | None = None
    shape: str | None = None
    place: str | None = None

    def fits(self, thing: Thing) -> bool:
        """Everything said is clearly so."""
        return self._looks_like(thing) and (self.place is None or self.place in thing.places)

    def may_fit(self, thing: Thing) -> bool:
        """A person might take this thing for the one described: also where its place is in doubt."""
        return self._looks_like(thing) and (self.place is None or self.place in thing.near_places)

    def matches(self, scene: Scene) -> list[Thing]:
        """The things that fit."""
        return [thing for thing in scene.things if self.fits(thing)]

    def the(self, scene: Scene) -> Thing | None:
        """The one thing that fits, if there is one and nobody could take another for it."""
        possible = [thing for thing in scene.things if self.may_fit(thing)]
        return possible[0] if len(possible) == 1 and self.fits(possible[0]) else None

    def _looks_like(self, thing: Thing) -> bool:
        return (
            (self.shape is None or self.shape == thing.shape)
            and (self.colour is None or self.colour == thing.colour)
            and (self.size is None or self.size == thing.size)
            and (self.pattern is None or self.pattern == thing.pattern)
        )


_SUBSETS = {
    allowed: [subset for size in (1, 2, 3) for subset in combinations(allowed, size)]
    for allowed in (
        subset for size in range(1, 6) for subset in combinations((*ATTRIBUTES, "place"), size)
    )
}  # fmt: skip
_COST = {1: 1.0, 2: 1.4, 3: 2.4}
"""How much later a description of so many words is tried: short ones are preferred, not always taken."""


def describe(random: Random, thing: Thing, attributes: Sequence[str]) -> Description:
    """The named attributes of a thing. A place is one of its clear places."""
    said = {name: getattr(thing, name) for name in attributes if name != "place"}
    if "place" in attributes:
        said["place"] = random.choice(sorted(thing.places))
    return Description(**said)


def tell_apart(
    random: Random, scene: Scene, thing: Thing, allowed: tuple[str, ...], needed: tuple[str, ...] = ()
) -> Description | None:
    """A description, using up to three allowed attributes and all `needed` ones, that fits `thing` alone, or None."""
    if not thing.places:
        allowed = tuple(name for name in allowed if name != "place")
    subsets = [subset for subset in _SUBSETS.get(allowed, ()) if set(needed) <= set(subset)]
    for subset in sorted(subsets, key=lambda subset: _COST[len(subset)] * random.random()):
        description = describe(random, thing, subset)
        if description.the(scene) is thing:
            return description
    return None


def word(random: Random, value: str) -> str:
    """The value, or now and then a synonym."""
    return random.choice(_SYNONYMS[value]) if value in _SYNONYMS and random.random() < 0.6 else value


def adjectives(random: Random, description: Description) -> str:
    """Size, pattern and colour, in this order."""
    said = (description.size, description.pattern, description.colour)
    return " ".join(word(random, value) for value in said if value)


def noun_phrase(random: Random, description: Description, many: bool = False, place_first: bool = False) -> str:
    """Without article: "large striped star on the left"; `place_first`: "left large striped star"."""
    noun = word(random, description.shape) if description.shape else random.choice(_ANYTHING)
    phrase = f"{adjectives(random, description)} {plural(noun) if many else noun}".strip()
    if description.place is None:
        return phrase
    if place_first:
        return f"{random.choice(_BEFORE[description.place])} {phrase}"
    return f"{phrase} {where(random, description.place)}"


def the(random: Random, description: Description) -> str:
    """ "the large star"."""
    return f"the {noun_phrase(random, description)}"


def a(random: Random, description: Description) -> str:
    """ "a large star", "an orange ring"."""
    phrase = noun_phrase(random, description)
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def where(random: Random, place: str) -> str:
    """ "on the left"."""
    return random.choice(_AFTER[place])


def plural(noun: str) -> str:
    """Of the nouns used here."""
    return noun + ("es" if noun.endswith("s") else "s")


RELATIONS = {
    "left": ("to the left of", "left of"),
    "right": ("to the right of", "right of"),
    "above": ("above",),
    "below": ("below", "under"),
}
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
_CLEARLY = 22.0  # pixels between centres


def related(one: Thing, relation: str, other: Thing) -> bool | None:
    """Whether `one` is `relation` of `other`; None where one would hesitate."""
    distance = {"left": other.x - one.x, "right": one.x - other.x, "above": other.y - one.y, "below": one.y - other.y}
    if abs(distance[relation]) < _CLEARLY:
        return None
    return distance[relation] > 0


def relation_words(random: Random, relation: str) -> str:
    """ "to the left of"."""
    return random.choice(RELATIONS[relation])
