"""Splits without a source: their features were made elsewhere, and imported as a store."""

from typing import Any, ClassVar, Literal

from features.errors import SourceError
from features.sources.base import Known, SourceSettings


class ImportedSource(SourceSettings):
    """No source: the store of the split is there already, and `sail extract` leaves it as it is.

    `sail import-store FILE --out RUN/features/SPLIT.zarr` makes one; or the store is that of
    `align.store` or `run.features`.
    """

    kind: Literal["imported"]

    has_samples: ClassVar[bool] = False
    unused = frozenset({"captions", "label", "group", "class_names", "rows", "share"})

    def _open(self, known: Known) -> Any:  # noqa: ARG002
        raise SourceError(
            "A split of kind 'imported' has features and nothing else. Pictures and captions were "
            "expected here. Name their source, or leave the split out of what reads them."
        )

    def summary(self) -> str:
        """Say that nothing need be there."""
        return "imported: it has no source"
