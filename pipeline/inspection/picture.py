"""The image of a row, as coloured half blocks in a terminal."""

from pathlib import Path

import numpy as np
from PIL import Image
from rich.text import Text

from features.errors import SourceError
from features.images import ImageFault, decode
from features.index import Index, SampleReader
from features.storage.place import Place

MAX_PIXELS = 1 << 26
COLUMNS, LINES = 48, 24


def picture_of(store: Place, row: int) -> Text | None:
    """Return the image of a row of a store that lies in the folder of its run.

    Returns:
        The picture, or why it cannot be shown; None where there is no index of images, as of a
        store that was imported or is under a URL.
    """
    if not isinstance(store, Path):
        return None
    index = store.absolute().parent.parent / "index" / f"{store.stem}.parquet"
    if not index.is_file():
        return None
    try:
        data = SampleReader(Index.open(index)).read_row(row)
        return half_blocks(decode(data or b"", max_pixels=MAX_PIXELS, upright=True))
    except (ImageFault, SourceError) as error:
        return Text(f"no picture: {error}", style="dim")


def half_blocks(image: Image.Image) -> Text:
    """Return an image as text: each character is two pixels, one above the other."""
    small = image.copy()
    small.thumbnail((COLUMNS, 2 * LINES))
    pixels = np.asarray(small)  # (height, width, 3)
    if len(pixels) % 2:
        pixels = np.concatenate([pixels, pixels[-1:]])
    lines = []
    for upper, lower in zip(pixels[::2], pixels[1::2], strict=True):
        blocks = [
            ("▀", f"rgb({above[0]},{above[1]},{above[2]}) on rgb({below[0]},{below[1]},{below[2]})")
            for above, below in zip(upper, lower, strict=True)
        ]
        lines.append(Text.assemble(*blocks))
    return Text("\n").join(lines)
