"""Claims: what can be asked or stated of a scene, with its truth. One claim serves questions and statements alike.

Yes/no questions, NLVR2 statements and SNLI-VE hypotheses are balanced by asking the very same claim of pictures where
it holds and of pictures where it does not, so that the text alone tells nothing (as VQA v2's complementary pairs do).
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Protocol

from pipelines.world.language import (
    ATTRIBUTES,
    RELATIONS,
    VALUES,
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
from pipelines.world.scenes import Scene, Thing

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class Claim(Protocol):
    """Something that is so in a scene, or not."""

    def holds(self, scene: Scene) -> bool | None:
        """None where the claim presupposes what the scene lacks, or where one would hesitate."""

    def question(self, random: Random) -> str:
        """Worded as a yes/no question."""

    def statement(self, random: Random) -> str:
        """Worded as a statement."""


@dataclass(frozen=True)
class Exists:
    """There is a thing like this."""

    what: Description

    def holds(self, scene: Scene) -> bool | None:
        return bool(self.what.matches(scene))

    def question(self, random: Random) -> str:
        if random.random() < 0.3:
            return f"are there any {noun_phrase(random, self.what, many=True)}?"
        return f"{random.choice(('is there', 'do you see', 'can you see'))} {a(random, self.what)}?"

    def statement(self, random: Random) -> str:
        return f"there is {a(random, self.what)}"


@dataclass(frozen=True)
class Is:
    """The thing described has this attribute."""

    what: Description
    attribute: str
    value: str

    def holds(self, scene: Scene) -> bool | None:
        thing = self.what.the(scene)
        if thing is None:
            return None
        if self.attribute != "place":
            return bool(getattr(thing, self.attribute) == self.value)
        return True if self.value in thing.places else None if self.value in thing.near_places else False

    def question(self, random: Random) -> str:
        return f"is {the(random, self.what)} {self._said(random)}?"

    def statement(self, random: Random) -> str:
        return f"{the(random, self.what)} is {self._said(random)}"

    def _said(self, random: Random) -> str:
        if self.attribute == "place":
            return where(random, self.value)
        if self.attribute == "shape":
            return a(random, Description(shape=self.value))
        return word(random, self.value)


@dataclass(frozen=True)
class Related:
    """One thing is left of, right of, above or below another."""

    one: Description
    relation: str
    other: Description

    def holds(self, scene: Scene) -> bool | None:
        one, other = self.one.the(scene), self.other.the(scene)
        if one is None or other is None or one is other:
            return None
        return related(one, self.relation, other)

    def question(self, random: Random) -> str:
        return f"is {the(random, self.one)} {relation_words(random, self.relation)} {the(random, self.other)}?"

    def statement(self, random: Random) -> str:
        return f"{the(random, self.one)} is {relation_words(random, self.relation)} {the(random, self.other)}"


@dataclass(frozen=True)
class Both:
    """Two kinds of things are there (`either`: at least one of them)."""

    one: Description
    other: Description
    either: bool

    def holds(self, scene: Scene) -> bool | None:
        found = (bool(self.one.matches(scene)), bool(self.other.matches(scene)))
        return any(found) if self.either else all(found)

    def question(self, random: Random) -> str:
        return f"is there {self._said(random)}?"

    def statement(self, random: Random) -> str:
        return f"there is {self._said(random)}"

    def _said(self, random: Random) -> str:
        if self.either:
            return f"either {a(random, self.one)} or {a(random, self.other)}"
        return f"both {a(random, self.one)} and {a(random, self.other)}"


@dataclass(frozen=True)
class Same:
    """Two things share an attribute."""

    one: Description
    other: Description
    attribute: str

    def holds(self, scene: Scene) -> bool | None:
        one, other = self.one.the(scene), self.other.the(scene)
        if one is None or other is None or one is other:
            return None
        return bool(getattr(one, self.attribute) == getattr(other, self.attribute))

    def question(self, random: Random) -> str:
        name = self._name
        if random.random() < 0.5:
            return f"is {the(random, self.one)} the same {name} as {the(random, self.other)}?"
        return f"do {the(random, self.one)} and {the(random, self.other)} have the same {name}?"

    def statement(self, random: Random) -> str:
        return f"{the(random, self.one)} has the same {self._name} as {the(random, self.other)}"

    @property
    def _name(self) -> str:
        return "color" if self.attribute == "colour" else self.attribute


@dataclass(frozen=True)
class Count:
    """There are exactly so many."""

    what: Description
    number: int

    def holds(self, scene: Scene) -> bool | None:
        return len(self.what.matches(scene)) == self.number

    def question(self, random: Random) -> str:
        return f"are there exactly {self._said(random)}?"

    def statement(self, random: Random) -> str:
        return f"there {'is' if self.number == 1 else 'are'} exactly {self._said(random)}"

    def _said(self, random: Random) -> str:
        return f"{NUMBERS[self.number]} {noun_phrase(random, self.what, many=self.number != 1)}"


@dataclass(frozen=True)
class More:
    """There are more of these than of those."""

    these: Description
    those: Description

    def holds(self, scene: Scene) -> bool | None:
        difference = len(self.these.matches(scene)) - len(self.those.matches(scene))
        return None if difference == 0 else difference > 0

    def question(self, random: Random) -> str:
        return f"are there {self._said(random)}?"

    def statement(self, random: Random) -> str:
        return f"there are {self._said(random)}"

    def _said(self, random: Random) -> str:
        these, those = (noun_phrase(random, kind, many=True) for kind in (self.these, self.those))
        return f"more {these} than {those}"


def kind_of(random: Random, thing: Thing, least: int = 1, most: int = 2) -> Description:
    """A description by looks that fits this thing, and maybe others: colour or shape, maybe more."""
    main = random.choice((("colour",), ("shape",), ("colour", "shape"), ("colour", "shape")))
    main = ("colour", "shape") if least > 1 else main
    more = [name for name in ("size", "pattern") if random.random() < 0.3]
    return describe(random, thing, (*main, *more)[:most])


def draw_claim(random: Random, scene: Scene, kind: str) -> Claim | None:
    """A claim of this kind about things like those in the scene (true or false there), or None if none came up.

    Kinds: exists, is, related, both, either, same, count, more.
    """
    one, other = random.sample(scene.things, 2)
    if kind == "exists":
        return Exists(kind_of(random, one, least=2, most=3))
    if kind == "is":
        return _draw_is(random, scene, one)
    if kind in ("related", "same"):
        first, second = (tell_apart(random, scene, thing, ("colour", "shape")) for thing in (one, other))
        if first is None or second is None:
            return None
        if kind == "related":
            return Related(first, random.choice(tuple(RELATIONS)), second)
        open_names = [name for name in ATTRIBUTES if getattr(first, name) is None and getattr(second, name) is None]
        return Same(first, second, random.choice(open_names)) if open_names else None
    if kind in ("both", "either"):
        first, second = kind_of(random, one, least=2), kind_of(random, other, least=2)
        return Both(first, second, kind == "either") if first != second else None
    name = random.choice(("colour", "shape"))
    if kind == "count":
        return Count(describe(random, one, (name,)), random.choice((1, 2, 3)))
    these, those = describe(random, one, (name,)), describe(random, other, (name,))
    return More(these, those) if these != those else None


def _draw_is(random: Random, scene: Scene, thing: Thing) -> Claim | None:
    attribute = random.choice((*ATTRIBUTES, "colour", "place"))
    allowed = tuple(name for name in ATTRIBUTES if name != attribute)
    what = tell_apart(random, scene, thing, allowed)
    return Is(what, attribute, random.choice(VALUES[attribute])) if what else None


def complementary(random: Random, claim: Claim, scenes: list[Scene], wanted: bool, tries: int = 60) -> Scene | None:
    """A random one of the scenes in which the claim is `wanted`."""
    for _ in range(tries):
        scene = random.choice(scenes)
        if claim.holds(scene) is wanted:
            return scene
    return None
