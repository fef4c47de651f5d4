"""The store opens in everything that reads Zarr: the examples of docs/store.md are run."""

import contextlib
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from features.images import decode
from features.index import Index, SampleReader
from features.store import FeatureStore
from pipeline.interrupt import StopRequest
from pipeline.run.config import load_config
from pipeline.run.extract import extract
from pipeline.stores.convert import export_store
from tests import tiny
from tests.commands import sail
from tests.feature_stores import on_disk

ROOT = Path(__file__).parents[2]
EXAMPLES = [
    example
    for page in ("store.md", "formats.md")
    for example in re.findall(
        r"^With (\w\S*?)(?: project|, from [^\n]*)?:\n\n```python\n(.*?)```",
        (ROOT / "docs" / page).read_text(encoding="utf-8"),
        re.MULTILINE | re.DOTALL,
    )
]
FORMS = {"h5py": ("hdf5", "FILE"), "pyarrow": ("parquet", "FOLDER")}
FORMS["numpy"] = ("clip-retrieval", "FOLDER")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    run_file = tiny.world(tmp_path_factory.mktemp("world"))
    return FeatureStore.open(extract(load_config(str(run_file)), StopRequest())[0])


def test_the_pages_have_an_example_for_each_reader() -> None:
    assert [name for name, _ in EXAMPLES] == [
        "zarr-python",
        "xarray",
        "dask",
        "tensorstore",
        "h5py",
        "this",
        "pyarrow",
        "numpy",
    ]


@pytest.mark.parametrize(("name", "code"), EXAMPLES, ids=[name for name, _ in EXAMPLES])
def test_example_gives_the_rows_of_the_store(
    name: str, code: str, store: FeatureStore, tmp_path: Path
) -> None:
    scope: dict[str, Any] = {"STORE": str(store.path), "ENCODER": "vit"}
    if name in FORMS:
        form, variable = FORMS[name]
        scope[variable] = str(export_store(store.path, form, tmp_path / "out", StopRequest()))
    exec(code, scope)
    expected = store.column("image/vit").read(0, 100)
    found = {
        "mean": lambda: (scope["mean"], expected.astype(np.float32).mean(axis=0)),
        "norms": lambda: (scope["norms"].values, np.linalg.norm(expected.astype("f4"), axis=1)),
        "rows": lambda: (scope["rows"], expected[: len(scope["rows"])]),
        "features": lambda: (scope["features"], expected),
    }
    what = next(key for key in found if key in scope)
    np.testing.assert_allclose(*found[what](), rtol=1e-3)


def on_a_terminal(*arguments: str) -> str:
    """Call the command with a terminal as its output, and return what is shown there."""
    terminal, output = pty.openpty()
    fcntl.ioctl(output, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    environment = os.environ | {"TERM": "xterm-256color", "COLORTERM": "truecolor"}
    command = [sys.executable, "-m", "pipeline.cli", *arguments]
    child = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output)
    os.close(output)
    shown = b""
    with contextlib.suppress(OSError):  # so a terminal ends whose programs are gone
        while part := os.read(terminal, 65536):
            shown += part
    os.close(terminal)
    assert child.wait() == 0
    return shown.decode()


@pytest.mark.slow
def test_a_terminal_shows_the_image_of_a_row(store: FeatureStore) -> None:
    shown = on_a_terminal("inspect", str(store.path), "--row", "3")
    lines = [line for line in shown.splitlines() if "▀" in line]
    assert [line.count("▀") for line in lines] == [24] * 10  # 24 × 20 pixels
    index = on_disk(store.path).parent.parent / "index" / "train.parquet"
    image = decode(SampleReader(Index.open(index)).read_row(3) or b"", max_pixels=1000)
    (red, green, blue), below = image.getpixel((0, 0)), image.getpixel((0, 1))  # type: ignore[misc]
    assert f"38;2;{red};{green};{blue}" in lines[0]
    assert f"48;2;{';'.join(map(str, below))}m▀" in lines[0]  # type: ignore[arg-type]


def test_what_is_not_a_terminal_gets_no_picture(store: FeatureStore) -> None:
    assert "▀" not in sail("inspect", store.path, "--row", 3).stdout
