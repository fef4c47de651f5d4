"""Says what is in a scene: the class alone, or every attribute in varied words."""

from collections.abc import Sequence

import numpy as np

from features.scenes.world import (
    CLASS_NAMES,
    Pair,
    Relation,
    Scene,
    SceneObject,
    Seed,
    generator,
    relation_between,
)

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
