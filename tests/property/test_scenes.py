"""What holds for every drawn scene, whatever its seed."""

import re

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from features.scenes import COLOURS, HELD_OUT, SHAPES, TEXTURES
from features.scenes.draw import BACKGROUND, draw
from features.scenes.shards import sample
from features.scenes.world import (
    GROUNDS,
    PATTERNS,
    SEEN,
    SIZES,
    TONES,
    WORDS,
    Scene,
    SceneObject,
    long_caption,
    pair_captions,
    relation_between,
    sample_pair,
    sample_scene,
    short_caption,
)

SEEDS = st.integers(0, 2**32 - 1)


def words_of(names: tuple[str, ...], caption: str) -> set[str]:
    """Return which of the attributes a caption names, by any of their words."""
    return {
        name
        for name in names
        if any(
            re.search(rf"\b{re.escape(word)}\b", caption)
            for word in (*WORDS.get(name, (name,)), *PATTERNS.get(name, ()))
        )
    }


def tiles_apart(one: SceneObject, two: SceneObject) -> bool:
    return float(np.hypot(one.x - two.x, one.y - two.y)) > one.radius + two.radius


@given(seed=SEEDS)
def test_objects_do_not_touch_and_the_main_one_is_the_largest(seed: int) -> None:
    main, *others = scene = sample_scene(seed).objects
    assert 1 <= len(scene) <= 3
    assert all(main.radius >= 1.3 * other.radius for other in others)
    assert all(tiles_apart(a, b) for i, a in enumerate(scene) for b in scene[:i])
    for thing in scene:
        assert thing.radius < thing.x < 1 - thing.radius
        assert thing.radius < thing.y < 1 - thing.radius


@given(seed=SEEDS, size=st.sampled_from([48, 64, 96]))
def test_mask_shows_each_object_at_its_place_and_nothing_else(seed: int, size: int) -> None:
    scene = sample_scene(seed)
    rgb, mask = draw(scene, size)
    assert rgb.shape == (size, size, 3)
    assert set(np.unique(mask)) == {BACKGROUND} | {thing.label for thing in scene.objects}
    for thing in scene.objects:
        rows, columns = np.nonzero(mask == thing.label)
        same = [other for other in scene.objects if other.label == thing.label]
        nearest = np.min(
            [
                np.hypot((columns + 0.5) / size - other.x, (rows + 0.5) / size - other.y)
                - 1.1 * other.radius
                for other in same
            ],
            axis=0,
        )
        assert nearest.max() < 0


@given(seed=SEEDS)
def test_drawing_twice_gives_the_same_bytes(seed: int) -> None:
    first, second = (draw(sample_scene(seed), 64) for _ in range(2))
    assert first[0].tobytes() == second[0].tobytes()
    assert first[1].tobytes() == second[1].tobytes()


@given(seed=SEEDS, row=st.integers(0, 10**6))
def test_training_pictures_never_show_a_held_out_combination(seed: int, row: int) -> None:
    scene = sample("train", seed, row).scene
    assert not HELD_OUT & {thing.label for thing in scene.objects}


@given(seed=SEEDS)
def test_short_caption_is_the_class_of_the_main_object(seed: int) -> None:
    main = sample_scene(seed).objects[0]
    assert short_caption(sample_scene(seed)) in (
        f"a {main.colour} {main.shape}",
        f"an {main.colour} {main.shape}",
    )


@given(seed=SEEDS, words=SEEDS)
def test_long_caption_names_all_attributes_of_the_scene_and_no_others(
    seed: int, words: int
) -> None:
    scene = sample_scene(seed)
    caption = long_caption(scene, words)
    things = scene.objects
    assert words_of(SHAPES, caption) == {thing.shape for thing in things}
    assert words_of(COLOURS, caption) == {thing.colour for thing in things}
    assert words_of(TEXTURES, caption) == {thing.texture for thing in things}
    assert words_of(SIZES, caption) == {thing.size for thing in things}
    assert words_of(TONES, caption) == {scene.tone}
    assert words_of(GROUNDS, caption) == {scene.ground}


@given(seed=SEEDS, words=SEEDS)
def test_colour_stands_before_its_own_shape(seed: int, words: int) -> None:
    scene = sample_scene(seed)
    caption = long_caption(scene, words)
    named = "|".join(word for shape in SHAPES for word in WORDS[shape])
    pairs = re.findall(rf"\b({'|'.join(COLOURS)}) ({named})\b", caption)
    told = sorted((colour, next(s for s in SHAPES if noun in WORDS[s])) for colour, noun in pairs)
    assert told == sorted((thing.colour, thing.shape) for thing in scene.objects)


@given(seed=SEEDS)
def test_groups_are_swaps_of_the_same_objects_on_the_same_background(seed: int) -> None:
    pair = sample_pair(seed)
    first, second = pair.scenes
    assert (first.tone, first.ground, first.grain) == (second.tone, second.ground, second.grain)
    assert {(thing.x, thing.y) for thing in first.objects} == {
        (thing.x, thing.y) for thing in second.objects
    }
    for attribute in ("shape", "colour", "texture", "radius"):
        assert sorted(getattr(thing, attribute) for thing in first.objects) == sorted(
            getattr(thing, attribute) for thing in second.objects
        )
    assert {thing.label for scene in pair.scenes for thing in scene.objects} <= set(SEEN)
    assert [thing.label for thing in first.objects] != [thing.label for thing in second.objects]


@given(seed=SEEDS, words=SEEDS)
def test_captions_of_a_group_have_the_same_words_in_another_order(seed: int, words: int) -> None:
    for one, two in zip(*pair_captions(sample_pair(seed), words), strict=True):
        assert one != two
        assert sorted(re.sub(r"\ban\b", "a", one).split()) == sorted(
            re.sub(r"\ban\b", "a", two).split()
        )


@given(seed=SEEDS, words=SEEDS)
def test_caption_of_a_group_is_true_of_its_own_scene(seed: int, words: int) -> None:
    pair = sample_pair(seed)
    for scene, (short, _) in zip(pair.scenes, pair_captions(pair, words), strict=True):
        one, two = scene.objects
        between = "and" if pair.relation is None else relation_between(one, two)
        said = re.sub(r"\ban?\b ", "", short)
        assert said == f"{one.colour} {one.shape} {between} {two.colour} {two.shape}"


@given(seed=SEEDS)
def test_rows_follow_from_split_seed_and_number_alone(seed: int) -> None:
    assert sample("test", seed, 7) == sample("test", seed, 7)
    scenes: list[Scene] = [sample(split, seed, 7).scene for split in ("train", "test")]
    assert scenes[0] != scenes[1]
