"""Stage one from tars to stores, with small real encoders."""

import io
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoTokenizer, ViTConfig, ViTImageProcessorPil, ViTModel

from features.config import TextEncoderConfig
from features.encoders import TextEncoder, load_text_encoder
from features.errors import SourceError, StoreMismatchError
from features.extract import Phases, log_faults
from features.images import reads_heic
from features.status import Status
from features.store import FeatureStore
from pipeline.interrupt import Stopped, StopRequest
from pipeline.run.config import load_config
from pipeline.run.extract import extract
from pipeline.stores.inspect import describe_row, describe_store
from pipeline.stores.verify import verify_store
from tests import text_models, tiny
from tests.feature_stores import StopBeforeChunks, on_disk, store_digests


def extracted(run_file: Path, *overrides: str) -> FeatureStore:
    """Run stage one and open the training store."""
    stores = extract(load_config(str(run_file), overrides), StopRequest())
    return FeatureStore.open(stores[0])


def test_image_features_are_those_of_transformers_called_directly(tmp_path: Path) -> None:
    store = extracted(tiny.world(tmp_path))
    model = AutoModel.from_pretrained(tmp_path / "vit", add_pooling_layer=False).eval()
    processor = ViTImageProcessorPil.from_pretrained(tmp_path / "vit")
    # What a JPEG decodes to is what counts, so the picture goes through its file form here too.
    images = [Image.open(io.BytesIO(tiny.encoded(tiny.picture(seed)))) for seed in (0, 33)]
    with torch.inference_mode():
        pixels = processor(images, return_tensors="pt")["pixel_values"]
        expected = model(pixel_values=pixels).last_hidden_state[:, 0].numpy()
    features = store.column("image/vit").read(0, store.rows)
    np.testing.assert_allclose(features[[0, 33]].astype(np.float32), expected, atol=2e-3)


def test_caption_features_are_the_masked_mean_of_transformers(tmp_path: Path) -> None:
    store = extracted(tiny.world(tmp_path))
    model = AutoModel.from_pretrained(tmp_path / "bert", add_pooling_layer=False).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "bert")
    features = store.column("text/bert/long").read(0, store.rows)
    for row in (0, 7, 39):
        with torch.inference_mode():
            tokens = tokenizer([tiny.caption(row)], return_tensors="pt")
            output = model(input_ids=tokens["input_ids"]).last_hidden_state[0].mean(0).numpy()
        np.testing.assert_allclose(features[row].astype(np.float32), output, atol=2e-3)


def test_a_local_nv_embed_gives_caption_features_like_any_text_encoder(tmp_path: Path) -> None:
    text_models.nvembed(tmp_path / "nv", shards=2)
    extra = ["[encoders.text.nv]", 'model = "nv"', "max_length = 20", 'instruction = "Query: "']
    store = extracted(tiny.world(tmp_path, extra=extra))
    config = TextEncoderConfig(
        model=str(tmp_path / "nv"), max_length=20, instruction="Query: ", tokens_per_batch=1
    )
    encoder = load_text_encoder("nv", config, torch.device("cpu"))
    captions = [tiny.caption(row) for row in range(store.rows)]
    features = store.column("text/nv/long").read(0, store.rows).astype(np.float32)
    np.testing.assert_allclose(features, encoder.encode(captions), atol=1e-3)
    assert store.column("text/nv/long").fingerprint["licence"] == "cc-by-nc-4.0"


def test_captions_longer_than_the_encoder_reads_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_file = tiny.world(tmp_path)
    run_file.write_text(run_file.read_text().replace("max_length = 32", "max_length = 9"))
    with caplog.at_level("INFO"):
        store = extracted(run_file)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "bert")
    for field in store.fields:  # `short` has but five texts, each encoded once
        ids = tokenizer(store.captions(field).tolist())["input_ids"]
        longer = sum(len(tokens) > 9 for tokens in ids)
        assert 0 < longer < 40
        (line,) = [each for each in caplog.messages if f"text/bert/{field}: 40 rows" in each]
        assert f"0 not ok, {longer} captions cut at the encoder's length;" in line


def test_rows_keep_the_order_of_shards_with_key_captions_label_and_group(tmp_path: Path) -> None:
    store = extracted(tiny.world(tmp_path))
    assert store.keys(19, 21).tolist() == ["train-0/00019", "train-1/00020"]
    assert store.fields == ("long", "short")
    assert store.captions("long", 20, 21).tolist() == [tiny.caption(20)]
    labels, groups = store.labels(), store.groups()
    assert labels is not None
    assert groups is not None
    assert labels[:6].tolist() == [0, 1, 2, 3, 4, 0]
    assert groups[:4].tolist() == [0, 0, 1, 1]
    assert store.class_names == ("one", "two", "three", "four", "five")


def test_a_second_run_computes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_file = tiny.world(tmp_path)
    extracted(run_file)
    monkeypatch.setattr("features.storage.column.Column.write", None)  # a call would be a TypeError
    extracted(run_file)


@pytest.fixture
def _without_heif(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if the extra `heif` were not installed."""
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    reads_heic.cache_clear()
    yield
    reads_heic.cache_clear()


@pytest.mark.usefixtures("_without_heif")
def test_bad_images_keep_their_row_and_say_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_file = tiny.world(tmp_path)
    jpeg = tiny.encoded(tiny.picture(3, 64, 64))
    huge = tiny.encoded(Image.new("L", (400, 300)), "PNG")
    tiny.write_tar(
        tmp_path / "shards" / "train-1.tar",
        [
            ("cut.jpg", jpeg[: len(jpeg) // 2]),
            ("cut.json", b'{"short": "a", "long": "b"}'),
            ("text.jpg", b"this is no picture"),
            ("text.json", b'{"short": "a", "long": "b"}'),
            ("phone.heic", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"),
            ("empty.jpg", b""),
            ("empty.json", b'{"short": "a", "long": "b"}'),
            ("mute.jpg", jpeg),
            ("huge.png", huge),
            ("huge.json", b'{"short": "a", "long": "b"}'),
            ("twin.jpg", jpeg),
            ("twin.json", b'{"short": "a", "long": "b"}'),
            ("blind.json", b'{"short": "a", "long": "b"}'),
            ("twin.jpg", jpeg),
            ("twin.json", b'{"short": "a", "long": "b"}'),
        ],
    )
    store = extracted(run_file, "extract.max_pixels=100000")
    status = dict(zip(store.keys().tolist(), store.column("image/vit").status(), strict=True))
    expected = {
        "cut": Status.TRUNCATED_IMAGE,
        "text": Status.NOT_AN_IMAGE,
        "phone": Status.NOT_AN_IMAGE,
        "empty": Status.EMPTY_IMAGE,
        "mute": Status.OK,
        "huge": Status.IMAGE_TOO_LARGE,
        "twin": Status.OK,
        "blind": Status.MISSING_IMAGE,
        "twin#2": Status.DUPLICATE_KEY,
    }
    assert {name: status[f"train-1/{name}"] for name in expected} == expected
    texts = dict(zip(store.keys().tolist(), store.column("text/bert/long").status(), strict=True))
    assert "(train-1/phone): not an image, it is HEIC" in caplog.text
    assert texts["train-1/mute"] == Status.MISSING_CAPTION
    assert texts["train-1/twin#2"] == Status.DUPLICATE_KEY
    assert texts["train-1/blind"] == Status.OK
    counts = describe_store(store.path)["columns"]["image/vit"]["status"]
    assert sum(counts.values()) == store.rows == 29
    assert counts["truncated image"] == 1
    assert verify_store(store.path) == []
    bad = store.keys().tolist().index("train-1/empty")
    assert describe_row(store.path, bad)["columns"]["image/vit"]["status"] == "empty image"


def test_how_many_workers_share_a_batch_changes_no_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_file = tiny.world(tmp_path)
    members = [(name, b"" if name == "00025.jpg" else data) for name, data in tiny.samples(20, 20)]
    tiny.write_tar(tmp_path / "shards" / "train-1.tar", members)
    batches = "encoders.image.vit.batch_size=8"
    column = extracted(run_file, batches).column("image/vit")
    assert (column.status() == Status.EMPTY_IMAGE).sum() == 1
    for rows in (1, 3):
        monkeypatch.setattr("features.extract.PART_ROWS", rows)
        extracted(run_file, batches, f"run.dir='{tmp_path / str(rows)}'")
        assert store_digests(tmp_path / str(rows)) == store_digests(tmp_path / "run")


def test_another_pooling_is_refused_by_name(tmp_path: Path) -> None:
    run_file = tiny.world(tmp_path)
    extracted(run_file)
    with pytest.raises(StoreMismatchError, match=r"image/vit has dim = 16, .* expects 32"):
        extracted(run_file, "encoders.image.vit.pooling='cls+mean'")
    with pytest.raises(StoreMismatchError, match=r"pooling = 'cls', .* expects 'mean'"):
        extracted(run_file, "encoders.image.vit.pooling='mean'")


def test_other_weights_are_refused_by_name(tmp_path: Path) -> None:
    run_file = tiny.world(tmp_path)
    extracted(run_file)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        config = ViTConfig.from_pretrained(tmp_path / "vit")
        ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "vit")
    with pytest.raises(StoreMismatchError, match="weights_sha256"):
        extracted(run_file)


def test_a_shard_that_changed_after_indexing_is_refused_by_name(tmp_path: Path) -> None:
    run_file = tiny.world(tmp_path)
    extracted(run_file)
    tiny.write_tar(tmp_path / "shards" / "train-1.tar", tiny.samples(21, first=50))
    with pytest.raises(SourceError, match=r"train-1\.tar has changed since it was indexed"):
        extracted(run_file)


def test_features_stay_where_shards_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_file = tiny.world(tmp_path)
    extracted(run_file)
    (tmp_path / "shards").rename(tmp_path / "moved")
    text = run_file.read_text(encoding="utf-8")
    run_file.write_text(text.replace("shards/", "moved/"), encoding="utf-8")
    monkeypatch.setattr("features.storage.column.Column.write", None)  # a call would be a TypeError
    store = extracted(run_file)
    assert store.source["path"] == str(tmp_path / "moved" / "train-*.tar")


def test_too_many_bad_rows_stop_the_run_when_asked_to(tmp_path: Path) -> None:
    run_file = tiny.world(tmp_path)
    tiny.write_tar(tmp_path / "shards" / "train-0.tar", [("x.jpg", b""), ("x.txt", b"a")])
    with pytest.raises(SourceError, match="1 of 21 rows"):
        extracted(run_file, "extract.max_bad_fraction=0.01", "data.train.captions=['long']")


def test_keys_cannot_steer_the_terminal(caplog: pytest.LogCaptureFixture) -> None:
    log_faults(["row 1 (Ü/\u001b[31m\u000a\u202e): missing image"], Phases())
    assert caplog.messages == [r"quarantined row 1 (Ü/\u001b[31m\u000a\u202e): missing image"]


def test_a_stop_request_ends_after_the_chunk_at_hand_and_the_next_run_goes_on(
    tmp_path: Path,
) -> None:
    run_file = tiny.world(tmp_path)
    whole = extracted(run_file)
    expected = whole.column("image/vit").read(0, whole.rows)

    config = load_config(str(run_file), [f"run.dir='{tmp_path / 'other'}'"])
    with pytest.raises(Stopped):
        extract(config, StopBeforeChunks(tmp_path / "other"))
    store = FeatureStore.open(tmp_path / "other" / "features" / "train.zarr")
    assert len(store.column("image/vit").pending()) == 5
    extract(config, StopRequest())
    np.testing.assert_array_equal(store.column("image/vit").read(0, store.rows), expected)


def test_features_that_are_not_finite_are_quarantined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overflow(_model: object, pixels: torch.Tensor, _wanted: object) -> list[torch.Tensor]:
        features = pixels.flatten(1)[:, :16] * 1.0
        if len(features) == 1:  # the trial, which ends the command where it is not finite
            return [features]
        features[0] = 1e6  # more than float16 holds
        features[1:2] = torch.nan
        return [features]

    monkeypatch.setattr("features.encoders.image.pool_image", overflow)
    store = extracted(tiny.world(tmp_path))
    column = store.column("image/vit")
    assert column.status()[:4].tolist() == [Status.NOT_FINITE] * 2 + [Status.OK] * 2
    assert (column.status() == Status.NOT_FINITE).sum() == 20
    assert not column.read(0, 2).any()
    assert column.read(2, 4).any(axis=1).all()
    assert verify_store(store.path) == []


def test_equal_captions_of_all_chunks_are_encoded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    encode = TextEncoder.encode_tokens

    def counted(self, ids, *others, **options):  # type: ignore[no-untyped-def]
        seen.append(len(ids))
        return encode(self, ids, *others, **options)

    run_file = tiny.world(tmp_path)
    extracted(run_file)  # so that the encoder is known, and not tried again
    column = FeatureStore.open(tmp_path / "run/features/train.zarr").column("text/bert/short")
    right = column.read(0, column.rows)
    shutil.rmtree(tmp_path / "run" / "features")
    monkeypatch.setattr(TextEncoder, "encode_tokens", counted)
    store = extracted(run_file)
    assert seen.count(5) == 2  # `short` has five different captions in each of both splits
    assert sum(seen) == 5 + 40 + 5 + 16
    np.testing.assert_array_equal(store.column("text/bert/short").read(0, 40), right)
    on_disk(store.column("text/bert/short").status_file(3)).unlink()
    np.testing.assert_array_equal(extracted(run_file).column("text/bert/short").read(0, 40), right)
