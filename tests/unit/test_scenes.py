"""The demo world: its classes, its shards, and the encoder that comes with it."""

import hashlib
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModel, ViTImageProcessor

from features.encoders.checkpoint import BUNDLED_SCENES
from features.scenes import CLASS_NAMES, COLOURS, HELD_OUT, SHAPES, write_shards
from features.scenes.draw import DISTANCES, RGB, draw
from features.scenes.shards import SPLITS, sample
from features.scenes.world import EVERY, SEEN, Scene, SceneObject, class_index
from tests.demo_encoder.batches import INPUT, normalised

ROOT = Path(__file__).parents[2]
MEGABYTE = 1_000_000


def members(tar: Path) -> dict[str, bytes]:
    with tarfile.open(tar) as archive:
        return {entry.name: archive.extractfile(entry).read() for entry in archive}  # type: ignore[union-attr]


def sha256(tar: Path) -> str:
    return hashlib.sha256(tar.read_bytes()).hexdigest()


def one_object(shape: str, colour: str = "red", texture: str = "solid") -> Scene:
    thing = SceneObject(shape, colour, texture, x=0.5, y=0.5, radius=0.3, angle=0.0, grain=1)
    return Scene((thing,), tone="pale", ground="plain", grain=2)


def test_there_are_120_classes_and_each_has_the_index_of_its_name() -> None:
    assert len(set(CLASS_NAMES)) == 120
    for shape in SHAPES:
        for colour in COLOURS:
            assert CLASS_NAMES[class_index(shape, colour)] == f"{colour} {shape}"


def test_each_shape_is_held_out_in_one_colour() -> None:
    assert len(HELD_OUT) == len(SHAPES)
    assert {label // len(COLOURS) for label in HELD_OUT} == set(range(len(SHAPES)))
    assert {label % len(COLOURS) for label in HELD_OUT} == set(range(len(COLOURS)))
    assert set(SEEN) == set(EVERY) - HELD_OUT


@pytest.mark.parametrize("shape", SHAPES)
def test_shape_is_drawn_whole_inside_its_radius_and_fills_a_good_part_of_it(shape: str) -> None:
    assert set(DISTANCES) == set(SHAPES)
    _, mask = draw(one_object(shape), 100)
    rows, columns = np.nonzero(mask != 255)
    assert np.hypot(rows - 49.5, columns - 49.5).max() < 1.1 * 30
    assert 0.2 < len(rows) / (np.pi * 30**2) < 0.95


@pytest.mark.parametrize("colour", COLOURS)
def test_solid_object_has_about_its_colour(colour: str) -> None:
    rgb, mask = draw(one_object("square", colour), 64)
    mean = rgb[mask == class_index("square", colour)].mean(0)
    distances = {name: np.abs(mean - value).sum() for name, value in RGB.items()}
    assert min(distances, key=lambda name: distances[name]) == colour


def test_shard_is_a_tar_of_jpegs_captions_and_masks(tmp_path: Path) -> None:
    (tar,) = write_shards(tmp_path, split="test", rows=3, seed=0)
    assert tar == tmp_path / "test-00000.tar"
    content = members(tar)
    names = [f"{row:06d}.{kind}" for row in range(3) for kind in ("jpg", "json", "mask.png")]
    assert list(content) == names
    image = Image.open(io.BytesIO(content["000000.jpg"]))
    assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (96, 96))
    text = json.loads(content["000000.json"])
    assert set(text) == {"short", "long", "label"}
    assert text["short"].split(" ", 1)[1] == CLASS_NAMES[text["label"]]
    mask = np.asarray(Image.open(io.BytesIO(content["000000.mask.png"])))
    assert (mask == text["label"]).any()
    assert mask.shape == (96, 96)


def test_class_names_are_written_beside_the_shards(tmp_path: Path) -> None:
    write_shards(tmp_path, split="train", rows=1, seed=0)
    lines = (tmp_path / "classes.txt").read_text(encoding="utf-8").splitlines()
    assert lines == list(CLASS_NAMES)


def test_rows_of_a_compositional_shard_come_in_groups_of_two(tmp_path: Path) -> None:
    (tar,) = write_shards(tmp_path, split="compositional", rows=6, seed=0)
    texts = [json.loads(data) for name, data in members(tar).items() if name.endswith("json")]
    assert [text["group"] for text in texts] == [0, 0, 1, 1, 2, 2]


def test_rows_are_the_same_however_they_are_cut_into_shards(tmp_path: Path) -> None:
    whole = write_shards(tmp_path / "a", split="train", rows=5, seed=3)
    parts = write_shards(tmp_path / "b", split="train", rows=5, seed=3, rows_per_shard=2)
    assert [path.name for path in parts] == [f"train-{number:05d}.tar" for number in range(3)]
    together = {name: data for path in parts for name, data in members(path).items()}
    assert together == members(whole[0])


def test_whole_tar_is_left_alone_and_a_missing_one_is_drawn(tmp_path: Path) -> None:
    first, second = write_shards(tmp_path, split="train", rows=4, seed=0, rows_per_shard=2)
    expected, touched = sha256(second), first.stat().st_mtime_ns
    second.unlink()
    write_shards(tmp_path, split="train", rows=4, seed=0, rows_per_shard=2)
    assert first.stat().st_mtime_ns == touched
    assert sha256(second) == expected
    assert not list(tmp_path.glob("*.partial"))


def test_tars_of_other_settings_are_replaced_but_not_those_of_another_split(tmp_path: Path) -> None:
    write_shards(tmp_path, split="train", rows=4, seed=0, rows_per_shard=2)
    (other,) = write_shards(tmp_path, split="test", rows=2, seed=0)
    before = other.stat().st_mtime_ns
    write_shards(tmp_path, split="train", rows=2, seed=1, rows_per_shard=2)
    assert sorted(path.name for path in tmp_path.glob("*.tar")) == [
        "test-00000.tar",
        "train-00000.tar",
    ]
    assert other.stat().st_mtime_ns == before


def test_another_process_writes_the_same_bytes(tmp_path: Path) -> None:
    (here,) = write_shards(tmp_path / "here", split="test", rows=8, seed=5)
    code = (
        "import sys; from pathlib import Path; from features.scenes import write_shards;"
        "write_shards(Path(sys.argv[1]), split='test', rows=8, seed=5)"
    )
    there = tmp_path / "there"
    subprocess.run([sys.executable, "-c", code, str(there)], cwd=ROOT, check=True)
    assert sha256(there / here.name) == sha256(here)


def test_two_processes_write_what_one_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = write_shards(tmp_path / "alone", split="train", rows=4, seed=0, rows_per_shard=2)
    monkeypatch.setattr("features.scenes.shards.ROWS_WORTH_A_POOL", 1)
    pooled = write_shards(tmp_path / "pooled", split="train", rows=4, seed=0, rows_per_shard=2)
    assert [sha256(path) for path in pooled] == [sha256(path) for path in alone]


def test_splits_and_seeds_share_no_picture() -> None:
    pictures = {
        draw(sample(split, seed, row).scene, 32)[0].tobytes()
        for split in SPLITS
        for seed in (0, 1)
        for row in range(20)
    }
    assert len(pictures) == len(SPLITS) * 2 * 20


def test_bundled_encoder_is_small_and_says_how_it_was_supervised() -> None:
    assert (BUNDLED_SCENES / "model.safetensors").stat().st_size <= 8 * MEGABYTE
    supervision = AutoConfig.from_pretrained(BUNDLED_SCENES).supervision
    assert supervision.startswith("Supervised: ")
    assert supervision in (BUNDLED_SCENES / "README.md").read_text(encoding="utf-8")


def test_bundled_encoder_sees_through_its_processor_what_it_was_trained_on() -> None:
    processor = ViTImageProcessor.from_pretrained(BUNDLED_SCENES)
    rgb, _ = draw(sample("test", 0, 0).scene, 96)
    image = Image.fromarray(rgb)
    small = np.asarray(image.resize((INPUT, INPUT), Image.Resampling.BILINEAR))
    expected = normalised(torch.from_numpy(small.transpose(2, 0, 1)[None].copy()))
    pixels = processor(image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels, expected, atol=1e-5, rtol=0)


def test_bundled_encoder_gives_one_vector_and_a_map_of_sixteen_cells() -> None:
    model = AutoModel.from_pretrained(BUNDLED_SCENES).eval()
    with torch.inference_mode():
        output = model(torch.zeros(2, 3, INPUT, INPUT))
    assert model.dtype == torch.float32
    assert output.pooler_output.shape == (2, 256, 1, 1)
    assert output.last_hidden_state.shape == (2, 256, 4, 4)
