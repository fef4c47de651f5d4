"""`sail convert --to`: a store in another form."""

from collections.abc import Callable, Mapping
from pathlib import Path

from features.storage.place import Place
from features.store import FeatureStore
from pipeline.formats.clip_retrieval import write_clip_retrieval
from pipeline.formats.hdf5 import write_hdf5
from pipeline.formats.parquet import write_parquet
from pipeline.formats.store import StoreRows
from pipeline.interrupt import StopRequest

WRITERS: Mapping[str, Callable[[StoreRows, Path, StopRequest], Path]] = {
    "hdf5": write_hdf5,
    "parquet": write_parquet,
    "clip-retrieval": write_clip_retrieval,
}


def export_store(store: Place, form: str, out: Path, stop: StopRequest) -> Path:
    """Write a store in another form; it goes on where it was stopped.

    Features in 8 bits are written as the float16 values that they stand for.

    Args:
        store: Every chunk of its columns must be done.
        form: One of `WRITERS`.
        out: The HDF5 file, of which an older one is replaced; or the folder, which must not be
            there.
        stop: Asked before every chunk.

    Raises:
        StoreError: There is no store, a column has chunks that are not done, there is something at
            `out` that is not replaced, or another process is at it.
        Stopped: A signal came.
    """
    rows = StoreRows(FeatureStore.open(store))
    return WRITERS[form](rows, out, stop)
