"""The store opens in everything that reads Zarr: the examples of docs/store.md are run."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from features.store import FeatureStore
from pipeline.config import load_config
from pipeline.formats.exporting import export_store
from pipeline.interrupt import StopRequest
from pipeline.run import extract
from tests import tiny

EXAMPLES = re.findall(
    r"^With (\w\S*?)(?: project|, from one file [^\n]*)?:\n\n```python\n(.*?)```",
    (Path(__file__).parents[2] / "docs" / "store.md").read_text(encoding="utf-8"),
    re.MULTILINE | re.DOTALL,
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    run_file = tiny.world(tmp_path_factory.mktemp("world"))
    return FeatureStore.open(extract(load_config(str(run_file)), StopRequest())[0])


def test_the_page_has_an_example_for_each_reader() -> None:
    assert [name for name, _ in EXAMPLES] == [
        "zarr-python",
        "xarray",
        "dask",
        "tensorstore",
        "h5py",
        "this",
    ]


@pytest.mark.parametrize(("name", "code"), EXAMPLES, ids=[name for name, _ in EXAMPLES])
def test_example_gives_the_rows_of_the_store(
    name: str, code: str, store: FeatureStore, tmp_path: Path
) -> None:
    scope: dict[str, Any] = {"STORE": str(store.path), "ENCODER": "vit"}
    if name == "h5py":
        scope["FILE"] = str(export_store(store.path, "hdf5", tmp_path / "store.h5", StopRequest()))
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
