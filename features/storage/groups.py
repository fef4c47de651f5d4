"""Makes a Zarr group appear at its place as a whole, on local disk or under a URL."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from features.storage.files import (
    delete,
    files_below,
    is_file,
    partial_path,
    remove_leftovers,
    write,
)
from features.storage.parallel import in_order
from features.storage.place import Place, RemotePath
from features.storage.remote import check_writable
from features.storage.synchronise import make_folder, synchronise, synchronise_all

METADATA = "zarr.json"


@contextmanager
def new_group(place: Place, *, store: Place) -> Iterator[Path]:
    """Yield a local path to make a group at; then it appears at its place as a whole (`publish`).

    Args:
        place: Where the group is to be.
        store: The store it is in, or itself. What is not yet whole lies beside its name in there,
            or beside the store.
    """
    if isinstance(place, Path) and isinstance(store, Path):
        folder = store if place != store else store.parent
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        partial = partial_path(folder / place.relative_to(folder).as_posix().replace("/", "-"))
        try:
            yield partial
            publish(partial, place)
        except BaseException:  # a full disk, above all: what is half-written would keep it full
            shutil.rmtree(partial, ignore_errors=True)
            raise
    elif isinstance(place, RemotePath):
        check_writable(place)
        with tempfile.TemporaryDirectory(prefix="sail-") as temporary:
            yield Path(temporary) / place.name
            publish(Path(temporary) / place.name, place)


def publish(folder: Path, place: Place) -> None:
    """Let a group that is whole on local disk appear at its place, and see it on the disk there.

    Where another writer was faster, theirs stays. Under a URL the `zarr.json` of the group is
    written last: without it there is no group.
    """
    if isinstance(place, Path):
        make_folder(place.parent)
        synchronise_all(folder)
        _rename_if_first(folder, place)
        synchronise(place.parent)
    else:
        _upload(folder, place)


def _rename_if_first(partial: Path, path: Path) -> None:
    """Give a group its name; where another writer was faster, theirs stays and ours goes."""
    try:
        partial.rename(path)
    except OSError:
        if not (path / "zarr.json").is_file():
            raise
        shutil.rmtree(partial)


def _upload(folder: Path, place: RemotePath) -> None:
    """Write the files of a group under a URL, its `zarr.json` last.

    What a killed writer left there goes before that, so that it does not become part of the group.
    """
    local = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]

    def put(name: str) -> None:
        write(place / name, (folder / name).read_bytes())

    for _ in in_order(put, sorted(set(local) - {METADATA}), at=place):
        pass
    written = {place / name for name in local}
    others = [found for found, _ in files_below(place) if found not in written]
    if is_file(place / METADATA):
        return  # another writer was faster: what lies there besides may be its chunks
    for other in others:
        delete(other)
    put(METADATA)
