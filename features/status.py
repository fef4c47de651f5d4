"""What became of a row of a feature column."""

from enum import IntEnum


class Status(IntEnum):
    """The codes of the `status` arrays; everything above OK is a reason for quarantine."""

    PENDING = 0
    OK = 1
    TRUNCATED_IMAGE = 2
    NOT_AN_IMAGE = 3
    EMPTY_IMAGE = 4
    MISSING_IMAGE = 5
    IMAGE_TOO_LARGE = 6
    MISSING_CAPTION = 7
    DUPLICATE_KEY = 8
    NOT_FINITE = 9

    @property
    def label(self) -> str:
        """The code in words, as in `sail inspect` and in the store's attributes."""
        return self.name.lower().replace("_", " ")
