"""Data sets of the Hugging Face hub, by their names: the parquet files of one split."""

import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, Literal

from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

from features.errors import SourceError
from features.sources.base import Known
from features.sources.parquet import ImageParquet, ImageTableSettings
from features.storage.files import files_below
from features.storage.place import RemotePath
from features.storage.requests import tried

CONVERTED = "refs/convert/parquet"
"""Branch on which the hub itself keeps a data set as parquet: `<config>/<split>/0000.parquet`."""
COMMIT = re.compile(r"[0-9a-f]{40}")
SHOWN = 20


class HubSource(ImageTableSettings):
    """A data set of the Hugging Face hub by its name, read from its parquet files as they are used.

    Which files a split has follows from the card of the data set (`configs`), or else from their
    names. Where there is no parquet, that of the hub's own conversion is read.
    """

    kind: Literal["hub"]
    repository: str
    """`owner/name` of the data set."""
    config: str | None = None
    """Configuration (the hub says subset); the only one if not given."""
    split: str = "train"
    """Which of its splits."""
    revision: str | None = None
    """Branch, tag or commit. If not given, the commit that is the newest when the data are indexed;
    later calls keep to it."""

    def _open(self, known: Known) -> ImageParquet:
        folder = RemotePath("hf", f"datasets/{self.repository}")
        revision = self.revision or _commit_of(folder, known)
        about = _about(folder, revision)
        names = _parquet_files(folder, about.sha)
        if names:
            chosen = self._files_of_split(names, about.card_data)
        else:
            about = _about(folder, CONVERTED)
            chosen = self._converted_files(_parquet_files(folder, about.sha))
        at = RemotePath("hf", f"{folder.path}@{about.sha}")
        return ImageParquet(self, [at / name for name in chosen], known)

    def _files_of_split(self, names: list[str], card: Any) -> list[str]:
        """Choose the files by the card of the data set, or by their names."""
        configs = {
            str(each.get("config_name", "default")): each["data_files"]
            for each in (card.to_dict() if card else {}).get("configs") or []
            if each.get("data_files")
        }
        if not configs:
            inside = [name for name in names if self.config in (None, *name.split("/")[:-1])]
            word = re.compile(rf"(?<![A-Za-z0-9]){re.escape(self.split)}(?![A-Za-z])")
            return self._checked([name for name in inside if word.search(name)], names)
        config = self._config_of(configs)
        splits = _patterns(configs[config])
        if self.split not in splits:
            raise self._refusal("split", self.split, splits)
        patterns = splits[self.split]
        return self._checked([n for n in names if any(fnmatchcase(n, p) for p in patterns)], names)

    def _converted_files(self, names: list[str]) -> list[str]:
        configs: dict[str, dict[str, list[str]]] = {}
        for name in names:
            config, _, rest = name.partition("/")
            configs.setdefault(config, {}).setdefault(rest.partition("/")[0], []).append(name)
        if not configs:
            raise SourceError(
                f"The data set {self.repository} of the hub has no parquet files, nor has the hub "
                f"converted it. Parquet files were expected. Fetch it, and name its files with a "
                f"source of another kind (webdataset, folder)."
            )
        splits = configs[self._config_of(configs)]
        if self.split not in splits:
            raise self._refusal("split", self.split, splits)
        return splits[self.split]

    def _config_of(self, configs: Iterable[str]) -> str:
        there = list(configs)
        if self.config is None and len(there) == 1:
            return there[0]
        if self.config not in there:
            raise self._refusal("config", self.config, there)
        return str(self.config)

    def _checked(self, chosen: list[str], names: list[str]) -> list[str]:
        if not chosen:
            shown = ", ".join(names[:SHOWN])
            of_config = f" of {self.config!r}" if self.config else ""
            raise SourceError(
                f"No parquet file of the data set {self.repository} of the hub is of the split "
                f"{self.split!r}{of_config}; there are {shown}. "
                f"Correct `split` or `config`, or name the files with kind = 'parquet' and path = "
                f"'hf://datasets/{self.repository}/...'."
            )
        return chosen

    def _refusal(self, what: str, found: str | None, there: Iterable[str]) -> SourceError:
        said = f"has no {what} {found!r}" if found else f"has several of `{what}`"
        return SourceError(
            f"The data set {self.repository} of the hub {said}. One of {sorted(there)[:SHOWN]} was "
            f"expected. Correct `{what}`."
        )


def _patterns(data_files: Any) -> dict[str, list[str]]:
    """Return the patterns of each split that `data_files` of a card names."""
    if isinstance(data_files, str):
        return {"train": [data_files]}
    if isinstance(data_files, Mapping):
        data_files = [{"split": split, "path": path} for split, path in data_files.items()]
    splits: dict[str, list[str]] = {}
    for each in data_files:
        split, path = (each["split"], each["path"]) if isinstance(each, dict) else ("train", each)
        splits.setdefault(str(split), []).extend([path] if isinstance(path, str) else path)
    return splits


def _commit_of(folder: RemotePath, known: Known) -> str | None:
    """Return the commit that the files of an index are of, None where there is none yet."""
    for place in known:
        path, _, rest = str(place).partition("@")
        if path == str(folder) and COMMIT.match(rest):
            return rest[:40]
    return None


def _about(folder: RemotePath, revision: str | None) -> Any:
    """Ask the hub for the commit of a revision, and the card of the data set.

    Raises:
        SourceError: It has no such data set or revision.
        StorageError: It does not answer, or does not give access.
    """
    name = folder.path.removeprefix("datasets/")
    what = f"A data set of the hub{f' with the revision {revision}' if revision else ''}"

    def ask(_: object) -> Any:
        try:
            return HfApi().dataset_info(name, revision=revision)
        except (RepositoryNotFoundError, RevisionNotFoundError) as error:
            raise SourceError(
                f"The hub has no data set {name}{f' at {revision}' if revision else ''}, or does "
                f"not show it to you. {what} was expected. Correct `repository` or `revision`, or "
                f"set HF_TOKEN."
            ) from error

    return tried(folder, what, ask)


def _parquet_files(folder: RemotePath, commit: str) -> list[str]:
    at = RemotePath("hf", f"{folder.path}@{commit}")
    places = (str(place).removeprefix(f"{at}/") for place, _ in files_below(at))
    return sorted(place for place in places if place.endswith(".parquet"))
