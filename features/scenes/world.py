"""What a scene is made of, and how one is chosen from a seed. Nothing is drawn here."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

SHAPES = (
    "circle",
    "square",
    "triangle",
    "diamond",
    "hexagon",
    "star",
    "cross",
    "ring",
    "heart",
    "crescent",
    "semicircle",
    "arrow",
)
COLOURS = (
    "red",
    "orange",
    "yellow",
    "green",
    "teal",
    "blue",
    "purple",
    "pink",
    "brown",
    "gray",
)
TEXTURES = ("solid", "striped", "dotted", "checkered")
SIZES = ("small", "medium", "large")
TONES = ("pale", "dark")
GROUNDS = ("plain", "gradient", "cloudy", "lined")

CLASS_NAMES = tuple(f"{colour} {shape}" for shape in SHAPES for colour in COLOURS)
"""The 120 classes; `class_index` gives the place of a shape and a colour."""

HELD_OUT = frozenset(
    shape * len(COLOURS) + (3 * shape + 2) % len(COLOURS) for shape in range(len(SHAPES))
)
"""One colour of each shape, never shown in pre-training or in the split `train`."""

SEEN = tuple(label for label in range(len(CLASS_NAMES)) if label not in HELD_OUT)
EVERY = tuple(range(len(CLASS_NAMES)))

Relation = Literal["left of", "right of", "above", "below"]
Seed = int | Sequence[int]

MARGIN = 0.03
"""Free space between two objects, and to the edge, as a fraction of the picture's side."""


def class_index(shape: str, colour: str) -> int:
    """Return the label of a shape in a colour."""
    return SHAPES.index(shape) * len(COLOURS) + COLOURS.index(colour)


@dataclass(frozen=True)
class SceneObject:
    """One thing in a picture. Lengths are fractions of the picture's side."""

    shape: str
    colour: str
    texture: str
    x: float
    """Centre, from the left."""
    y: float
    """Centre, from the top."""
    radius: float
    angle: float
    """Turn of the shape, in degrees."""
    grain: int
    """Seed of what no caption tells: the exact hue and how the texture lies."""

    @property
    def label(self) -> int:
        """The class of shape and colour."""
        return class_index(self.shape, self.colour)

    @property
    def size(self) -> str:
        """One of `SIZES`, from the radius alone."""
        return SIZES[0 if self.radius < 0.12 else 1 if self.radius < 0.19 else 2]


@dataclass(frozen=True)
class Scene:
    """A picture before it is drawn; the first object is the main one and gives the label."""

    objects: tuple[SceneObject, ...]
    tone: str
    ground: str
    grain: int
    """Seed of the tint, the pattern and the noise of the background."""

    @property
    def label(self) -> int:
        """The class of the main object."""
        return self.objects[0].label


@dataclass(frozen=True)
class Pair:
    """Two scenes, and two captions made of the same words with the roles swapped."""

    scenes: tuple[Scene, Scene]
    relation: Relation | None
    """How the first object of either scene lies to the second; None where colours are swapped."""


def sample_scene(seed: Seed, *, classes: Sequence[int] = EVERY) -> Scene:
    """Choose one to three objects (20, 50, 30 %) on a background.

    The main object is the largest, with 1.3 times the radius of the next at least. Objects
    neither touch nor leave the picture.

    Args:
        seed: What the whole scene follows from.
        classes: Labels that any object may have, each as likely as the others.
    """
    random = generator(seed)
    count = 1 + int(np.searchsorted((0.2, 0.7), random.random(), side="right"))
    main = 0.14 + 0.11 * random.random()
    radii = [main] + [0.075 + (main / 1.3 - 0.075) * random.random() for _ in range(count - 1)]
    labels = [classes[int(random.integers(len(classes)))] for _ in radii]
    objects = [
        _object(random, label, radius, place)
        for label, radius, place in zip(labels, radii, _places(random, radii), strict=True)
    ]
    return Scene(tuple(objects), *_background(random))


def sample_pair(seed: Seed, *, classes: Sequence[int] = SEEN) -> Pair:
    """Choose a compositional pair: as often one with places swapped as one with colours swapped.

    Both objects have the same size, and both scenes the same background and the same two places,
    so that only what is asked for differs.

    Args:
        seed: What both scenes follow from.
        classes: Labels that any of the objects may have, after the swap too.
    """
    random = generator(seed)
    radius = 0.14 + 0.04 * random.random()
    upright = random.random() < 0.5
    first, second = _two_classes(random, classes)
    places = _opposite_places(random, upright)
    one = _object(random, first, radius, places[0])
    two = _object(random, second, radius, places[1])
    scene = Scene((one, two), *_background(random))
    if random.random() < 0.5:
        relation: Relation = "above" if upright else "left of"
        moved = (replace(two, x=one.x, y=one.y), replace(one, x=two.x, y=two.y))
        return _mirrored(Pair((scene, replace(scene, objects=moved)), relation), random)
    swapped = (replace(one, colour=two.colour), replace(two, colour=one.colour))
    return Pair((scene, replace(scene, objects=swapped)), None)


def relation_between(one: SceneObject, two: SceneObject) -> Relation:
    """Say where `one` lies, seen from `two`, along the axis on which they are further apart."""
    if abs(one.x - two.x) > abs(one.y - two.y):
        return "left of" if one.x < two.x else "right of"
    return "above" if one.y < two.y else "below"


def generator(seed: Seed) -> np.random.Generator:
    """Return the random numbers of one scene, the same in every process."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed)))


def _object(
    random: np.random.Generator, label: int, radius: float, place: tuple[float, float]
) -> SceneObject:
    return SceneObject(
        shape=SHAPES[label // len(COLOURS)],
        colour=COLOURS[label % len(COLOURS)],
        texture=TEXTURES[int(random.integers(len(TEXTURES)))],
        x=place[0],
        y=place[1],
        radius=radius,
        angle=36 * random.random() - 18,
        grain=int(random.integers(2**31)),
    )


def _background(random: np.random.Generator) -> tuple[str, str, int]:
    tone = TONES[int(random.integers(len(TONES)))]
    ground = GROUNDS[int(random.integers(len(GROUNDS)))]
    return tone, ground, int(random.integers(2**31))


def _places(random: np.random.Generator, radii: Sequence[float]) -> list[tuple[float, float]]:
    """Draw a free place for each object in turn; begin anew where thirty tries find none."""
    places: list[tuple[float, float]] = []
    tries = 0
    while len(places) < len(radii):
        inset = radii[len(places)] + MARGIN
        place = inset + (1 - 2 * inset) * random.random(), inset + (1 - 2 * inset) * random.random()
        taken = zip(places, radii, strict=False)
        if all(math.dist(place, other) > inset + radius for other, radius in taken):
            places.append(place)
        tries += 1
        if tries == 30:
            places, tries = [], 0
    return places


def _two_classes(random: np.random.Generator, classes: Sequence[int]) -> tuple[int, int]:
    """Draw two labels that share neither shape nor colour and may exchange their colours."""
    allowed = frozenset(classes)
    width = len(COLOURS)
    while True:
        first, second = (classes[int(i)] for i in random.integers(len(classes), size=2))
        if first // width == second // width or first % width == second % width:
            continue
        exchanged = {
            first - first % width + second % width,
            second - second % width + first % width,
        }
        if exchanged <= allowed:
            return first, second


def _opposite_places(
    random: np.random.Generator, upright: bool
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return two places that are clearly beside, or clearly above, one another."""
    near, far = 0.22 + 0.06 * random.random(), 0.72 + 0.06 * random.random()
    across = 0.3 + 0.4 * random.random()
    other = across + 0.16 * (random.random() - 0.5)
    if upright:
        return (across, near), (other, far)
    return (near, across), (far, other)


def _mirrored(pair: Pair, random: np.random.Generator) -> Pair:
    """Say it the other way round in half of the pairs: right of, below."""
    if random.random() < 0.5:
        return pair
    first, second = pair.scenes
    turned = tuple(replace(scene, objects=scene.objects[::-1]) for scene in (second, first))
    opposite: Relation = "right of" if pair.relation == "left of" else "below"
    return Pair((turned[0], turned[1]), opposite)


WORDS: dict[str, tuple[str, ...]] = {
    "circle": ("circle", "disc"),
    "square": ("square",),
    "triangle": ("triangle",),
    "diamond": ("diamond", "rhombus"),
    "hexagon": ("hexagon",),
    "star": ("star",),
    "cross": ("cross", "plus sign"),
    "ring": ("ring", "hoop"),
    "heart": ("heart",),
    "crescent": ("crescent", "crescent moon"),
    "semicircle": ("semicircle", "dome"),
    "arrow": ("arrow",),
    "small": ("small", "little", "tiny"),
    "medium": ("medium-sized", "mid-sized"),
    "large": ("large", "big", "huge"),
    "solid": ("solid", "unpatterned"),
    "striped": ("striped", "stripy"),
    "dotted": ("dotted", "spotted"),
    "checkered": ("checkered", "chequered"),
    "pale": ("pale", "light", "bright"),
    "dark": ("dark", "dim"),
    "plain": ("plain", "even"),
    "gradient": ("shaded", "graded"),
    "cloudy": ("cloudy", "blotchy"),
    "lined": ("lined", "ruled"),
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
"""Each attribute of a scene, and the words that name it. No word names two attributes."""

PATTERNS: dict[str, tuple[str, ...]] = {
    "solid": ("of one tone",),
    "striped": ("with stripes", "with bands"),
    "dotted": ("with dots", "with spots"),
    "checkered": ("with checks", "with a checkerboard pattern"),
}
"""The same textures, said after the shape."""

STARTS = ("a picture of", "an image with", "a drawing of")
PLACES = (
    (("in the upper left", "in the top left corner"), ("at the top",), ("in the upper right",)),
    (("on the left", "on the left side"), ("in the middle", "in the centre"), ("on the right",)),
    (
        ("in the lower left",),
        ("at the bottom",),
        ("in the lower right", "in the bottom right corner"),
    ),
)
OPPOSITE: dict[Relation, Relation] = {
    "left of": "right of",
    "right of": "left of",
    "above": "below",
    "below": "above",
}


def short_caption(scene: Scene) -> str:
    """Name the main object: "a red circle"."""
    return _with_article(CLASS_NAMES[scene.label])


def long_caption(scene: Scene, seed: Seed) -> str:
    """Name every object with its attributes, how they lie, and the background.

    One of five templates: the last is for any scene, the others differ for one object and more.

    Args:
        scene: What is described.
        seed: What the choice of template and words follows from.
    """
    random = generator(seed)
    main, *others = scene.objects
    what, where = _describe(main, random), _place(main, random)
    ground = _ground(scene, random)
    template = int(random.integers(5))
    if template == 4:
        things = [what] + [_describe(other, random) for other in others]
        start = _pick(STARTS, random)
        return f"{start} {_joined(things)}, with the largest {where}, on {ground}"
    if others:
        return _several(template, what, where, ground, _relations(main, others, random))
    return _alone(template, what, where, ground)


def pair_captions(pair: Pair, seed: Seed) -> tuple[tuple[str, str], tuple[str, str]]:
    """Return a short and a long caption for both scenes of a pair, made of the same words."""
    random = generator(seed)
    words = ("and",) if pair.relation is None else WORDS[pair.relation]
    between = _pick(words, random)
    start = _pick(STARTS, random)
    ground = _ground(pair.scenes[0], random)
    shorts = [
        f" {words[0]} ".join(_with_article(CLASS_NAMES[thing.label]) for thing in scene.objects)
        for scene in pair.scenes
    ]
    longs = [f"{start} {short.replace(words[0], between)} on {ground}" for short in shorts]
    return (shorts[0], longs[0]), (shorts[1], longs[1])


def _alone(template: int, what: str, where: str, ground: str) -> str:
    return (
        f"{what} {where} on {ground}",
        f"on {ground}, {what} {where}",
        f"{what} alone, {where}, on {ground}",
        f"{what} {where}; behind it is {ground}",
    )[template]


def _several(template: int, what: str, where: str, ground: str, relations: str) -> str:
    return (
        f"{what} {where}, {relations}, on {ground}",
        f"on {ground}, {what} {where} and {relations}",
        f"{where}, {what}, {relations}, all on {ground}",
        f"{what}, {relations}; behind them is {ground}",
    )[template]


def _describe(thing: SceneObject, random: np.random.Generator) -> str:
    """Return an object in words, its texture before or after the shape."""
    size = _pick(WORDS[thing.size], random)
    shape = f"{thing.colour} {_pick(WORDS[thing.shape], random)}"
    if random.random() < 0.6:
        return _with_article(f"{size} {_pick(WORDS[thing.texture], random)} {shape}")
    return _with_article(f"{size} {shape} {_pick(PATTERNS[thing.texture], random)}")


def _relations(
    main: SceneObject, others: Sequence[SceneObject], random: np.random.Generator
) -> str:
    """Return how the main object lies to the others, or how they lie to it."""
    parts = []
    for other in others:
        relation, name = relation_between(main, other), _describe(other, random)
        if random.random() < 0.5:
            parts.append(f"{_pick(WORDS[relation], random)} {name}")
        else:
            parts.append(f"with {name} {_pick(WORDS[OPPOSITE[relation]], random)} it")
    return _joined(parts)


def _place(thing: SceneObject, random: np.random.Generator) -> str:
    column, row = (0 if centre < 0.4 else 1 if centre < 0.6 else 2 for centre in (thing.x, thing.y))
    return _pick(PLACES[row][column], random)


def _ground(scene: Scene, random: np.random.Generator) -> str:
    tone, ground = _pick(WORDS[scene.tone], random), _pick(WORDS[scene.ground], random)
    return f"a {tone} {ground} {_pick(('background', 'backdrop'), random)}"


def _pick(words: Sequence[str], random: np.random.Generator) -> str:
    return words[int(random.integers(len(words)))]


def _joined(parts: Sequence[str]) -> str:
    if len(parts) < 3:
        return " and ".join(parts)
    return f"{', '.join(parts[:-1])} and {parts[-1]}"


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
