"""Where samples come from: one file for each kind of source, and the table of them."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Union

from pydantic import Field

from features.sources.annotations import AnnotationSource
from features.sources.base import Counts, Sample, SourceReader, SourceSettings
from features.sources.cifar import CifarSource
from features.sources.class_folders import ClassFolderSource
from features.sources.folder import FolderSource
from features.sources.hub import HubSource
from features.sources.imported import ImportedSource
from features.sources.parquet import ParquetSource
from features.sources.published import PublishedSource
from features.sources.scenes import ScenesSource
from features.sources.webdataset import WebdatasetSource

__all__ = ["SOURCES", "Counts", "Sample", "Source", "SourceReader", "SourceSettings"]

SOURCES: Mapping[str, type[SourceSettings]] = MappingProxyType(
    {
        "webdataset": WebdatasetSource,
        "folder": FolderSource,
        "parquet": ParquetSource,
        "hub": HubSource,
        "classes": ClassFolderSource,
        "cifar": CifarSource,
        "published": PublishedSource,
        "annotations": AnnotationSource,
        "scenes": ScenesSource,
        "imported": ImportedSource,
    }
)
"""Settings of each kind of source, by what `kind` is in a run file."""

if TYPE_CHECKING:
    Source = SourceSettings
else:
    Source = Annotated[Union[tuple(SOURCES.values())], Field(discriminator="kind")]  # noqa: UP007
