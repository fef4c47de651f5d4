"""Where samples come from: each kind of source lists its shards and reads the samples of one."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from features.config import (
    AnnotationSource,
    CifarSource,
    ClassFolderSource,
    FolderSource,
    ParquetSource,
    Source,
    WebdatasetSource,
)
from features.sources.annotations import Annotations
from features.sources.cifar import CifarBatches
from features.sources.class_folders import ClassFolders
from features.sources.parquet import ImageParquet
from features.sources.reader import Counts, Sample, Shards
from features.sources.tables import CaptionTable
from features.sources.webdataset import TarShards
from features.storage.place import Place

__all__ = ["Counts", "Sample", "Shards", "open_source"]

SEVERAL_FILES: Mapping[type, Callable[..., Shards]] = MappingProxyType(
    {
        WebdatasetSource: TarShards,
        ParquetSource: ImageParquet,
        ClassFolderSource: ClassFolders,
    }
)
ONE_PLACE: Mapping[type, Callable[..., Shards]] = MappingProxyType(
    {
        FolderSource: CaptionTable,
        CifarSource: CifarBatches,
        AnnotationSource: Annotations,
    }
)
NONE: Mapping[Place, str] = MappingProxyType({})


def open_source(source: Source, known: Mapping[Place, str] = NONE) -> Shards:
    """Return the reader for a source.

    Args:
        source: Its settings.
        known: Files that were indexed before, with their names: they keep both, and come first.

    Raises:
        SourceError: Nothing matches its path.
    """
    if opens := SEVERAL_FILES.get(type(source)):
        return opens(source, known)
    if opens_one := ONE_PLACE.get(type(source)):
        return opens_one(source)
    raise ValueError(f"a source of kind {source.kind!r} is drawn before it is indexed")
