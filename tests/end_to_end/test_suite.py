"""Published suites: one command on data sets in their authors' layouts, and no run file."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

from features.class_lists import read_class_list
from features.config import TextEncoderConfig
from features.encoders import load_text_encoder
from features.store import FeatureStore
from pipeline.suites import SUITES, read_suite
from tests import published, tiny
from tests.commands import sail, the_error_of

GOLDENS = Path(__file__).resolve().parents[3] / "shared" / "goldens" / "sail_head_tiny"
HEAD = GOLDENS / "head_star.pt"
needs_goldens = pytest.mark.skipif(not HEAD.exists(), reason="the goldens are not there")


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Encoders of the lengths that the released head of the goldens reads: 2 × 6, and 20."""
    folder = tmp_path_factory.mktemp("encoders")
    tiny.image_encoder(folder / "image")
    tiny.text_encoder(folder / "text")
    sizes: dict[str, Any] = {"num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        image = ViTConfig(**sizes, hidden_size=6, intermediate_size=12, image_size=16, patch_size=8)
        ViTModel(image, add_pooling_layer=False).save_pretrained(folder / "image")
        vocabulary = json.loads((folder / "text/config.json").read_text())["vocab_size"]
        text = BertConfig(**sizes, hidden_size=20, intermediate_size=40, vocab_size=vocabulary)
        BertModel(text, add_pooling_layer=False).save_pretrained(folder / "text")
    return folder


def measured(
    name: str, head: Path, data: Path, out: Path, encoders: Path, *more: str
) -> tuple[dict[str, Any], str]:
    """Call the one command; return its results by name, and what it printed."""
    settings = [
        f"encoders.image.dinov2-large.model={encoders / 'image'}",
        "encoders.image.dinov2-large.precision=float32",
        f"encoders.text.nv-embed-v2.model={encoders / 'text'}",
        "encoders.text.nv-embed-v2.pooling=mean",
        "encoders.text.nv-embed-v2.max_length=32",
        "eval.bootstrap=0",
        *more,
    ]
    sets = [part for each in settings for part in ("--set", each)]
    command = ("eval", "--suite", name, "--head", head, "--data", data, "--out", out, *sets)
    printed = sail(*command).stdout
    (path,) = (Path(line) for line in printed.splitlines() if line.endswith("results.json"))
    rows = json.loads(path.read_text())["results"]
    return {f"{r['task']} {r['dataset']} {r['metric']}": r["value"] for r in rows}, printed


def released_side(weights: dict[str, torch.Tensor], side: str, features: np.ndarray) -> Any:
    """The released layer, from its description: y = g(ReLU6(±1e3 f1 LN(x)) · (±1e3 f2 LN(x)))."""

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        prefix = f"{side}_mapping_network.{name}"
        return F.linear(x, weights[f"{prefix}.weight"], weights[f"{prefix}.bias"])

    x = torch.from_numpy(features.astype(np.float32))
    norm = f"{side}_layer_norm"
    x = F.layer_norm(x, x.shape[1:], weights[f"{norm}.weight"], weights[f"{norm}.bias"])
    gates = [linear(name, x).clamp(-1e3, 1e3) for name in ("f1", "f2")]
    return F.normalize(linear("g", F.relu6(gates[0]) * gates[1]), dim=-1)


@needs_goldens
@pytest.mark.slow
def test_every_task_of_the_release_runs_by_one_command_and_equals_its_protocol(
    tmp_path: Path, encoders: Path
) -> None:
    data, out = published.root(tmp_path / "data"), tmp_path / "out"
    found, printed = measured("sail-released", HEAD, data, out, encoders)
    suite = read_suite("sail-released")
    names = {each.name for each in suite.sets}
    assert {name.split()[1].partition("/")[0] for name in found} == names
    assert "not found" not in printed
    (report,) = out.rglob("report.html")
    page = report.read_text(encoding="utf-8")
    section = page[page.index('id="published"') :]
    for each in suite.sets:
        for what, value in each.published.items():
            task, metric = what.rsplit(" ", 1)
            name = f"{task} {each.name} {metric}"
            shown = f"<td>{name}</td>.*?{value:.2f}.*?{100 * found[name]:.2f}"
            assert re.search(shown, section), name
    check_protocol(found, out, encoders)


def check_protocol(found: dict[str, Any], out: Path, encoders: Path) -> None:
    """Compare with the released protocols, written down here from their description."""
    loaded = torch.load(HEAD, weights_only=True)
    weights = loaded["state_dict"]
    stores = {path.stem: FeatureStore.open(path) for path in (out / "features").glob("*.zarr")}
    image = {
        name: released_side(
            weights, "vision", store.column("image/dinov2-large").read(0, store.rows)
        )
        for name, store in stores.items()
    }

    def texts(name: str) -> list[torch.Tensor]:
        store = stores[name]
        columns = [store.column(f"text/nv-embed-v2/{field}") for field in store.fields]
        return [released_side(weights, "text", each.read(0, store.rows)) for each in columns]

    # ImageNet: the mean of the normalised prompts of each class, normalised; the nearest one.
    settings = TextEncoderConfig(model=str(encoders / "text"), pooling="mean", max_length=32)
    encoder = load_text_encoder("x", settings, torch.device("cpu"))
    classes = read_class_list("imagenet-1k")
    prompts = [each.replace("{}", name) for name in classes.classes for each in classes.templates]
    prompted = released_side(weights, "text", encoder.encode(prompts).astype(np.float16))
    means = F.normalize(prompted.view(len(classes.classes), -1, prompted.shape[1]).mean(1), dim=-1)
    nearest = (image["imagenet"] @ means.T).argmax(dim=1).numpy()
    labels = stores["imagenet"].labels()
    assert found["zero_shot imagenet top1"] == pytest.approx(np.mean(nearest == labels), abs=1e-6)

    # Retrieval: recall@k of the images' captions, five each, and of the captions' images.
    for name in ("coco", "flickr30k"):
        fields = texts(name)
        count = len(image[name])
        every, owner = torch.cat(fields), torch.arange(count).repeat(len(fields))
        cosines = image[name] @ every.T
        for k in (1, 5, 10):
            hit = (owner[cosines.topk(k, dim=1).indices] == torch.arange(count)[:, None]).any(1)
            assert found[f"retrieval/image_to_text {name} recall@{k}"] == pytest.approx(
                hit.double().mean().item(), abs=1e-6
            )
            hit = (cosines.T.topk(min(k, count), dim=1).indices == owner[:, None]).any(1)
            assert found[f"retrieval/text_to_image {name} recall@{k}"] == pytest.approx(
                hit.double().mean().item(), abs=1e-6
            )

    # Winoground and MMVP: pairs of neighbours.
    for name in ("winoground", "mmvp"):
        (captions,) = texts(name)
        groups = torch.einsum("gid,gjd->gij", image[name].view(-1, 2, 16), captions.view(-1, 2, 16))
        text = (groups[:, 0, 0] > groups[:, 0, 1]) & (groups[:, 1, 1] > groups[:, 1, 0])
        images = (groups[:, 0, 0] > groups[:, 1, 0]) & (groups[:, 1, 1] > groups[:, 0, 1])
        for metric, right in (
            ("text_score", text),
            ("image_score", images),
            ("group_score", text & images),
        ):
            assert found[f"compositional {name} {metric}"] == pytest.approx(
                right.double().mean().item(), abs=1e-6
            )


@needs_goldens
@pytest.mark.slow
def test_what_is_absent_is_named_and_a_second_head_shares_the_features(
    tmp_path: Path, encoders: Path
) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    published.winoground(data)
    found, printed = measured("sail-released", HEAD, data, out, encoders)
    assert {name.split()[1] for name in found} == {"winoground"}
    absent = re.findall(r"^not found: (\S+) \((.*)\)$", printed, re.MULTILINE)
    names = {each.name for each in read_suite("sail-released").sets}
    assert {name for name, _ in absent} == names - {"winoground"}
    assert dict(absent)["imagenet"].endswith("ground_truth.txt or val/n01440764")
    assert "15.00" in printed

    before = {path: path.stat().st_mtime_ns for path in (out / "features").rglob("c/*")}
    other = tmp_path / "other.pt"
    shutil.copy(HEAD, other)
    for head in (HEAD, other):
        again, _ = measured("sail-released", head, data, out, encoders)
        assert again == found
    assert before == {path: path.stat().st_mtime_ns for path in (out / "features").rglob("c/*")}
    assert len(list((out / "heads").iterdir())) == 2


@needs_goldens
@pytest.mark.slow
def test_a_data_set_with_labels_alone_is_enough(tmp_path: Path, encoders: Path) -> None:
    pictures = [(tiny.encoded(tiny.picture(number)), number % 5) for number in range(6)]
    data = tmp_path / "data"
    published.write(data, "flowers-102", pictures)
    found, _ = measured("sail-released", HEAD, data, tmp_path / "out", encoders)
    assert "zero_shot flowers top1" in found


def test_a_head_of_a_run_brings_its_own_encoders(tmp_path: Path) -> None:
    run_file = tiny.world(tmp_path, rows=24)
    sail("extract", run_file)
    sail("align", run_file)
    published.winoground(tmp_path / "data")
    out = tmp_path / "out"
    command = ("--head", tmp_path / "run", "--data", tmp_path / "data", "--out", out)
    sail("eval", "--suite", "sail-released", *command)
    assert set(FeatureStore.open(out / "features/winoground.zarr").columns()) == {
        "image/vit",
        "text/bert/0",
    }


def test_what_cannot_be_measured_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    head = tmp_path / "head.pt"
    for name, place, data, why in [
        ("sail", head, tmp_path, "There is no suite 'sail'. One of"),
        ("sail-released", head, tmp_path / "nowhere", "is no folder"),
        ("sail-released", head, tmp_path / "empty", "has none of the data sets of the suite"),
    ]:
        error = the_error_of(
            sail("eval", "--suite", name, "--head", place, "--data", data, expect=1)
        )
        assert why in error
    published.winoground(tmp_path / "data")
    command = ("eval", "--suite", "sail-released", "--data", tmp_path / "data")
    error = the_error_of(sail(*command, "--head", head, expect=1))
    assert "There is no head" in error
    head.write_bytes(b"no head")
    error = the_error_of(sail(*command, "--head", head, expect=1))
    assert f"{head} " in error
    assert "--suite needs --head" in sail(*command, expect=2).stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", SUITES)
def test_every_suite_names_what_it_reads(name: str) -> None:
    suite = read_suite(name)
    for each in suite.sets:
        assert bool(each.split) != bool(each.segmentation)
        paths = [
            value
            for value in (each.split | each.segmentation).values()
            if isinstance(value, str) and "/" in value
        ]
        assert all(value.startswith("{here}/") for value in paths)
