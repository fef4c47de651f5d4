"""`sail convert --to`: a store in another form."""

from collections.abc import Callable, Mapping
from pathlib import Path

from features.partial import remove_leftovers
from features.storage.place import Place
from features.store import FeatureStore
from pipeline.formats.clip_retrieval import write_clip_retrieval
from pipeline.formats.hdf5 import write_hdf5
from pipeline.formats.parquet import write_parquet
from pipeline.formats.rows import Rows
from pipeline.formats.store import StoreRows
from pipeline.interrupt import StopRequest

WRITERS: Mapping[str, Callable[[Rows, Path, StopRequest], Path]] = {
    "hdf5": write_hdf5,
    "parquet": write_parquet,
    "clip-retrieval": write_clip_retrieval,
}


def export_store(store: Place, form: str, out: Path, stop: StopRequest) -> Path:
    """Write a store in another form: all of it, or nothing.

    Features in 8 bits are written as the float16 values that they stand for.

    Args:
        store: Every chunk of its columns must be done.
        form: One of `WRITERS`.
        out: The file, of which an older one is replaced; or the folder, which must not be there.
        stop: Asked before every chunk.

    Raises:
        StoreError: There is no store, a column has chunks that are not done, or there is a folder
            at `out`.
        Stopped: A signal came; nothing was written.
    """
    rows = StoreRows(FeatureStore.open(store))
    out.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(out.parent)
    return WRITERS[form](rows, out, stop)
