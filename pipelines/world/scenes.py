"""Scenes: what is in a picture. A few things with shape, colour, size, pattern and place, apart from one another."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from random import Random

from pipelines.extractor import OUTLINES, PALETTE

SHAPES = tuple(OUTLINES)
COLOURS = tuple(PALETTE)
SIZES = ("small", "large")
PATTERNS = ("plain", "striped", "dotted")
PLACES = ("left", "right", "top", "bottom")

_RADII = {"small": (10.0, 12.0), "large": (18.0, 21.0)}  # pixels
_FRAMES = ((224, 160), (208, 160), (192, 160), (160, 192))  # width, height
_COUNTS = (4, 4, 5, 5, 5, 6, 6, 6, 7, 7, 8, 9)
_MARGIN = 5  # pixels between things, and to the frame
_CLEAR, _NOT = 0.42, 0.52  # a thing is clearly left below the first, clearly not left above the second

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Thing:
    """One thing of a scene. Pixels; y grows downwards."""

    shape: str
    colour: str
    size: str
    pattern: str
    x: float
    y: float
    radius: float
    rgb: tuple[int, int, int]
    across: bool
    """Stripes run from left to right (else from top to bottom)."""
    box: Box
    """The tight box, xyxy."""
    drawn_box: Box
    """The box as an annotator drew it: about a pixel off."""
    places: frozenset[str]
    """Where it clearly is: a subset of `PLACES`."""
    near_places: frozenset[str]
    """Where a person might say that it is: `places` and the doubtful ones."""


@dataclass(frozen=True)
class Scene:
    """A picture's content: size in pixels, background RGB at its four corners' plane, things."""

    width: int
    height: int
    background: tuple[tuple[float, float, float], ...]
    """RGB at the top left, change to the right, change downwards."""
    noise_seed: int
    things: tuple[Thing, ...]

    @cached_property
    def shapes(self) -> frozenset[str]:
        return frozenset(thing.shape for thing in self.things)


def draw_scene(random: Random) -> Scene:
    """A random scene of 4 to 9 things. Colours and shapes repeat in it, so that one attribute rarely names a thing."""
    while True:
        scene = _try_scene(random)
        if scene is not None:
            return scene


def _try_scene(random: Random) -> Scene | None:
    width, height = random.choice(_FRAMES)
    colours = random.sample(COLOURS, random.choice((3, 4, 4, 5)))
    shapes = random.sample(SHAPES, random.choice((3, 3, 4, 4)))
    things: list[Thing] = []
    seen: set[tuple[str, ...]] = set()
    for _ in range(random.choice(_COUNTS)):
        look = (random.choice(shapes), random.choice(colours), random.choice(SIZES), _pattern(random))
        if look in seen:  # twins could only be told apart by place
            continue
        thing = _place(random, look, width, height, things)
        if thing is None:
            return None
        seen.add(look)
        things.append(thing)
    if len(things) < min(_COUNTS):
        return None
    base = random.uniform(163, 189)
    corner = tuple(base + random.uniform(-9, 9) for _ in range(3))
    right, down = (tuple(random.uniform(-9, 9) for _ in range(3)) for _ in range(2))
    background = tuple((channel[0], channel[1], channel[2]) for channel in (corner, right, down))
    return Scene(width, height, background, random.getrandbits(31), tuple(things))


def _pattern(random: Random) -> str:
    return random.choice(("plain", "plain", "striped", "dotted"))


def _place(random: Random, look: tuple[str, ...], width: int, height: int, others: list[Thing]) -> Thing | None:
    shape, colour, size, pattern = look
    radius = random.uniform(*_RADII[size])
    for _ in range(60):
        edge = radius + _MARGIN
        x, y = random.uniform(edge, width - edge), random.uniform(edge, height - edge)
        if all(max(abs(x - o.x), abs(y - o.y)) > radius + o.radius + _MARGIN for o in others):
            break
    else:
        return None
    outline = OUTLINES[shape]
    xs, ys = [p[0] for p in outline], [p[1] for p in outline]
    box = (x + radius * min(xs), y + radius * min(ys), x + radius * max(xs), y + radius * max(ys))
    drawn = [round(min(max(side + random.uniform(-1.2, 1.2), 0), limit), 2)
             for side, limit in zip(box, (width, height, width, height), strict=True)]  # fmt: skip
    rgb = [min(max(channel + random.randint(-12, 12), 0), 255) for channel in PALETTE[colour]]
    share = {"left": x / width, "right": 1 - x / width, "top": y / height, "bottom": 1 - y / height}
    return Thing(
        shape, colour, size, pattern, x, y, radius, (rgb[0], rgb[1], rgb[2]), random.random() < 0.5, box,
        (drawn[0], drawn[1], drawn[2], drawn[3]),
        frozenset(place for place in PLACES if share[place] < _CLEAR),
        frozenset(place for place in PLACES if share[place] < _NOT),
    )  # fmt: skip
