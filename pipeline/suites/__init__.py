"""Suites: published evaluations, each by one command on those of their data sets that are there.

A suite is a TOML file beside this one: the encoders of the published models, and for each data set
how it is recognised below a folder, read and measured, and what was published for it.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from align.checkpoint import Checkpoint
from evaluate.results import sha256_of
from features.config import Name
from features.errors import ConfigError
from features.storage.reading import Expected, checked, read_toml
from pipeline.card import export_model
from pipeline.export import released
from pipeline.hub import fetched
from pipeline.interrupt import StopRequest
from pipeline.python import load_aligned
from pipeline.run.aligned import KINDS
from pipeline.run.config import RunConfig, config_of, is_run, vary_config
from pipeline.run.evaluate import evaluate_run
from pipeline.run.extract import extract
from pipeline.run.folder import run_folder, stage_lock

FOLDER = Path(__file__).parent
SUITES = tuple(sorted(path.stem for path in FOLDER.glob("*.toml")))
HERE = "{here}"
"""In the settings of a data set: the folder that it was recognised in."""
DEPTH = 2
OF_A_SUITE = Expected("A suite that ships with the program", "Install it again.", ConfigError)


class DataSet(BaseModel):
    """A data set of a suite."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Name
    """Several may have one name: the first that is found is taken."""
    found_by: str
    """A file or folder that the folder of the data set has."""
    split: dict[str, Any] = {}
    """Its section `[data.NAME]`."""
    segmentation: dict[str, Any] = {}
    """Or its section `[eval.segmentation.NAME]`."""
    templates: str | list[str] | None = None
    """Its prompts."""
    published: dict[str, float] = {}
    """In per cent, by task and metric."""


class Suite(BaseModel):
    """A published evaluation."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: str
    published_by: str
    encoders: dict[str, dict[str, dict[str, Any]]] = {}
    """Of released heads, which do not say their own."""
    align: dict[str, Any] = {}
    eval: dict[str, Any] = {}
    sets: tuple[DataSet, ...] = Field(min_length=1)


def read_suite(name: str) -> Suite:
    """Read a suite that ships with the program.

    Raises:
        ConfigError: There is none of that name.
    """
    if name not in SUITES:
        raise ConfigError(
            f"There is no suite {name!r}. One of {', '.join(SUITES)} was expected. Correct --suite."
        )
    path = FOLDER / f"{name}.toml"
    suite: Suite = checked(read_toml(path, OF_A_SUITE), Suite, path, OF_A_SUITE)
    return suite


def settings_of(suite: Suite, root: Path) -> dict[str, Any]:
    """Return the sections of a run file that measure what is there of a suite.

    Args:
        suite: The suite.
        root: Folder below which its data sets lie, at most two folders deep, each in the layout of
            its authors.

    Raises:
        ConfigError: None of them is there.
    """
    found = _found(suite, root)
    splits = {name: each for name, each in found.items() if each.split}
    masks = {name: each for name, each in found.items() if each.segmentation}
    absent: dict[str, list[str]] = {}
    for each in suite.sets:
        if each.name not in found:
            absent.setdefault(each.name, []).append(each.found_by)
    if not splits:
        raise ConfigError(
            f"{root} has none of the data sets of the suite that have labels or captions, such as "
            f"a folder with {suite.sets[0].found_by}. One at least was expected, in the layout of "
            f"its authors. Correct --data."
        )
    return {
        "data": {name: each.split for name, each in splits.items()},
        "align": suite.align,
        "eval": suite.eval
        | {
            "split_templates": {
                name: each.templates for name, each in splits.items() if each.templates is not None
            },
            "segmentation": {name: each.segmentation for name, each in masks.items()},
        },
        "report": {
            "title": suite.title,
            "published": {
                "by": suite.published_by,
                "percent": _published(found),
                "absent": {name: " or ".join(places) for name, places in absent.items()},
            },
        },
    }


def _found(suite: Suite, root: Path) -> dict[str, DataSet]:
    """Return the data sets that are there, with their folders in their settings."""
    if not root.is_dir():
        raise ConfigError(
            f"{root} is no folder. The folder of the data sets was expected. Correct --data."
        )
    folders, found = list(_folders(root, DEPTH)), dict[str, DataSet]()
    for each in suite.sets:
        here = next((folder for folder in folders if (folder / each.found_by).exists()), None)
        if here is not None and each.name not in found:
            placed = {
                "split": _placed(each.split, here),
                "segmentation": _placed(each.segmentation, here),
            }
            found[each.name] = each.model_copy(update=placed)
    return found


def _published(found: dict[str, DataSet]) -> dict[str, float]:
    """Return the published numbers by the names of our results."""
    return {
        f"{task} {name} {metric}": value
        for name, each in found.items()
        for what, value in each.published.items()
        for task, metric in [what.rsplit(" ", 1)]
    }


def run_suite(
    name: str,
    head: str,
    root: Path,
    out: Path | None,
    overrides: tuple[str, ...],
    stop: StopRequest,
) -> tuple[Path, RunConfig]:
    """Extract what is there of a suite, and measure a head on it.

    Heads of the same encoders share the features in `out`.

    Args:
        name: One of `SUITES`.
        head: A run, an exported folder, a checkpoint, or a released `.pt`; also `hf://…`.
        root: Folder of the data sets.
        out: Run folder of the features; `runs/<suite>` if not given.
        overrides: `SECTION.KEY=VALUE` for the settings of the suite.
        stop: Asked between chunks and data sets.

    Returns:
        Its results.json, and the settings that it was measured with.

    Raises:
        ConfigError: There is no such suite or head, or none of the data.
        SailError: What extraction and evaluation refuse.
    """
    suite = read_suite(name)
    document = settings_of(suite, root)
    place = fetched(head)
    if not place.exists():
        raise ConfigError(
            f"There is no head {head}. A run, an exported folder or a released .pt was expected, "
            f"or hf://… of one. Correct --head."
        )
    if place.is_dir():
        document |= _encoders_of(place)
    else:
        released.load_released(place)  # refused before anything is extracted for it
        document["encoders"] = suite.encoders
    document["run"] = {"name": name, "dir": str(out or Path("runs") / name)}
    config = config_of(document, f"The suite {name}", overrides=overrides)
    extract(config, stop)
    label = f"{place.stem}-{_identity(place)[:8]}"
    measured = vary_config(config, config.run.dir / "heads" / label, [])
    if place.is_dir():
        checkpoint = place / "align" / "best" if is_run(place) else place
        with stage_lock(measured, "align"):
            export_model(checkpoint, run_folder(measured).align / measured.eval.checkpoint)
    elif not (run_folder(measured).align / measured.eval.checkpoint).exists():
        released.import_head(place, measured)
    return evaluate_run(measured, stop), measured


def _folders(root: Path, depth: int) -> Iterator[Path]:
    """Yield a folder and those below it, the nearer ones first."""
    level = [root]
    for _ in range(depth + 1):
        yield from level
        level = [
            Path(each.path)
            for folder in level
            for each in sorted(os.scandir(folder), key=lambda each: each.name)
            if each.is_dir() and not each.name.startswith(".")
        ]


def _placed(settings: dict[str, Any], here: Path) -> dict[str, Any]:
    return {
        name: value.replace(HERE, str(here)) if isinstance(value, str) else value
        for name, value in settings.items()
    }


def _encoders_of(folder: Path) -> dict[str, Any]:
    """Return the sections that say which encoders the head of a run, or of an export, reads."""
    aligned = load_aligned(folder, device="cpu")
    checkpoint = aligned.checkpoint
    return {
        "encoders": aligned.encoders.model_dump(mode="json", exclude_unset=True),
        "align": {kind: [each["name"] for each in checkpoint.columns(kind)] for kind in KINDS},
    }


def _identity(place: Path) -> str:
    if place.is_file():
        return sha256_of(place) or ""
    return Checkpoint.open(place / "align" / "best" if is_run(place) else place).sha256
