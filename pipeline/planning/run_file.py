"""Writes a run file for data that were looked at: `sail init`."""

import csv
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from features.errors import ConfigError
from features.storage.files import appearing
from pipeline.planning.discovery import Discovery, FoundSplit, kept_for_test
from pipeline.planning.encoder_choice import EncoderChoice
from pipeline.run.config import load_config

FEW_HELD_OUT = 50
HELD_OUT = 0.1
COMMENTS = {
    "image": "the column or member that names or holds the picture",
    "images": "where the pictures are",
    "encoding": "what the table is in; UTF-8 was expected",
    "label": "the class",
    "share": "{use}",
}


@dataclass
class RunFile:
    """A run file that is to be written, and what goes with it.

    Where nothing says what is on the pictures, that is a table with a line for each of them.

    Raises:
        ConfigError: One of them is there.
    """

    path: Path
    found: Discovery
    image: EncoderChoice
    text: EncoderChoice

    def __post_init__(self) -> None:
        self.table = self.path.with_name("captions.csv")
        self.pictures = [name for each in self.found.splits.values() for name in each.pictures]
        for each in [self.path, *([self.table] if self.pictures else [])]:
            if each.exists():
                raise ConfigError(
                    f"{each} is there already. A new file was expected. Delete it, or give another "
                    f"folder or name by --out."
                )
        if self.pictures:
            self._ask_for_captions()
        one = list(self.found.splits.values())
        self.tested = kept_for_test(one[0]) if len(one) == 1 else 0.0

    def _ask_for_captions(self) -> None:
        folder = os.path.commonpath([os.path.dirname(name) for name in self.pictures])  # noqa: PTH120
        settings = {"kind": "folder", "path": str(self.table.absolute()), "captions": "caption"}
        if not _is_inside(folder, self.path.parent):
            settings["images"] = folder
        rows = len(self.pictures)
        split = FoundSplit(settings, rows, True, True, False, tuple(self.pictures))
        self.found.splits = {"train": split}
        self.found.saw.append(
            f"nothing says what is on these pictures, and a head learns from words: {self.table} "
            f"will have a line for each of them. Write what is on it behind the comma, then call "
            f"`sail extract`"
        )

    def write(self) -> list[Path]:
        """Write the files; return them."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.pictures:
            _write_table(self.table, self.pictures)
        with appearing(self.path) as partial:
            partial.write_text(self.text_of_it(), encoding="utf-8")
        load_config(str(self.path))
        return [self.path, *([self.table] if self.pictures else [])]

    def text_of_it(self) -> str:
        """Return the run file, with comments."""
        folder = self.path.parent
        lines = ["# Written by `sail init`. `sail settings` lists every setting.", ""]
        lines += _data(folder, self.found, self.tested)
        lines += _encoder("image", self.image, folder)
        if any(each.settings["kind"] == "folder" for each in self.found.splits.values()):
            lines.insert(-1, "upright = true  # turn pictures of phones as their EXIF data say")
        lines += _encoder("text", self.text, folder)
        lines += _align(self.found, self.tested)
        return "\n".join(lines)


def _is_inside(folder: str, parent: Path) -> bool:
    return Path(folder).is_relative_to(parent.absolute())


def _write_table(path: Path, pictures: Sequence[str]) -> None:
    """Write a table with a line for each picture, which Excel opens as it is."""
    with appearing(path) as partial, partial.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption"])
        writer.writerows([_relative(name, path.parent), ""] for name in pictures)


def _data(folder: Path, found: Discovery, tested: float) -> Iterator[str]:
    if not tested:
        for name, split in found.splits.items():
            yield from _source(name, split, folder)
        return
    kept = round(1 - tested, 2)
    words = f"{kept:.0%} of the pictures, by a hash of their keys"
    (split,) = found.splits.values()
    yield from _source("train", split, folder, share=[0, kept], use=words)
    use = "the others, kept from training to measure on"
    yield from _source("test", split, folder, share=[kept, 1], use=use)


def _source(
    name: str, split: FoundSplit, folder: Path, *, share: list[float] | None = None, use: str = ""
) -> Iterator[str]:
    yield f"[data.{name}]"
    settings = dict(split.settings) | ({} if share is None else {"share": share})
    for key, value in settings.items():
        comment = COMMENTS.get(key, "").format(use=use)
        if key in ("path", "images"):
            value = _places(value, folder)
        yield f"{key} = {_toml(value)}" + (f"  # {comment}" if comment else "")
    yield ""


def _places(value: Any, folder: Path) -> Any:
    if isinstance(value, list):
        return [_relative(each, folder) for each in value]
    return _relative(value, folder)


def _relative(path: str, folder: Path) -> str:
    """Return a path as it is seen from a folder, where it is inside of it."""
    absolute = folder.absolute()
    return str(Path(path).relative_to(absolute)) if _is_inside(path, absolute) else path


def _toml(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _encoder(kind: str, choice: EncoderChoice, folder: Path) -> Iterator[str]:
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", re.split("[:/]", choice.model.rstrip("/"))[-1])
    is_folder = Path(choice.model).is_dir()
    model = _relative(str(Path(choice.model).absolute()), folder) if is_folder else choice.model
    yield f"[encoders.{kind}.{_toml(name.strip('-_.') or kind)}]"
    yield f"model = {_toml(model)}  # {choice.facts}"
    if choice.pooling:
        yield f'pooling = "{choice.pooling}"'
    yield ""


def _align(found: Discovery, tested: float) -> Iterator[str]:
    """Yield settings of the training; its head and schedule follow from the rows by themselves."""
    train = found.splits.get("train") or next(iter(found.splits.values()))
    rows = round(train.rows * (1 - tested))
    yield "[align]  # head, batch, steps and rate follow from the number of pictures: docs/heads.md"
    if "train" not in found.splits:
        yield f"split = {_toml(next(iter(found.splits)))}"
    yield f"holdout = {HELD_OUT}  # kept from training, to choose the best step by"
    if train.settings.get("captions") in ("name", ["name"]):
        yield 'loss = { positives = "identical" }  # equal words are no mistake'
    yield ""
    if rows * HELD_OUT < FEW_HELD_OUT:
        yield "[eval]"
        yield 'checkpoint = "last"  # so few held-out pictures cannot choose a step'
        yield ""
