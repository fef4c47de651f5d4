"""Segmentation as a part of stage three: from pictures and masks to results.json and the report."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import ViTModel

from align.checkpoint import load_head
from evaluate.results import read_items
from features.config import PatchAttention
from features.encoders import load_text_encoder
from features.errors import EncoderError, EvaluationError
from pipeline.explore.session import Session
from pipeline.explore.views import results as explored
from pipeline.interrupt import Stopped, StopRequest
from pipeline.run.align import align_run
from pipeline.run.config import RunConfig, load_config
from pipeline.run.evaluate import evaluate_run, results_table
from pipeline.run.extract import extract
from pipeline.run.folder import start_run
from pipeline.study.comparison import compare_runs
from tests import tiny

CLASSES = (("red", "circle"), ("green",), ("blue",), ("star",))
TEMPLATES = ("the {}", "a {} circle")
HEIGHT, WIDTH, PICTURES = 16, 24, 5
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run file whose head is there, and five pictures with masks."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "classes.json").write_text(json.dumps({"classes": CLASSES}))
    section = """
[eval.segmentation.tiles]
kind = "folder"
images = "tiles/images"
masks = "tiles/masks"
classes = "classes.json"
templates = ["the {}", "a {} circle"]
short = 16
crop = 24
stride = 24
"""
    run_file = tiny.world(folder, extra=[section])
    for number in range(PICTURES):
        for kind in ("images", "masks"):
            (folder / "tiles" / kind).mkdir(parents=True, exist_ok=True)
        tiny.picture(number, WIDTH, HEIGHT).save(folder / "tiles" / "images" / f"{number}.png")
        Image.fromarray(mask(number)).save(folder / "tiles" / "masks" / f"{number}.png")
    config = load_config(str(run_file))
    extract(config, StopRequest())
    align_run(config, StopRequest())
    return run_file


def mask(number: int) -> np.ndarray:
    """Three of the four classes in tiles, and a border that does not count."""
    values = np.random.default_rng(number).integers(0, 3, (2, 3)).astype(np.uint8)
    tiles: np.ndarray = np.kron(values, np.ones((8, 8), dtype=np.uint8))
    tiles[0] = 255
    return tiles


def configured(run_file: Path, folder: Path, *overrides: str) -> RunConfig:
    """The settings of an evaluation of the same head in a folder of its own."""
    shared = run_file.parent / "run"
    if not (folder / "align").exists():
        folder.mkdir(exist_ok=True)
        (folder / "align").symlink_to(shared / "align")
    places = [f"run.dir='{folder}'", f"run.features='{shared}'"]
    return load_config(str(run_file), [*places, *overrides])


def results(config: RunConfig) -> Rows:
    path = evaluate_run(config, StopRequest())
    rows = json.loads(path.read_text(encoding="utf-8"))["results"]
    return [row for row in rows if row["task"] == "segmentation"]


def by_hand(run_file: Path) -> tuple[np.ndarray, np.ndarray]:
    """The masks and predictions of all pictures, from the definition."""
    model, _ = load_head(run_file.parent / "run" / "align" / "best")
    vit = ViTModel.from_pretrained(run_file.parent / "vit", add_pooling_layer=False).eval()
    settings = load_config(str(run_file)).encoders.text["bert"]
    encoder = load_text_encoder("bert", settings, torch.device("cpu"))
    names = [name for names in CLASSES for name in names]
    owner = [number for number, names in enumerate(CLASSES) for _ in names]
    prompts = [template.format(name) for name in names for template in TEMPLATES]
    text = model.embed_text(torch.from_numpy(encoder.encode(prompts).astype(np.float16)))
    text = F.normalize(F.normalize(text, dim=-1).view(len(names), 2, -1).mean(1), dim=-1)
    predicted = []
    for number in range(PICTURES):
        pixels = torch.from_numpy(np.array(tiny.picture(number, WIDTH, HEIGHT))).permute(2, 0, 1)
        pixels = (pixels[None] / 255 - 0.5) / 0.5
        tokens = vit(pixels, interpolate_pos_encoding=True).last_hidden_state[0, 1:]
        patches = F.normalize(model.embed_image(tokens.half()), dim=-1)
        cosine = (patches @ text.T).view(1, 2, 3, -1).permute(0, 3, 1, 2)
        large = F.interpolate(cosine, size=(HEIGHT, WIDTH), mode="bilinear", align_corners=False)
        predicted.append(np.array(owner)[large[0].argmax(0).numpy()])
    return np.stack([mask(number) for number in range(PICTURES)]), np.stack(predicted)


@torch.no_grad()
def test_the_numbers_are_those_of_the_definition_on_the_model_itself(
    world: Path, tmp_path: Path
) -> None:
    rows = results(configured(world, tmp_path))
    masks, predicted = by_hand(world)
    counts = masks != 255
    right = (masks == predicted) & counts
    assert 0.02 < right.sum() / counts.sum() < 0.98  # or the test would say little
    iou = {}
    for number, (name, *_) in enumerate(CLASSES):
        true, taken = (masks == number) & counts, (predicted == number) & counts
        if (true | taken).any():
            iou[name] = (true & taken).sum() / (true | taken).sum()
    found = {row["dataset"]: row["value"] for row in rows if row["metric"] == "iou"}
    assert found == pytest.approx({f"tiles/{name}": value for name, value in iou.items()})
    miou, accuracy = (row for row in rows if row["metric"] != "iou")
    assert (miou["metric"], miou["dataset"], miou["n"]) == ("miou", "tiles", PICTURES)
    assert miou["value"] == pytest.approx(np.mean(list(iou.values())))
    assert miou["ci95"][0] <= miou["value"] <= miou["ci95"][1]
    assert accuracy["value"] == pytest.approx(right.sum() / counts.sum())
    protocol = miou["protocol"]
    assert protocol["templates"] == list(TEMPLATES)
    assert (protocol["classes"], protocol["names"], protocol["patch"]) == (4, 5, 8)
    assert protocol["mean"] == [0.5, 0.5, 0.5]
    assert 0 < protocol["majority_class"] < 1
    items = read_items(tmp_path / "eval" / "items.npz")["segmentation tiles pixel_accuracy"]
    assert items.hits.tolist() == right.sum((1, 2)).tolist()


def test_the_report_shows_pictures_and_the_table_leaves_single_classes_to_it(
    world: Path, tmp_path: Path
) -> None:
    results(configured(world, tmp_path, "eval.examples=2"))
    page = (tmp_path / "eval" / "report.html").read_text(encoding="utf-8")
    assert page.count('<article class="card segmented">') == 2
    assert "IoU of the" in page
    table = results_table(tmp_path / "eval" / "results.json")
    assert "miou" in table
    assert "tiles/" not in table


def test_the_browser_lists_the_numbers_without_rows_since_no_store_has_them(
    world: Path, tmp_path: Path
) -> None:
    config = configured(world, tmp_path)
    start_run(config, "align")
    evaluate_run(config, StopRequest())
    shown = explored(Session(tmp_path, device="cpu"))["results"]
    found = {each["metric"]: each["has_rows"] for each in shown if each["task"] == "segmentation"}
    assert found == {"miou": False, "pixel_accuracy": False, "iou": False}


def test_a_mask_that_changes_is_scored_again_and_nothing_else_is(
    world: Path, tmp_path: Path
) -> None:
    config = configured(world, tmp_path)
    before = results(config)
    written = (tmp_path / "eval" / "results.json").stat().st_mtime_ns
    results(config)
    assert (tmp_path / "eval" / "results.json").stat().st_mtime_ns == written
    place = world.parent / "tiles" / "masks" / "0.png"
    own = place.read_bytes()
    try:
        Image.fromarray(np.full((HEIGHT, WIDTH), 3, dtype=np.uint8)).save(place)
        assert results(config)[0]["value"] != before[0]["value"]
    finally:
        place.write_bytes(own)


def test_a_missing_mask_is_told_before_anything_is_measured(world: Path, tmp_path: Path) -> None:
    elsewhere = f"eval.segmentation.tiles.masks='{tmp_path}'"
    with pytest.raises(EvaluationError, match=r"5 of 5 masks are not in"):
        evaluate_run(configured(world, tmp_path / "run", elsewhere), StopRequest())
    assert not (tmp_path / "run" / "eval").exists()


@pytest.mark.parametrize("attention", ["maskclip", "sclip", "clearclip"])
def test_another_attention_gives_another_result_and_says_so(
    world: Path, tmp_path: Path, attention: PatchAttention
) -> None:
    plain = results(configured(world, tmp_path / "plain"))
    other = results(
        configured(world, tmp_path / "other", f"eval.segmentation.tiles.attention={attention}")
    )
    assert other[0]["protocol"]["attention"] == attention
    assert [row["value"] for row in other] != [row["value"] for row in plain]
    with pytest.raises(EvaluationError, match="attention"):
        compare_runs(tmp_path / "plain", tmp_path / "other")


def test_two_runs_are_compared_by_the_data_set_and_not_class_by_class(
    world: Path, tmp_path: Path
) -> None:
    for name in ("one", "two"):
        evaluate_run(configured(world, tmp_path / name), StopRequest())
    compared = {
        row["measure"]: row["paired"]
        for row in compare_runs(tmp_path / "one", tmp_path / "two")["measures"]
        if row["measure"].startswith("segmentation")
    }
    assert compared == {
        "segmentation tiles miou": False,
        "segmentation tiles pixel_accuracy": True,
    }


def test_the_first_names_alone_are_one_a_class(world: Path, tmp_path: Path) -> None:
    rows = results(configured(world, tmp_path, "eval.segmentation.tiles.synonyms=false"))
    assert rows[0]["protocol"]["names"] == 4


def test_small_windows_see_every_pixel_too(world: Path, tmp_path: Path) -> None:
    windows = [f"eval.segmentation.tiles.{key}" for key in ("crop=16", "stride=8", "short=20")]
    rows = results(configured(world, tmp_path, *windows))
    assert rows[0]["n"] == PICTURES
    assert 0 < rows[0]["value"] < 1


def test_a_signal_stops_between_pictures_and_leaves_no_results(world: Path, tmp_path: Path) -> None:
    class Later(StopRequest):
        calls = 0

        def __call__(self) -> bool:
            Later.calls += 1
            return Later.calls > 4  # after the measures before it, within the pictures

    with pytest.raises(Stopped):
        evaluate_run(configured(world, tmp_path, "eval.alignment_measures=[]"), Later())
    assert not (tmp_path / "eval" / "results.json").exists()


def test_masks_without_a_pixel_that_counts_are_refused(world: Path, tmp_path: Path) -> None:
    for number in range(PICTURES):
        Image.new("L", (WIDTH, HEIGHT), 255).save(tmp_path / f"{number}.png")
    empty = f"eval.segmentation.tiles.masks='{tmp_path}'"
    with pytest.raises(EvaluationError, match=r"No pixel of eval.segmentation.tiles counts"):
        evaluate_run(configured(world, tmp_path / "run", empty), StopRequest())


def test_an_encoder_other_than_that_of_the_head_is_refused(world: Path, tmp_path: Path) -> None:
    other = "encoders.image.vit.pooling=mean"
    with pytest.raises((EvaluationError, EncoderError), match="pooling"):
        evaluate_run(configured(world, tmp_path, other), StopRequest())
