"""The heads under the names of open_clip, put into a model by the lines of their card."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.export.exports import export_run
from pipeline.python import load_aligned
from pipeline.run.aligned import Aligned
from tests import tiny
from tests.commands import sail
from tests.trained import trained

TEXTS = ["a red circle", "three blue squares left of a green star", "?"]


class Towers(nn.Module):
    """Has its parts where a CustomTextCLIP of open_clip has them."""

    def __init__(self) -> None:
        super().__init__()
        self.visual, self.text = nn.Module(), nn.Module()
        self.logit_scale, self.logit_bias = (
            nn.Parameter(torch.ones([])),
            nn.Parameter(torch.ones([])),
        )


def with_heads(model: Any, out: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run the code of the card as it stands."""
    card = (out / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    names: dict[str, Any] = {}
    monkeypatch.chdir(out)
    monkeypatch.syspath_prepend(out)
    exec(code, names)
    return names["put_heads_into"](model)


@torch.no_grad()
def check_heads(model: Any, aligned: Aligned) -> None:
    image, text = torch.randn(3, 16), torch.randn(3, 12)
    torch.testing.assert_close(
        model.visual.head(image), aligned.model.image_head(image), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(
        model.text.proj(text), aligned.model.text_head(text), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(model.logit_scale, aligned.model.log_scale)
    torch.testing.assert_close(model.logit_bias, aligned.model.bias)


@pytest.mark.parametrize("kind", tiny.TRAINED_HEADS)
def test_the_card_puts_every_kind_of_head_into_a_model(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained(tmp_path / "world", f"align.head.kind={kind}", "align.epochs=1")
    sail("export", run, "--to", "open_clip")
    out = run / "export" / "open_clip"
    check_heads(with_heads(Towers(), out, monkeypatch), load_aligned(run, device="cpu"))


def test_open_clip_itself_embeds_texts_as_the_run_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_clip: Any = pytest.importorskip("open_clip", reason="open_clip is not installed")
    run = trained(tmp_path / "world", "encoders.text.bert.pooling=cls")
    out = export_run(run, "open_clip", tmp_path / "out")
    bert = str(tmp_path / "world" / "bert")
    text = {"hf_model_name": bert, "hf_tokenizer_name": bert, "context_length": 32}
    text |= {"hf_pooler_type": "cls_last_hidden_state_pooler", "hf_proj_type": "linear"}
    vision = {"timm_model_name": "resnet10t", "timm_pool": "avg", "image_size": 32}
    config = {"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    place = f"local-dir:{tmp_path / 'clip'}"
    model = open_clip.create_model(place, load_weights=False, init_logit_bias=0.0)
    aligned = load_aligned(run, device="cpu")
    encoder: Any = aligned.text_encoder.model
    model.text.transformer.load_state_dict(encoder.model.state_dict(), strict=False)  # no pooler
    model = with_heads(model, out, monkeypatch)
    check_heads(model, aligned)
    tokens = aligned.text_encoder.tokenise(TEXTS)
    longest = max(map(len, tokens))
    padded = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in tokens])
    with torch.no_grad():
        found = model.encode_text(padded, normalize=True).numpy()
    np.testing.assert_allclose(found, aligned.encode_text(TEXTS), atol=5e-4, rtol=0)  # rounded
