"""A run that fills several image columns at once, ended between the writes of one chunk."""

from pathlib import Path
from typing import Any

import pytest

from features.storage.column import Column
from features.store import FeatureStore
from pipeline.interrupt import StopRequest
from pipeline.run.config import load_config
from pipeline.run.extract import extract
from pipeline.stores.verify import verify_store
from tests import tiny
from tests.feature_stores import store_digests

ALSO = """
[encoders.image.vit.also]
vit-mean = { pooling = "mean" }
vit-first = { pooling = "cls", layer = 0 }
"""
NAMES = ("vit", "vit-mean", "vit-first")


class Killed(BaseException):
    """Stands for SIGKILL: no `except Exception` may catch it."""


def extracted(run_file: Path, run: Path) -> FeatureStore:
    return FeatureStore.open(
        extract(load_config(str(run_file), [f"run.dir='{run}'"]), StopRequest())[0]
    )


@pytest.mark.slow
@pytest.mark.parametrize(("column", "chunk"), [("vit", 0), ("vit-mean", 2), ("vit-first", 4)])
def test_the_next_run_writes_only_what_is_missing_and_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, column: str, chunk: int
) -> None:
    run_file = tiny.world(tmp_path, extra=[ALSO])
    extracted(run_file, tmp_path / "whole")
    written: list[tuple[str, int]] = []
    write = Column.write

    def recorded(self: Column, number: int, *rest: Any) -> None:
        if "train.zarr" in str(self.path):
            written.append((self.name, number))
        write(self, number, *rest)

    def dying(self: Column, number: int, *rest: Any) -> None:
        if written.count((f"image/{column}", chunk)):
            raise Killed  # and so do all that wait behind it
        recorded(self, number, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Column, "write", dying)
        with pytest.raises(Killed):
            extracted(run_file, tmp_path / "killed")
    before = set(written)
    assert before == {
        (f"image/{name}", number)
        for number in range(chunk + 1)
        for name in NAMES
        if number < chunk or NAMES.index(name) <= NAMES.index(column)
    }
    written.clear()
    monkeypatch.setattr(Column, "write", recorded)
    extracted(run_file, tmp_path / "killed")

    assert not before & set(written)
    assert len(written) == len(set(written))
    assert store_digests(tmp_path / "killed") == store_digests(tmp_path / "whole")
    assert verify_store(tmp_path / "killed" / "features" / "train.zarr") == []
