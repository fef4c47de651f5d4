"""Where samples come from: each kind of source lists its shards and reads the samples of one."""

from collections.abc import Mapping
from types import MappingProxyType

from features.config import (
    ClassFolderSource,
    FolderSource,
    ParquetSource,
    Source,
    WebdatasetSource,
)
from features.sources.classes import ClassFolders
from features.sources.parquet import ImageParquet
from features.sources.sample import Counts, Sample, Shards
from features.sources.tables import CaptionTable
from features.sources.webdataset import TarShards
from features.storage.place import Place

__all__ = ["Counts", "Sample", "Shards", "open_source"]

NONE: Mapping[Place, str] = MappingProxyType({})


def open_source(source: Source, known: Mapping[Place, str] = NONE) -> Shards:
    """Return the reader for a source.

    Args:
        source: Its settings.
        known: Files that were indexed before, with their names: they keep both, and come first.

    Raises:
        SourceError: Nothing matches its path.
    """
    if isinstance(source, WebdatasetSource):
        return TarShards(source, known)
    if isinstance(source, FolderSource):
        return CaptionTable(source)
    if isinstance(source, ParquetSource):
        return ImageParquet(source, known)
    if isinstance(source, ClassFolderSource):
        return ClassFolders(source, known)
    raise ValueError(f"a source of kind {source.kind!r} is drawn before it is indexed")
