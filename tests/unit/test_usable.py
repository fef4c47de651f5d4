"""A column of no use is told in one line, and its command fails."""

from pathlib import Path

import numpy as np
import pytest

from features.errors import SourceError
from features.status import Status
from features.store import FeatureStore
from pipeline.run.usable import check_usable
from tests.feature_stores import IMAGE, make_store


def changed(store: FeatureStore, bad: int, *, constant: bool = False) -> FeatureStore:
    """Write the image column again with so many rows that are not ok, or of one vector."""
    column = store.column(f"image/{IMAGE}")
    for chunk in range(column.num_chunks):
        first = chunk * column.rows_per_chunk
        rows = column.chunk_rows(chunk)
        features = column.read(first, first + rows).copy()
        status = np.full(rows, Status.OK, dtype=np.uint8)
        status[np.arange(first, first + rows) < bad] = Status.TRUNCATED_IMAGE
        features[status != Status.OK] = 0
        if constant:
            features[:] = 1
        column.write(chunk, features, status)
    return FeatureStore.open(store.path)


@pytest.mark.parametrize(
    ("bad", "said"), [(0, ""), (5, ""), (6, "6 of 100 rows cannot be used"), (99, "99 of 100 rows")]
)
def test_a_share_of_faults_that_no_clean_data_have_is_one_loud_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, bad: int, said: str
) -> None:
    check_usable([changed(make_store(tmp_path / "s.zarr", rows=100), bad)])
    assert len(caplog.records) == bool(said)
    assert said in caplog.text


def test_a_column_without_a_usable_row_fails_when_all_were_looked_at(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    useless = changed(make_store(tmp_path / "a.zarr", rows=20), 20)
    odd = changed(make_store(tmp_path / "b.zarr", rows=20), 10)
    with pytest.raises(SourceError, match=r"used of .*a\.zarr/image/.*: truncated image 20\. Rows"):
        check_usable([useless, odd])
    assert "b  image/" in caplog.text


def test_rows_that_all_have_one_vector_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    check_usable([changed(make_store(tmp_path / "s.zarr", rows=20), 0, constant=True)])
    assert "all of 20 rows that were compared have one and the same vector" in caplog.text
