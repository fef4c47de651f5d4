"""Loading a checkpoint, and being told what is wrong with one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from align.checkpoint import CheckpointFolder, Snapshot, load_head
from align.config import AlignConfig, HeadConfig
from align.heads import AlignmentModel, build_model
from features.errors import CheckpointError
from features.storage.fingerprint import differences
from pipeline.export.released import load_released

HEAD = HeadConfig(dim=4, depth=2, dropout=0.5)
RUN = {
    "align": AlignConfig(head=HEAD).model_dump(mode="json"),
    "seed": 0,
    "fields": ["short"],
    "store": {"rows": 20, "keys_sha256": "0"},
    "image": {"name": "eye", "dim": 3, "fingerprint": {"model": "m", "versions": {"torch": "2"}}},
    "text": {"name": "reader", "dim": 5, "fingerprint": {}},
}


def write(path: Path, step: int = 10, best_step: int = 10) -> AlignmentModel:
    model = build_model(dict(HEAD), image_dim=3, text_dim=5)
    metadata: dict[str, Any] = {"step": step, "epoch": 1.0, "best_step": best_step}
    metadata |= {"finished": False, "heldout": {}, "run": RUN}
    snapshot = Snapshot(step, dict(model.state_dict()), metadata)
    folder = CheckpointFolder(path)
    folder.resume(RUN)
    folder.save(snapshot, {"0/step": torch.tensor(1.0)}, None)
    return model


def test_a_loaded_model_embeds_as_the_saved_one_without_dropout(tmp_path: Path) -> None:
    model = write(tmp_path).eval()
    loaded, checkpoint = load_head(tmp_path / "best")
    image, text = torch.randn(6, 3), torch.randn(6, 5)
    assert torch.equal(loaded.embed_image(image), model.embed_image(image))
    assert torch.equal(loaded.embed_text(text), model.embed_text(text))
    assert not loaded.training
    assert not any(weight.requires_grad for weight in loaded.parameters())
    assert (checkpoint.step, checkpoint.image["name"], checkpoint.head) == (10, "eye", HEAD)
    assert len(checkpoint.sha256) == 64


def test_a_path_without_a_checkpoint_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"There is no checkpoint at .*Train one with `sail al"
    ):
        load_head(tmp_path / "best")


def test_a_checkpoint_cut_off_is_said_so(tmp_path: Path) -> None:
    write(tmp_path)
    file = tmp_path / "best" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        load_head(tmp_path / "best")


def test_weights_of_another_head_are_refused_by_name_and_shape(tmp_path: Path) -> None:
    write(tmp_path)
    file = tmp_path / "best" / "model.safetensors"
    weights = load_file(file)
    weights["text_head.layers.0.gated.bias"] = torch.zeros(7)
    save_file(weights, file)
    config = tmp_path / "best" / "config.json"  # as an earlier version wrote it, without hashes
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sha256": {}}))
    with pytest.raises(CheckpointError, match=r"gated\.bias of shape \(7,\), but .* has \(8,\)"):
        load_head(tmp_path / "best")


def test_a_checkpoint_of_another_format_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    file = tmp_path / "best" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format_version": 9}))
    with pytest.raises(CheckpointError, match="version 9"):
        load_head(tmp_path / "best")


@pytest.mark.parametrize("text", [b"[]", b"\xff{}", b'{"format": '])
def test_a_description_that_is_none_is_said_so(tmp_path: Path, text: bytes) -> None:
    write(tmp_path)
    (tmp_path / "best" / "config.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        load_head(tmp_path / "best")


def test_only_the_last_and_the_best_are_kept_and_only_the_last_can_be_gone_on_from(
    tmp_path: Path,
) -> None:
    write(tmp_path, step=1, best_step=1)
    write(tmp_path, step=2, best_step=1)
    write(tmp_path, step=3, best_step=1)
    folders = {path.name: {file.name for file in path.iterdir()} for path in
               (tmp_path / "checkpoints").iterdir()}  # fmt: skip
    assert folders == {
        "step-00000001": {"model.safetensors", "config.json"},
        "step-00000003": {"model.safetensors", "config.json", "state.safetensors"},
    }
    assert load_head(tmp_path / "best")[1].step == 1
    assert load_head(tmp_path / "last")[1].step == 3


def test_other_library_versions_are_no_reason_to_refuse(tmp_path: Path) -> None:
    write(tmp_path)
    image = {"name": "eye", "dim": 3, "fingerprint": {"model": "m", "versions": {"torch": "3"}}}
    assert CheckpointFolder(tmp_path).resume({**RUN, "image": image}) is not None
    image["fingerprint"] = {"model": "another"}
    with pytest.raises(CheckpointError, match=r"image\.fingerprint\.model = 'm'.*'another'"):
        CheckpointFolder(tmp_path).resume({**RUN, "image": image})


def test_differences_are_named_by_their_place() -> None:
    found = {"a": {"b": 1, "c": [1, 2]}, "d": 4}
    assert differences(found, {"a": {"b": 2, "c": [1, 2]}}) == [("a.b", 1, 2), ("d", 4, None)]


def test_a_file_that_is_no_released_head_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {"weight": torch.zeros(3)}}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="is not a released SAIL head"):
        load_released(tmp_path / "other.pt")
    (tmp_path / "junk.pt").write_bytes(b"not a checkpoint at all")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_released(tmp_path / "junk.pt")


def test_a_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": Path("/tmp")}, tmp_path / "code.pt")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_released(tmp_path / "code.pt")


def test_a_head_of_a_kind_that_is_not_known_is_refused_by_its_name(tmp_path: Path) -> None:
    write(tmp_path)
    config = tmp_path / "last" / "config.json"
    text = config.read_text().replace('"kind": "glu"', '"kind": "maxout"')
    config.write_text(json.dumps(json.loads(text) | {"sha256": {}}))
    with pytest.raises(CheckpointError, match=r"'kind': 'maxout'.*One of the kinds .*'star'.* was"):
        load_head(tmp_path / "last")


def released_mlp(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    """Tensors of an mlp head in the released layout: features of 3 and 4, embeddings of 2."""
    weights = {"logit_scale": torch.tensor([2.0]), "logit_bias": torch.tensor([-10.0])}
    for modality, features in [("vision", 3), ("text", 4)]:
        weights[f"{modality}_layer_norm.weight"] = torch.rand(features)
        weights[f"{modality}_layer_norm.bias"] = torch.rand(features)
        for layer, rows, columns in [(0, 2 * features, features), (2, 2, 2 * features)]:
            name = f"{modality}_mapping_network.proj.{layer}"
            weights |= {
                f"{name}.weight": torch.rand(rows, columns),
                f"{name}.bias": torch.rand(rows),
            }
    return weights | changes


def test_a_released_mlp_is_its_formula(tmp_path: Path) -> None:
    weights = released_mlp()
    torch.save(weights, tmp_path / "mlp.pt")  # without the dictionary around it
    model, head = load_released(tmp_path / "mlp.pt")
    assert (head.kind, head.dim, head.expansion) == ("mlp", 2, 2)
    x = torch.rand(5, 4)

    def tensors(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return weights[f"text_{name}.weight"], weights[f"text_{name}.bias"]

    gamma, beta = tensors("layer_norm")
    hidden = F.linear(F.layer_norm(x, (4,)) * gamma + beta, *tensors("mapping_network.proj.0"))
    expected = F.linear(F.gelu(hidden), *tensors("mapping_network.proj.2"))
    torch.testing.assert_close(model.embed_text(x), expected)
    assert model.log_scale.item() == 2.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"surplus": torch.zeros(1)}, r"surplus of shape \(1,\)"),
        ({"vision_layer_norm.bias": torch.zeros(7)}, r"vision_layer_norm.bias of shape"),
        ({"text_mapping_network.proj.0.weight": torch.zeros(8)}, "has no matrix text_mapping"),
        ({"text_mapping_network.proj.0.weight": torch.zeros(12, 4)}, "heads of other forms"),
    ],
)
def test_a_released_head_with_a_tensor_too_many_or_of_another_shape_is_refused(
    changes: dict[str, torch.Tensor], message: str, tmp_path: Path
) -> None:
    torch.save({"state_dict": released_mlp(**changes)}, tmp_path / "head.pt")
    with pytest.raises(CheckpointError, match=message):
        load_released(tmp_path / "head.pt")


def test_a_released_head_that_lacks_a_tensor_is_refused(tmp_path: Path) -> None:
    weights = released_mlp()
    del weights["text_layer_norm.bias"]
    torch.save({"state_dict": weights}, tmp_path / "head.pt")
    with pytest.raises(CheckpointError, match=r"text_layer_norm\.bias of shape \(4,\) is missing"):
        load_released(tmp_path / "head.pt")
