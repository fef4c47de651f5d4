"""A broken encoder ends a run before its first row is indexed; changed files are named."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import zarr
from safetensors.torch import load_file, save_file

from features.storage.fingerprint import Fingerprint
from tests import tiny
from tests.commands import sail, the_error_of
from tests.text_models import transformers_model


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")


def quantised(folder: Path) -> None:
    change_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})


def adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))


def larger_vocabulary(folder: Path) -> None:
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"]["new"] = 500
    path.write_text(json.dumps(tokenizer))


def other_shape(folder: Path) -> None:
    change_config(folder, intermediate_size=25)


def own_code(folder: Path) -> None:
    change_config(folder, auto_map={"AutoModel": "someone/code--own.Model"})


def lora_within(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["encoder.layer.0.attention.self.query.lora_A.weight"] = weights[
        "embeddings.LayerNorm.bias"
    ].clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def nested_too_deep(folder: Path) -> None:
    (folder / "config.json").write_text('{"a":' * 5000 + "1" + "}" * 5000)


def adapter_alone(folder: Path) -> None:
    adapter(folder)
    (folder / "config.json").unlink()
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")


def change_config(folder: Path, **settings: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


NAMES = ("image/vit", "text/bert")
BROKEN = {
    cut: r"model\.safetensors has \d+ bytes and should have \d+",
    pointer: "is a pointer of Git LFS",
    quantised: r"are quantised \(gptq\)",
    adapter: r"an adapter \(LORA\) belongs to the weights",
    adapter_alone: "holds an adapter .* without the model",
    larger_vocabulary: "tokens up to number 500, but the model has 19",
    other_shape: r"\(24,\), where \(25,\) was expected",
    own_code: r"code of its own, 'someone/code--own\.Model'",
    lora_within: "1 weights of an adapter",
    nested_too_deep: r"config\.json cannot be read",
}


@pytest.mark.parametrize("damage", list(BROKEN), ids=lambda damage: damage.__name__)
def test_a_broken_text_encoder_ends_the_run_before_the_index(tmp_path: Path, damage) -> None:  # type: ignore[no-untyped-def]
    run_file = tiny.world(tmp_path, rows=8)
    damage(tmp_path / "bert")
    done = sail("extract", run_file, expect=1)
    assert re.search(BROKEN[damage], the_error_of(done))
    assert not (tmp_path / "run").exists()


def test_doctor_tells_the_same(tmp_path: Path) -> None:
    run_file = tiny.world(tmp_path, rows=8)
    pointer(tmp_path / "bert")
    done = sail("doctor", run_file, "--json", expect=1)
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert checks["text/bert"]["status"] == "broken"
    assert "is a pointer of Git LFS" in checks["text/bert"]["found"]
    assert checks["image/vit"]["status"] == "ok"


@pytest.mark.parametrize(
    ("name", "file"),
    [("bert", "config.json"), ("bert", "tokenizer.json"), ("vit", "preprocessor_config.json")],
)
def test_a_changed_file_is_refused_by_name_and_nothing_is_appended(
    tmp_path: Path, name: str, file: str
) -> None:
    run_file = tiny.world(tmp_path, rows=8)
    sail("extract", str(run_file))
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    path = tmp_path / name / file
    path.write_text(path.read_text() + "\n")
    tiny.write_tar(tmp_path / "shards" / "train-2.tar", tiny.samples(4, first=50))
    done = sail("extract", run_file, "--append", expect=1)
    assert f"files.{file}" in the_error_of(done)
    after = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert after == before


def test_a_column_of_an_earlier_build_is_compared_in_what_it_recorded() -> None:
    now = {"model": "m", "pooling": "mean", "max_length": 256, "files": {"config.json": "a"}}
    before = {name: value for name, value in now.items() if name != "files"}
    assert Fingerprint(before).differences(now) == []
    assert Fingerprint(now).differences(before) == []
    other = now | {"files": {"config.json": "b"}}
    assert Fingerprint(now).differences(other) == [("files.config.json", "a", "b")]
    assert Fingerprint(before).differences(now | {"behind": ["Dense"]}) != []


def test_a_column_holds_the_digests_of_its_files(tmp_path: Path) -> None:
    run_file = tiny.world(tmp_path, rows=8)
    train = sail("extract", run_file).stdout.split()[0]
    attributes: Any = [zarr.open_group(f"{train}/{name}").attrs.asdict() for name in NAMES]
    found = dict(zip(NAMES, (sorted(each["files"]) for each in attributes), strict=True))
    assert found == {
        "image/vit": ["config.json", "preprocessor_config.json"],
        "text/bert": ["config.json", "tokenizer.json", "tokenizer_config.json"],
    }


def test_the_plan_of_a_model_is_printed_with_what_says_it(tmp_path: Path) -> None:
    folder = transformers_model(tmp_path / "llama", "llama")
    done = sail("encoders", folder, expect=1)
    assert "Set `pooling` of the text encoder" in the_error_of(done)
    options = ["--set", "pooling=last", "--set", "end_token=true", "--json"]
    (plan,) = json.loads(sail("encoders", folder, *options).stdout)
    assert plan["plan"]["pooling"] == {"value": "last", "from": "the recipe"}
    assert plan["plan"]["attention"] == {"value": "causal", "from": "its type"}
    assert plan["plan"]["max_length"] == {"value": 200, "from": "positions in config.json"}
    assert set(plan["files"]) == {"config.json", "tokenizer.json", "tokenizer_config.json"}
    table = sail("encoders", tiny.image_encoder(tmp_path / "vit")).stdout
    assert "processor" in table
    assert "preprocessor_config.json" in table
