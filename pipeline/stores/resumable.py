"""Conversions that go on where they were stopped or killed.

Until it is whole, what is made for a place `out` lies beside it in a hidden folder,
`.<name>.unfinished`; for a URL that folder is in the current one. It tells how many steps are done,
and of what. A call for the same place, of the same rows in the same form, goes on after them; a
call of anything else begins anew.
"""

import hashlib
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from features.errors import FileError, SailError, StorageError, StoreCorruptError, StoreError
from features.storage.files import write_json
from features.storage.lock import locked
from features.storage.place import Place
from features.storage.reading import Expected, read_json
from features.storage.synchronise import make_folder, synchronise, synchronise_all
from features.store import FeatureStore

logger = logging.getLogger(__name__)
EXPECTED = Expected("What is done so far", "It is made from the beginning.")
MENDABLE = (StorageError, StoreCorruptError)


class Unfinished:
    """What there is so far of something that is made step by step."""

    def __init__(self, folder: Path, made_of: str) -> None:
        """See what is there, and remove it if it is of no use.

        Args:
            folder: Where it is, with a file that tells what is done.
            made_of: Changes when anything else would be made.
        """
        self.made = folder / "made"
        """The file or folder that is made; there is none before the first step."""
        self.done = 0
        """Steps that need not be done again."""
        self._state, self._made_of = folder / "state.json", made_of
        try:
            state: dict[str, Any] = read_json(self._state, dict[str, Any], EXPECTED)
        except FileError:  # none yet, or damaged: it is made from the beginning
            state = {}
        done = state.get("done")
        if state.get("made_of") == made_of and isinstance(done, int) and self.made.exists():
            self.done = done
            for path in self.made.rglob("*.partial"):  # of zarr, which was writing a chunk
                path.unlink()
        elif self.made.is_dir():
            shutil.rmtree(self.made)
        else:
            self.made.unlink(missing_ok=True)

    def advance(self, *written: Path) -> None:
        """Know that one more step is done.

        Args:
            written: Files of the step that are not synchronised yet. They are on the disk before it
                is known, because after a power cut nothing would tell that they are not. With the
                first step all that is there is.
        """
        if self.done:
            for path in (*written, *{path.parent for path in written}):
                synchronise(path)
        else:
            synchronise_all(self.made)
        self.done += 1
        write_json(self._state, {"made_of": self._made_of, "done": self.done})

    def publish(self, out: Path) -> None:
        """Give what is made, all of which is on the disk, its name."""
        make_folder(out.parent)
        self.made.replace(out)
        synchronise(out.parent)


def check_free(out: Place) -> None:
    """Refuse a place for something new at which there is something.

    Raises:
        StoreError: There is.
    """
    if isinstance(out, Path):
        is_taken = out.is_file() or (out.is_dir() and any(out.iterdir()))
    else:
        is_taken = FeatureStore.is_at(out)
    if is_taken:
        raise StoreError(
            f"There is something at {out}. A place with nothing was expected. Give another --out, "
            f"or delete it."
        )


@contextmanager
def unfinished(out: Place, *made_of: object) -> Iterator[Unfinished]:
    """Yield what there is so far of `out`, for the caller to finish, and to move to `out`.

    It is kept where a signal, the system, the network or a damaged chunk ended the work. Of rows
    that can never become what is made, nothing is kept.

    Args:
        out: What is made.
        made_of: All that tells it from anything else that could be made there.

    Raises:
        LockedError: Another process is at it.
    """
    folder = (out if isinstance(out, Path) else Path(out.name)).with_name(f".{out.name}.unfinished")
    remedy = "Wait for it, or give another --out."
    with locked(folder / "lock", f"{out} is being made", remedy=remedy):
        work = Unfinished(folder, hashlib.sha256(repr(made_of).encode()).hexdigest())
        if work.done:
            logger.info("%s is continued", out)
        try:
            yield work
        except BaseException as error:
            is_for_good = isinstance(error, SailError) and not isinstance(error, MENDABLE)
            if is_for_good or not work.done:
                shutil.rmtree(folder, ignore_errors=True)
            else:
                logger.info("What is done of %s is in %s", out, folder)
            raise
        shutil.rmtree(folder, ignore_errors=True)  # all is done, and nobody needs it
