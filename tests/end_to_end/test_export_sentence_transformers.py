"""The text side of a run in sentence-transformers gives what the run gives."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from features.errors import EncoderError
from pipeline.export.exports import export_run
from pipeline.python import load_aligned
from tests import tiny
from tests.commands import sail, the_error_of
from tests.trained import trained

library: Any = pytest.importorskip("sentence_transformers", reason="it is not installed")

TEXTS = ["a red circle", "three blue squares left of a green star", "?"]


@pytest.mark.parametrize(
    "overrides",
    [
        [
            "align.head.kind=mlp",
            "encoders.text={minilm = {model = 'bundled:minilm'}}",
        ],
        ["align.head.kind=linear", "encoders.text.bert.pooling=cls"],
        [
            "align.head.kind=linear",
            "encoders.text.bert.pooling=last",
            "encoders.text.bert.instruction=a red: ",
            "encoders.text.bert.max_length=6",
        ],
    ],
    ids=["mlp, mean", "linear, cls", "linear, last token, instruction"],
)
def test_sentence_transformers_embeds_texts_as_the_run_does(
    overrides: list[str], tmp_path: Path
) -> None:
    # The closed form of 18 rows is steep: it makes more of the last bits of a feature.
    run = trained(tmp_path / "world", "align.start=random", *overrides)
    out = tmp_path / "out"
    sail("export", run, "--to", "sentence-transformers", "--out", out, "--with-encoders")
    found = library.SentenceTransformer(str(out), device="cpu").encode(TEXTS)
    aligned = load_aligned(run, device="cpu")
    features = torch.from_numpy(aligned.text_encoder.encode(TEXTS)).float()
    with torch.no_grad():
        exact = F.normalize(aligned.model.text_head(features), dim=-1).numpy()
    np.testing.assert_allclose(found, exact, atol=1e-5, rtol=0)
    np.testing.assert_allclose(found, aligned.encode_text(TEXTS), atol=5e-4, rtol=0)  # rounded
    assert np.abs(np.diff(found, axis=0)).max() > 1e-4  # the texts are told apart

    pictures = [tiny.reopened(tiny.picture(number)) for number in range(4)]
    found = library.SentenceTransformer(str(out), device="cpu").encode(pictures)
    encoded = [tiny.encoded(picture, "PNG") for picture in pictures]
    encoder = aligned.image_encoder
    pixels = torch.from_numpy(np.stack([encoder.prepare(each) for each in encoded]))
    (features,) = encoder.encode(pixels, [aligned.image_column])
    with torch.no_grad():
        exact = F.normalize(aligned.model.image_head(features.float()), dim=-1).numpy()
    np.testing.assert_allclose(found, exact, atol=1e-5, rtol=0)
    texts = aligned.encode_text(TEXTS)
    np.testing.assert_allclose(found @ texts.T, exact @ texts.T, atol=1e-5)


ALONE = """
import sys
import numpy as np
from PIL import Image
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(sys.argv[1], device="cpu")
image = model.encode([Image.open(sys.argv[2]).convert("RGB")])
np.save(sys.argv[3], model.similarity(image, model.encode(["a red circle", "?"])).numpy())
assert not {"pipeline", "features", "align", "evaluate"} & set(sys.modules)
"""


@pytest.mark.slow
def test_the_folder_needs_nothing_of_this_program(tmp_path: Path) -> None:
    run = trained(tmp_path / "world", "align.start=random", "align.head.kind=linear")
    out, photo = tmp_path / "out", tmp_path / "photo.png"
    sail("export", run, "--to", "sentence-transformers", "--out", out, "--with-encoders")
    tiny.picture(5).convert("RGB").save(photo)
    place = tmp_path / "elsewhere"
    place.mkdir()
    files = map(str, (out, photo, tmp_path / "cosines.npy"))
    subprocess.run([sys.executable, "-c", ALONE, *files], cwd=place, check=True)
    aligned = load_aligned(run, device="cpu")
    image, text = aligned.encode_image([photo]), aligned.encode_text(["a red circle", "?"])
    np.testing.assert_allclose(np.load(tmp_path / "cosines.npy"), image @ text.T, atol=5e-4)


@pytest.mark.slow
def test_an_image_side_that_it_cannot_express_is_left_out_and_the_log_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = trained(tmp_path / "world", "align.head.kind=linear", "encoders.image.vit.pooling=mean")
    out = tmp_path / "out"
    command = ("export", run, "--to", "sentence-transformers", "--out", out, "--with-encoders")
    sail(*command)
    assert "gets the text side alone: it has no pooling of images as 'mean'" in caplog.text
    assert not (out / "router_config.json").exists()
    assert "The text side of it" in (out / "README.md").read_text(encoding="utf-8")
    assert library.SentenceTransformer(str(out), device="cpu").encode(TEXTS).shape[0] == len(TEXTS)


def test_what_sentence_transformers_has_no_module_for_is_refused(tmp_path: Path) -> None:
    run = trained(tmp_path / "glu")
    form = "sentence-transformers"
    message = the_error_of(sail("export", run, "--to", form, "--out", tmp_path / "o", expect=1))
    assert re.search(r"of kind glu, for which .* was expected\. Train one with", message)
    run = trained(tmp_path / "mlp", "align.head.kind=mlp")  # from the closed form
    message = the_error_of(sail("export", run, "--to", form, "--out", tmp_path / "o", expect=1))
    assert "of kind mlp with a linear map beside it" in message
    run = trained(tmp_path / "linear", "align.head.kind=linear")
    with pytest.raises(EncoderError, match=r"licence is not known\. .* was expected\. Use --with"):
        export_run(run, form, tmp_path / "out")
    assert not (tmp_path / "out").exists()
