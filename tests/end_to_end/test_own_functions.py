"""Encoders that are functions in a file beside the run file."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from features.config import ImageEncoderConfig, TextEncoderConfig
from features.encoders import load_image_encoder, load_text_encoder
from features.errors import ConfigError, EncoderError
from features.store import FeatureStore
from pipeline.python import load_aligned
from tests import tiny
from tests.commands import sail, the_error_of

CPU = torch.device("cpu")
MODULE = """
import numpy as np
import torch

WEIGHTS = torch.linspace(-1, 1, 3 * 8 * 8 * 5).reshape(192, 5)


def of_pictures(images):
    assert all(image.mode == "RGB" for image in images)
    return np.stack([np.asarray(image.resize((2, 2))).ravel()[:7] for image in images])


of_pictures.version = "mean colours 1"


def prepared(pixels):
    assert pixels.shape[1:] == (3, 8, 8)
    return pixels.flatten(1) @ WEIGHTS


prepared.version = "linear 1"
prepared.prepare = lambda image: np.asarray(image.resize((8, 8))).transpose(2, 0, 1) / 255


def of_captions(texts):
    return np.array([[len(text), text.count("a"), text.count("\\u00e9"), 1.0] for text in texts])


of_captions.version = "letters 1"
"""


def world(folder: Path, *, image: str = "of_pictures", text: str = "of_captions") -> Path:
    run_file = tiny.world(folder, rows=24)
    (folder / "mine.py").write_text(MODULE)
    content = run_file.read_text().replace('pooling = "cls"', "").replace("max_length = 32", "")
    content = content.replace('model = "vit"', f'model = "python:mine:{image}"')
    run_file.write_text(content.replace('model = "bert"', f'model = "python:mine:{text}"'))
    return run_file


def image(folder: Path, function: str, **settings: Any) -> Any:
    config = ImageEncoderConfig(model=f"python:{folder / 'mine.py'}:{function}", **settings)
    return load_image_encoder("x", config, CPU)


def text(folder: Path, function: str, **settings: Any) -> Any:
    config = TextEncoderConfig(model=f"python:{folder / 'mine.py'}:{function}", **settings)
    return load_text_encoder("x", config, CPU)


@pytest.mark.slow
@pytest.mark.parametrize("function", ["of_pictures", "prepared"])
def test_a_run_with_functions_beside_its_run_file(tmp_path: Path, function: str) -> None:
    run_file = world(tmp_path, image=function)
    for stage in ("extract", "align", "eval"):
        sail(stage, run_file)
    store = FeatureStore.open(tmp_path / "run" / "features" / "test.zarr")
    found = store.column("image/vit").read(0, 16)
    names: dict[str, Any] = {}
    exec(MODULE, names)
    rows = tiny.samples(16, first=1000)
    pictures = [tiny.reopened(tiny.picture(seed)) for seed in range(1000, 1016)]
    if function == "of_pictures":
        expected = names["of_pictures"]([each.convert("RGB") for each in pictures])
    else:
        pixels = np.stack([names["prepared"].prepare(each.convert("RGB")) for each in pictures])
        expected = names["prepared"](torch.from_numpy(pixels.astype(np.float32))).numpy()
    np.testing.assert_array_equal(found, expected.astype(np.float16))
    captions = [json.loads(data)["long"] for name, data in rows if name.endswith("json")]
    found = store.column("text/bert/long").read(0, 16)
    np.testing.assert_array_equal(found, names["of_captions"](captions).astype(np.float16))
    attributes = dict(store.column("image/vit").fingerprint)
    assert attributes["model"] == f"python:mine:{function}"
    assert list(attributes["files"]) == ["mine.py"]

    sail("extract", run_file)  # nothing changed
    changed = MODULE.replace(' 1"', ' 2"', 1)
    (tmp_path / "mine.py").write_text(changed)
    from features.encoders.own_functions import _module

    _module.cache_clear()  # as in a new process
    message = the_error_of(sail("extract", run_file, "--append", expect=1))
    assert "mine.py" in message


def test_captions_come_whole_and_in_order(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MODULE)
    texts = ["a", "naïvé", "b" * 5000, "\ud83d\ude00 aa", ""]
    encoder = text(tmp_path, "of_captions", instruction="é")
    found = encoder.encode(texts)
    expected = [[len(t) + 1, t.count("a"), t.count("é") + 1, 1] for t in texts]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("line", "function", "words"),
    [
        ("def f(x): return x", "f", "with the version None"),
        ("f = 3", "f", "is int with the version None"),
        ("import not_there_at_all", "f", "cannot be imported: .*not_there_at_all"),
        ("def f(x): return x", "g", "cannot be imported: AttributeError"),
        ("def f(x): raise KeyError('own')\nf.version = '1'", "f", "fails: KeyError: 'own'"),
        ("def f(x): return [1.0]\nf.version = '1'", "f", r"of shape \(1,\) for 1 inputs"),
        ("def f(x): return [['a']]\nf.version = '1'", "f", "fails: TypeError"),
    ],
)
def test_a_function_that_cannot_do_is_refused_in_one_line(
    tmp_path: Path, line: str, function: str, words: str
) -> None:
    (tmp_path / "mine.py").write_text(line)
    for load in (image, text):
        with pytest.raises(EncoderError, match=words) as caught:
            load(tmp_path, function)
        assert "\n" not in str(caught.value)


def test_what_a_function_decides_cannot_be_set(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MODULE)
    with pytest.raises(EncoderError, match="a function gives one vector"):
        image(tmp_path, "of_pictures", pooling="cls")
    with pytest.raises(EncoderError, match="has max_length = 5"):
        text(tmp_path, "of_captions", max_length=5)


def test_an_exported_folder_cannot_name_a_function(tmp_path: Path) -> None:
    """Of a stranger: its config.json must not lead to code."""
    (tmp_path / "mine.py").write_text("raise SystemExit('it ran')")
    own = {"model": f"python:{tmp_path / 'mine.py'}:f"}
    encoders = {"image": {"x": own}, "text": {"y": {"model": "text_encoder"}}}
    exported = {"encoders": encoders, "max_pixels": 1000}
    (tmp_path / "config.json").write_text(json.dumps({"exported": exported}))
    with pytest.raises(ConfigError, match="would run code"):
        load_aligned(tmp_path)
