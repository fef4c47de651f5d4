"""One split without a usable picture does not end a run: the rest is done, the split is named."""

import json
from pathlib import Path

import pytest

from tests import tiny
from tests.commands import sail, the_error_of


@pytest.mark.slow
def test_a_split_of_broken_pictures_is_named_and_the_others_are_measured(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = '[data.broken]\nkind = "webdataset"\npath = "shards/broken.tar"\n'
    run_file = tiny.world(tmp_path, rows=16, extra=[broken])
    members = [
        (name, b"\xff\xd8\xff torn" if name.endswith(".jpg") else content)
        for name, content in tiny.samples(6, first=50)
    ]
    tiny.write_tar(tmp_path / "shards" / "broken.tar", members)
    said = the_error_of(sail("extract", run_file, expect=1))
    assert "broken.zarr/image/vit: truncated image 6" in said
    sail("align", run_file, "--set", "align.epochs=1")
    sail("eval", run_file, "--set", "align.epochs=1")
    assert "Compositional understanding on broken is left out" in caplog.text
    results = json.loads((tmp_path / "run" / "eval" / "results.json").read_text())["results"]
    assert {each["dataset"].partition("/")[0] for each in results} == {"test"}
    assert (
        "Compositional understanding on broken is left out"
        in (tmp_path / "run/eval/report.html").read_text()
    )
