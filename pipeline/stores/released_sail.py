"""Features as the released SAIL code (lezhang7/SAIL) has them: folders of `0.pt`, `1.pt`, `2.pt`.

Its encode.py writes one tensor per batch of rows, into `image_embedding/<model>/<data>_<pooling>`
and `text_embedding/<model>/<data>_<caption>`, and names it by `start // batch size`. There are no
keys: row i of the images belongs to row i of the texts. Two workers split within a batch, another
batch size after a restart, or a run that was killed leave rows at the wrong place, and its loader
compares no more than the total. So here every file must have as many rows as the first, only the
last fewer, none may miss, and all folders must have the same rows. (That the rows of a table were
filtered otherwise between two runs, with the same number left, no check of the files can find.)
"""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from torch import Tensor

from features.errors import SourceError
from features.storage.reading import read_torch
from pipeline.stores.arrays import Arrays, SequentialArray, of_form
from pipeline.stores.safetensors import numpy_of

EXPECTED = of_form("A tensor of (rows, features) as the released encode.py saves it")
KINDS = {"image_embedding": "image", "text_embedding": "text"}


class ReleasedArrays(Arrays):
    """The folders of tensors below a folder, each an array.

    They are taken as `image/<model>` and `text/<model>/<data>_<caption>`, by their own names.
    """

    expected = EXPECTED

    def _open(self, path: Path, stack: ExitStack) -> None:  # noqa: ARG002 - nothing stays open
        folders = sorted({file.parent for file in path.rglob("*.pt")})
        if not folders:
            raise EXPECTED.refusal(path, "there is no .pt file")
        every = [_Folder(folder) for folder in folders]
        self.files = [file for each in every for file in each.files]
        usual = dict[str, str]()
        for folder, each in zip(folders, every, strict=True):
            name = folder.relative_to(path).as_posix()
            self._add(name, each.shape, SequentialArray(each.tensors).read)
            *_, kind, model, data = ["", "", *name.split("/")]
            if kind in KINDS:
                column = f"image/{model}" if KINDS[kind] == "image" else f"text/{model}/{data}"
                usual[f"image/{model}-{data}" if column in usual else column] = name
        self.usual = usual


class _Folder:
    def __init__(self, folder: Path) -> None:
        self.files = sorted(folder.glob("*.pt"), key=_number)
        shapes = [tuple(_load(file, mapped=True).shape) for file in self.files]
        self.shape = (sum(rows for rows, _ in shapes), shapes[0][1])
        size, dim = shapes[0]
        for place, (file, (rows, found)) in enumerate(zip(self.files, shapes, strict=True)):
            is_last = place == len(shapes) - 1
            if _number(file) != place:
                raise _misplaced(folder, place * size, f"{place}.pt is missing")
            if found != dim:
                raise _misplaced(
                    folder, place * size, f"{file.name} has {found} features, not {dim}"
                )
            if rows > size or (rows < size and not is_last):
                row = place * size + (rows if rows < size else 0)
                raise _misplaced(folder, row, f"{file.name} has {rows} rows, 0.pt has {size}")

    def tensors(self) -> Iterator[np.ndarray]:
        for file in self.files:
            tensor = _load(file, mapped=False)
            yield numpy_of(tensor)


def _number(file: Path) -> int:
    try:
        return int(file.stem)
    except ValueError as error:
        raise of_form("A file such as 0.pt").refusal(file, "its name is no number") from error


def _load(file: Path, *, mapped: bool) -> Tensor:
    tensor = read_torch(file, EXPECTED, mapped=mapped)
    if not isinstance(tensor, Tensor) or tensor.ndim != 2:
        found = f"shape {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor)
        raise EXPECTED.refusal(file, f"it holds {found}")
    return tensor


def _misplaced(folder: Path, row: int, why: str) -> SourceError:
    return SourceError(
        f"{folder} is not aligned from row {row} on: {why}. Files 0.pt, 1.pt, … of equally many "
        f"rows were expected, only the last with fewer. Encode this folder again: nothing tells "
        f"which images the rows belong to."
    )


read = ReleasedArrays
