"""Where samples come from: each kind of source lists its shards and reads the samples of one."""

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

__all__ = ["Counts", "Sample", "Shards", "open_source"]


def open_source(source: Source) -> Shards:
    """Return the reader for a source.

    Raises:
        SourceError: Nothing matches its path.
    """
    if isinstance(source, WebdatasetSource):
        return TarShards(source)
    if isinstance(source, FolderSource):
        return CaptionTable(source)
    if isinstance(source, ParquetSource):
        return ImageParquet(source)
    if isinstance(source, ClassFolderSource):
        return ClassFolders(source)
    raise ValueError(f"a source of kind {source.kind!r} is drawn before it is indexed")
