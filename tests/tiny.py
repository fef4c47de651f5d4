"""Small real parts: JPEGs in tars, and random-weight models of real transformers classes."""

import io
import json
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, ViTConfig, ViTModel

from align.heads import HEADS

TRAINED_HEADS = [kind for kind in HEADS if kind != "none"]
"""Those that have something to learn, and map features of any length."""
WORDS = [
    *("a", "the", "red", "green", "blue", "circle", "square", "star"),
    *("left", "right", "of", "above", "below", "large", "small"),
]


def picture(seed: int, width: int = 24, height: int = 20) -> Image.Image:
    """A picture of noise, different for each seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, form: str = "JPEG") -> bytes:
    """An image as the bytes of a file."""
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


def caption(seed: int) -> str:
    """A caption of known words, mostly different for each seed."""
    random = np.random.default_rng(seed)
    return " ".join(random.choice(WORDS, size=int(random.integers(3, 9))))


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    """Write a tar of regular files in the order given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def samples(count: int, first: int = 0) -> list[tuple[str, bytes]]:
    """Members of `count` good samples with a short and a long caption, a label and a group."""
    members = []
    for seed in range(first, first + count):
        record = {
            "short": caption(seed % 5),
            "long": caption(seed),
            "label": seed % 5,
            "group": seed // 2,
        }
        members += [
            (f"{seed:05d}.jpg", encoded(picture(seed))),
            (f"{seed:05d}.json", json.dumps(record).encode()),
        ]
    return members


def reopened(image: Image.Image) -> Image.Image:
    """A picture as a JPEG gives it back, since what that decodes to is what counts."""
    return Image.open(io.BytesIO(encoded(image)))


def vit_config(*, num_hidden_layers: int = 1) -> ViTConfig:
    """The smallest vision transformer that is one."""
    return ViTConfig(
        hidden_size=16,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=16,
        patch_size=8,
    )


def image_encoder(folder: Path) -> Path:
    """A vision transformer of random weights in Hugging Face layout; 16 features."""
    return _write(folder, _image_encoder())


def text_encoder(folder: Path) -> Path:
    """A BERT of random weights and its tokenizer in Hugging Face layout; 12 features."""
    return _write(folder, _text_encoder())


def _write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def _files(save: Callable[[Path], object]) -> dict[str, bytes]:
    """Return what a function saves in a folder."""
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder))
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@cache  # nearly every test of extraction begins with these
def _image_encoder() -> dict[str, bytes]:
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": 16, "width": 16},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "resample": 2,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        files = _files(ViTModel(vit_config(), add_pooling_layer=False).save_pretrained)
    return files | {"preprocessor_config.json": json.dumps(processor).encode()}


@cache
def _text_encoder() -> dict[str, bytes]:
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        files = _files(BertModel(config, add_pooling_layer=False).save_pretrained)
    return files | _files(fast.save_pretrained)


def world(folder: Path, *, rows: int = 40, extra: Sequence[str] = ()) -> Path:
    """Shards, encoders and a run file that joins them; returns the run file."""
    half = rows // 2
    write_tar(folder / "shards" / "train-0.tar", samples(half))
    write_tar(folder / "shards" / "train-1.tar", samples(rows - half, first=half))
    write_tar(folder / "shards" / "test-0.tar", samples(16, first=1000))
    (folder / "shards" / "classes.txt").write_text("one\ntwo\nthree\nfour\nfive\n")
    image_encoder(folder / "vit")
    text_encoder(folder / "bert")
    run_file = folder / "tiny.toml"
    run_file.write_text(
        f"""
[run]
dir = "{folder / "run"}"
threads = 1
[data.train]
kind = "webdataset"
path = "shards/train-*.tar"
class_names = "shards/classes.txt"
[data.test]
kind = "webdataset"
path = "shards/test-*.tar"
class_names = "shards/classes.txt"
[encoders.image.vit]
model = "vit"
pooling = "cls"
batch_size = 4
[encoders.text.bert]
model = "bert"
max_length = 32
[extract]
rows_per_chunk = 8
workers = 2
[align]
batch_size = 8
epochs = 3
holdout = 0.2
head = {{ kind = "glu", dim = 8, depth = 2 }}
[eval]
retrieval = ["test"]
bootstrap = 50
knn_k = [3]
"""
        + "\n".join(extra)
    )
    return run_file


def mixed_world(folder: Path) -> Path:
    """A run file like that of `world`, which mixes two splits, none of them named `train`."""
    run_file = world(folder, rows=24)
    text = run_file.read_text().replace("[data.train]", "[data.one]").replace("train-*", "train-0")
    run_file.write_text(
        text.replace("[align]", "[align]\nmix = { one = 1.0, two = 1.0 }")
        + '[data.two]\nkind = "webdataset"\npath = "shards/train-1.tar"\n'
        + 'class_names = "shards/classes.txt"\n'
    )
    return run_file
