"""Finds out what data are: a kind of source, and its settings. `sail init` writes them down.

Every guess is tried with the source's own reader, so that what is said of it is what `sail extract`
will find.
"""

import glob
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path, PureWindowsPath
from typing import Any

from pydantic import TypeAdapter

from features.errors import ConfigError, SourceError
from features.images import HEIC_SUFFIXES, reads_heic
from features.sources import Counts, Sample, Source, SourceReader
from features.sources.base import is_left_behind, split_image_suffix
from features.sources.folder import FolderSource
from features.sources.image_folder import ImageFolder
from features.sources.parquet import image_columns
from features.sources.tables import READERS, table_rows
from features.sources.webdataset import REPEATED
from pipeline.planning.budget import listed_rows

Settings = dict[str, Any]
SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
SPLIT = re.compile(rf"({'|'.join(sorted(SPLITS, key=len, reverse=True))})(?![a-z])", re.IGNORECASE)
TABLES = tuple(suffix for suffix in READERS if suffix not in (".txt", ".json", ".parquet"))
CAPTION = re.compile(r"caption|text|description|title|prompt|beschreibung|bildtext", re.IGNORECASE)
LABELS = ("label", "class", "category", "cls")
ENCODINGS = ("cp1252", "gb18030", "shift_jis")
LOOKED_AT = 300
CAPTIONS_LOOKED_AT = 40
FOLDERS_LOOKED_AT = 200
SECONDS = 10.0
FEW_ROWS, LEAST_ROWS = 100, 20
SHOWN = 5


@dataclass
class FoundSplit:
    """A split, and what is known of it."""

    settings: Settings
    """Of its source, as in a run file; paths are absolute."""
    rows: int
    is_exact: bool
    has_captions: bool
    has_labels: bool
    pictures: tuple[str, ...] = ()
    """Files of the pictures, where nothing says what is on them."""


@dataclass
class Discovery:
    """What was found."""

    name: str
    """For the run and its file."""
    splits: dict[str, FoundSplit] = field(default_factory=dict)
    saw: list[str] = field(default_factory=list)
    """Sentences that say what is there, and what was guessed."""


def discover(what: str) -> Discovery:
    """Look at a folder, file or pattern of files.

    Raises:
        ConfigError: It is not there, or nothing in it can be read as pictures.
        SourceError: It cannot be read.
    """
    place = Path(what).expanduser().absolute()
    found = Discovery(_name(place))
    layout = _layout(place, what, found)
    if len(layout) == 1:
        layout = {"train": next(iter(layout.values()))}
    for split, settings in layout.items():
        found.splits[split] = _split(split, settings, found)
    return found


def _name(place: Path) -> str:
    stem = place.stem if not place.is_dir() else place.name
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", stem).strip("-_.") or "mine"


def _layout(place: Path, what: str, found: Discovery) -> dict[str, Settings]:
    if place.is_dir():
        layout = _of_folder(place, found)
    elif place.is_file():
        layout = {"train": _of_files([place], found)}
    else:
        matching = sorted(glob.glob(str(place)))  # noqa: PTH207 - may be absolute
        if not matching:
            raise ConfigError(
                f"There is no {what!r}. A folder of pictures, a table "
                f"({', '.join(READERS)}), or tars or parquet files were expected. Correct the path."
            )
        layout = {"train": _of_files(list(map(Path, matching)), found) | {"path": str(place)}}
    if not layout:
        raise ConfigError(
            f"{place} holds neither pictures nor tables, tars or parquet files. One of these was "
            f"expected. Give the folder or file that has them."
        )
    return layout


def _of_folder(folder: Path, found: Discovery) -> dict[str, Settings]:
    """Return the settings of each split of a folder; none where nothing is there."""
    there = sorted(each for each in folder.iterdir() if not is_left_behind(each.name))
    folders = [each for each in there if each.is_dir()]
    by_split = {name: each for each in folders if (name := _split_of(each.name))}
    if "train" in by_split or len(by_split) > 1:
        names = sorted(by_split, key=_order)
        inside = {name: _of_folder(by_split[name], found) for name in names}
        if whole := {name: next(iter(each.values())) for name, each in inside.items() if each}:
            return whole
    files = [each for each in there if each.is_file()]
    if some := _of_one_kind(files):
        return _grouped(folder, some, found)
    if _has_pictures(folder):
        return {"train": {"kind": "folder", "path": str(folder)}}
    return _of_one_inside(folder, folders, found)


def _of_one_kind(files: Sequence[Path]) -> list[Path]:
    """Return the files that hold the data of a folder, if any: shards before tables."""
    for suffixes in ((".tar",), TABLES, (".parquet",), (".arrow",)):
        if some := [each for each in files if each.suffix.lower() in suffixes]:
            return some
    odd = [each for each in files if each.suffix.lower() in (".txt", ".json") and _is_table(each)]
    return odd if len(odd) == 1 else []


def _of_one_inside(folder: Path, folders: Sequence[Path], found: Discovery) -> dict[str, Settings]:
    inside = {each.name: layout for each in folders if (layout := _of_folder(each, found))}
    if len(inside) > 1:
        raise ConfigError(
            f"{folder} holds data in {', '.join(list(inside)[:SHOWN])}. One set was expected. Give "
            f"the folder of one of them."
        )
    return next(iter(inside.values()), {})


def _split_of(name: str) -> str | None:
    match = SPLIT.match(name)
    return SPLITS[match[1].lower()] if match else None


def _grouped(folder: Path, files: Sequence[Path], found: Discovery) -> dict[str, Settings]:
    """Return a split for each beginning of names that is one, as `train-0.tar` has it."""
    groups: dict[str, list[Path]] = defaultdict(list)
    for each in files:
        groups[_split_of(each.name) or ""].append(each)
    is_table = files[0].suffix.lower() in TABLES
    if is_table and any(len(group) > 1 for group in groups.values()):
        raise ConfigError(
            f"{folder} holds the tables {', '.join(each.name for each in files[:SHOWN])}. One was "
            f"expected, or one for each split (train.csv, test.csv). Give one of them."
        )
    if "" in groups and "train" not in groups:
        groups["train"] = groups.pop("")
    return {split: _of_files(groups[split], found) for split in sorted(groups, key=_order) if split}


def _order(split: str) -> tuple[bool, str]:
    return split != "train", split


def _of_files(files: Sequence[Path], found: Discovery) -> Settings:
    """Return the settings of a source of files of one kind."""
    first, suffix = files[0], files[0].suffix.lower()
    if suffix == ".tar":
        return {"kind": "webdataset", "path": _pattern(files)}
    if suffix in (".parquet", ".arrow"):
        return _of_parquet(files, found)
    if suffix == ".json" and (settings := _of_annotations(first)):
        return settings
    if suffix in READERS:
        return _of_table(first, found)
    if split_image_suffix(first.name)[1]:
        raise ConfigError(f"{first} is one picture. A folder of many was expected: give that.")
    raise ConfigError(
        f"{first} ends in {suffix!r}. A table ({', '.join(READERS)}), a tar, a parquet or arrow "
        f"file was expected. Give one of these, or the folder."
    )


def _pattern(files: Sequence[Path]) -> str | list[str]:
    """Return a pattern that matches these files alone, or all of their names."""
    folder, suffix = files[0].parent, files[0].suffix
    inside, split = glob.escape(str(folder)), SPLIT.match(files[0].name)
    for start in ("", split[0] if split else ""):
        pattern = f"{inside}/{glob.escape(start)}*{suffix}"
        if len(files) > 1 and sorted(glob.glob(pattern)) == sorted(map(str, files)):  # noqa: PTH207
            return pattern
    names = [f"{inside}/{glob.escape(each.name)}" for each in files]
    return names[0] if len(names) == 1 else names


def _is_table(path: Path) -> bool:
    """Return whether a `.txt` or `.json` is one: it names columns, or is of known annotations."""
    if path.suffix == ".json":
        return _of_annotations(path) is not None
    try:
        row = next(table_rows(path), {})
    except SourceError:
        return False
    return len(row) > 1


def _of_annotations(path: Path) -> Settings | None:
    """Return the settings of a file of known annotations, by what it begins with."""
    with path.open("rb") as file:
        beginning = file.read(1 << 16)
    if not beginning.lstrip().startswith(b"{") or b'"images"' not in beginning + _end_of(path):
        return None
    form = "karpathy" if b'"sentences"' in beginning else "coco"
    settings: Settings = {"kind": "annotations", "path": str(path), "format": form}
    images = [each for each in (path.parent, path.parent.parent) for each in _folders(each)]
    for folder in images:
        if not _trial(settings | {"images": str(folder)}, few=20).is_missing_all:
            return settings | {"images": str(folder)}
    return settings


def _end_of(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - (1 << 16)))
        return file.read()


def _of_parquet(files: Sequence[Path], found: Discovery) -> Settings:
    columns = image_columns(files[0])
    settings: Settings = {"kind": "parquet", "path": _pattern(files)}
    of_bytes = [name for name, is_of_bytes in columns.items() if is_of_bytes]
    for name in sorted(of_bytes, key=lambda name: name != "image"):
        trial = _trial(settings | {"image": name}, few=20)
        if trial.samples and not trial.is_missing_all:
            return settings | {"image": name}
    if len(files) == 1 and files[0].suffix == ".parquet":
        return _of_table(files[0], found)
    raise ConfigError(
        f"{files[0]} has no column of encoded images; it has {list(columns)[:20]}. Bytes, or "
        f"{{bytes, path}}, were expected. Name the column as `image` of a source of kind 'parquet'."
    )


def _has_pictures(folder: Path) -> bool:
    return any(
        split_image_suffix(name)[1] and not is_left_behind(name)
        for _, _, names in os.walk(folder)
        for name in names
    )


def _of_table(path: Path, found: Discovery) -> Settings:
    """Return the settings of a table: its encoding, its column of images, and where they are."""
    settings: Settings = {"kind": "folder", "path": str(path)}
    encoding, rows, parents = _read(path)
    if encoding:
        words = next((w for row in rows for w in _texts(row) if not w.isascii()), "")
        found.saw.append(
            f"{path.name} is not in UTF-8; as {encoding} it says {words[:60]!r}: correct "
            f"`encoding` if that is wrong"
        )
        settings["encoding"] = encoding
    column = _image_column(rows)
    if column is None:
        raise ConfigError(
            f"No column of {path} names pictures; it has {list(rows[0])[:20] if rows else []}. A "
            f"column of file names, as 'IMG/a.jpg', was expected. Give another table."
        )
    if column != "image":
        settings["image"] = column
    names = [str(row[column]) for row in rows[:CAPTIONS_LOOKED_AT] if row.get(column)]
    if parents and len(parents) <= 1 << 16 and (folder := os.path.commonpath(parents)) != "/":
        if Path(folder).is_dir() and not Path(folder).is_relative_to(path.parent):
            settings["images"] = folder
    elif not _found(path.parent, path, names):
        counted = {each: _found(each, path, names) for each in _folders(path.parent)}
        counted[path.parent.parent] = _found(path.parent.parent, path, names)
        best = max(counted, key=lambda each: counted[each])
        if counted[best]:
            settings["images"] = str(best)
    return settings


def _read(path: Path) -> tuple[str | None, list[Mapping[str, Any]], set[str]]:
    """Read a whole table; return its encoding, its first rows, and the folders that it names."""
    tried: tuple[str | None, ...] = (None, *ENCODINGS)
    for encoding in tried:
        rows, parents = list[Mapping[str, Any]](), set[str]()
        try:
            for row in table_rows(path, encoding):
                if len(rows) < LOOKED_AT and any(_texts(row)):
                    rows.append(row)
                for value in _texts(row):
                    if value.startswith("/") and split_image_suffix(value)[1]:
                        parents.add(os.path.dirname(value))  # noqa: PTH120 - of millions
        except SourceError as error:
            if isinstance(error.__cause__, UnicodeError):
                continue
            raise
        return encoding, rows, parents
    raise ConfigError(
        f"{path} is neither in UTF-8 nor in {', '.join(ENCODINGS)}. Save it as UTF-8 (of Excel: "
        f"CSV UTF-8), or set `encoding` of the source in a run file of your own."
    )


def _texts(row: Mapping[str, Any]) -> Iterator[str]:
    yield from (value for value in row.values() if isinstance(value, str) and value.strip())


def _image_column(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the column that most often names a file of an image."""
    counts: Counter[str] = Counter()
    for row in rows:
        for name, value in row.items():
            counts[name] += isinstance(value, str) and bool(split_image_suffix(value.strip())[1])
    if counts.total():
        return max(counts, key=lambda name: (counts[name], name.strip().lower() == "image"))
    named = [name for row in rows[:1] for name in row if re.search("image|file", name.lower())]
    return named[0] if named else None


def _folders(parent: Path) -> list[Path]:
    """Return a folder and those up to two levels below it."""
    below = [parent]
    for depth in range(2):
        level = [each for each in below if len(each.parts) == len(parent.parts) + depth]
        for each in level:
            inside = sorted(path for path in each.iterdir() if path.is_dir())
            below += [path for path in inside if not is_left_behind(path.name)]
    return below[:FOLDERS_LOOKED_AT]


def _found(folder: Path, table: Path, names: Iterable[str]) -> int:
    """Return how many images of these names are in a folder."""
    images, count = ImageFolder(folder, table), 0
    for name in names:
        if PureWindowsPath(name).drive:
            continue
        try:
            count += images.find(name).size is not None
        except SourceError:
            continue
    return count


@dataclass
class _Trial:
    """The first samples of a source."""

    reader: SourceReader[Any]
    samples: list[Sample]
    counts: Counts

    @property
    def is_missing_all(self) -> bool:
        return not any(sample.offset >= 0 for sample in self.samples)

    @property
    def captions(self) -> list[str]:
        return [
            text for sample in self.samples for text in sample.captions.values() if text.strip()
        ]


def _trial(settings: Settings, few: int = LOOKED_AT) -> _Trial:
    reader = parsed(settings).open()
    counts = Counts()
    every = (sample for file in reader.files for sample in reader.samples(file, counts))
    return _Trial(reader, list(islice(every, few)), counts)


def parsed(settings: Settings) -> Source:
    """Return a source of the settings of a run file."""
    source: Source = TypeAdapter(Source).validate_python(settings)
    return source


def _split(split: str, settings: Settings, found: Discovery) -> FoundSplit:
    """Complete the settings of a split, and say what it holds."""
    trial = _trial(settings)
    if not trial.samples or (trial.is_missing_all and trial.reader.hint):
        raise SourceError(
            f"{trial.reader.place} names pictures of which none of the first {len(trial.samples)} "
            f"is there. {trial.reader.hint} Pictures with these names were expected. Give the "
            f"folder of the pictures, or correct the table."
        )
    settings, trial = _with_captions(settings, trial, found)
    rows = listed_rows(trial.reader, SECONDS)
    labels = [sample for sample in trial.samples if sample.label >= 0 or sample.label_name]
    about = "" if rows.is_exact else "about "
    found.saw.append(
        f"{split}: {about}{rows.count:,} pictures, {_kind_in_words(settings)} {trial.reader.place}"
    )
    captions = trial.captions
    if captions:
        fields = dict.fromkeys(name for each in trial.samples for name in each.captions)
        found.saw.append(f"{split}: captions in {', '.join(fields)}, such as {captions[0][:80]!r}")
    missing = sum(sample.offset < 0 for sample in trial.samples)
    if missing:
        found.saw.append(
            f"{split}: {missing} of the first {len(trial.samples)} pictures are not there; their "
            f"rows are kept and left out of the training"
        )
    _tell_of_heic(split, trial.samples, found)
    pictures: tuple[str, ...] = ()
    if not captions and settings["kind"] == "folder" and Path(settings["path"]).is_dir():
        pictures = tuple(
            sample.path
            for file in trial.reader.files
            for sample in trial.reader.samples(file, Counts())
        )
    elif not captions:
        names = ", ".join(map(repr, trial.reader.picker.seen)) or "nothing"
        found.saw.append(f"{split}: no captions; beside the pictures there is {names}")
    return FoundSplit(settings, rows.count, rows.is_exact, bool(captions), bool(labels), pictures)


def kept_for_test(split: FoundSplit) -> float:
    """Return the fraction of a split to measure on: of few pictures so many that some are there.

    0 where there are too few to keep any.
    """
    if not LEAST_ROWS <= split.rows < FEW_ROWS:
        return 0.1 if split.rows >= FEW_ROWS else 0.0
    if split.pictures:  # of a table that is not there yet
        return 0.3 if split.rows < 2 * LEAST_ROWS else 0.2
    for fraction in (0.2, 0.3, 0.4):
        tested = _trial(split.settings | {"share": (1 - fraction, 1)}, few=split.rows)
        if sum(map(tested.reader.is_taken, tested.samples)) >= LEAST_ROWS // 4:
            return fraction
    return 0.0


def _kind_in_words(settings: Settings) -> str:
    if settings["kind"] != "folder":
        return {"webdataset": "in the tars", "parquet": "in the files"}.get(
            settings["kind"], "named by"
        )
    return "below" if Path(settings["path"]).is_dir() else "named by the table"


def _with_captions(settings: Settings, trial: _Trial, found: Discovery) -> tuple[Settings, _Trial]:
    """Name the captions and labels of a source, as they are found."""
    if not trial.reader.has_captions or settings["kind"] == "annotations":
        return settings, trial
    seen = trial.reader.picker.seen
    if "label" not in seen and (labels := [name for name in LABELS if name in seen]):
        settings = settings | {"label": labels[0]}
    names = trial.reader.picker.found if trial.captions else []
    if trial.counts[REPEATED]:
        names = ["txt"]
    if not names and isinstance(trial.reader.source, FolderSource) and "folder" in seen:
        settings, names = _by_their_names(settings, trial, found)
    if not names:
        own = {settings.get("image", "image"), settings.get("label"), "name", "folder"}
        by_name = sorted((each for each in seen if each not in own), key=_is_no_caption)
        names = [each for each in by_name if _is_prose(settings | {"captions": each})]
    if not names:
        return settings, _trial(settings)
    settings = settings | {"captions": names}
    return settings, _trial(settings)


def _is_no_caption(name: str) -> bool:
    return CAPTION.search(name) is None


def _is_prose(settings: Settings) -> bool:
    """Return whether what is under a name is mostly text of several words."""
    try:
        texts = _trial(settings, few=CAPTIONS_LOOKED_AT).captions
    except SourceError:
        return False
    several = sum(len(text.split()) > 1 and "://" not in text for text in texts)
    return bool(texts) and 2 * several > len(texts)


def _by_their_names(
    settings: Settings, trial: _Trial, found: Discovery
) -> tuple[Settings, list[str]]:
    """Take the names of pictures and folders for captions, where they are words."""
    named = _trial(settings | {"captions": "name"}, few=len(trial.samples))
    if 2 * len(named.captions) <= len(named.samples):
        return settings, []
    folders = Counter(Path(sample.path).parent for sample in named.samples)
    root = Path(settings["path"])
    of_classes = root not in folders and len(folders) > 1
    if of_classes:
        settings = settings | {"label": "folder"}
    what = "folders and files" if of_classes else "files"
    told = f"no table and no texts beside the pictures: words in the names of {what} are captions"
    told += ", and the folders classes" if of_classes else ""
    found.saw += [told] if told not in found.saw else []
    return settings, ["name"]


def _tell_of_heic(split: str, samples: Sequence[Sample], found: Discovery) -> None:
    count = sum(sample.path.lower().endswith(HEIC_SUFFIXES) for sample in samples)
    if count and not reads_heic():
        found.saw.append(
            f"{split}: {count} pictures are HEIC, which takes the extra `heif`: pip install "
            f"pillow-heif, before `sail extract` (else their rows are left out)"
        )
