"""The run file: one TOML document that describes a whole run."""

import difflib
import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import google_crc32c
import tomli_w
from pydantic import BaseModel, Field, PositiveInt, ValidationError, model_validator
from pydantic_core import ErrorDetails

from align.config import AlignConfig
from align.start.defaults import left_open
from evaluate.measures import MEASURES, EvalConfig
from features.config import (
    SETTINGS,
    BesideRunFile,
    ExtractConfig,
    ImageEncoderConfig,
    Name,
    TextEncoderConfig,
)
from features.errors import ConfigError
from features.sources import Source
from features.storage.joined_column import BESIDE
from features.storage.place import FolderSetting, without_secrets
from features.storage.reading import Expected, cut, read_text, read_toml, reason_of, shown

OF_A_RECIPE = Expected(
    "A run file in TOML", "Correct the line; `sail settings` lists all settings.", ConfigError
)
RECIPES = Path(__file__).parents[1] / "recipes"
SETTINGS_FILE = "config.toml"
"""In the folder of a run: its resolved settings."""
EXPECTED = {
    "tuple_type": 'an array was expected, as ["a", "b"]',
    "string_type": 'text in quotes was expected, as "a"',
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type"), "a section was expected"),
}
"""What pydantic calls otherwise than TOML does, by the kind of its fault."""


class RunSettings(BaseModel):
    """What the run is called, where it writes, and on what it computes."""

    model_config = SETTINGS

    name: Name = "run"
    """Name of the run; the name of the run file if not given."""
    dir: FolderSetting = Path("runs")
    """Folder of everything the run writes, relative to where the command is called; `runs/<name>`
    if not given."""
    features: FolderSetting | None = None
    """Run folder whose index and features are used instead of this run's own, so that several heads
    share one extraction; `sail extract` is then not run."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of the initial head, the shuffle and the resampling."""
    device: str = Field(default="auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")
    """`cpu`, `cuda`, `cuda:1`, `mps`, or `auto`: the first GPU if there is one."""
    threads: PositiveInt | None = None
    """Processor threads of torch; its own choice if not given."""


class EncodersConfig(BaseModel):
    """The frozen encoders, each under the short name that its column has in the store."""

    model_config = SETTINGS

    image: dict[Name, ImageEncoderConfig] = {}
    """Image encoders."""
    text: dict[Name, TextEncoderConfig] = {}
    """Text encoders."""

    @property
    def image_columns(self) -> tuple[str, ...]:
        """Names of all image columns: of each encoder its own, then those of its `also`."""
        return tuple(
            column for name, config in self.image.items() for column in (name, *config.also)
        )

    @property
    def text_columns(self) -> dict[str, TextEncoderConfig]:
        """All text columns by their names, each as an encoder of its own would be set."""
        columns = dict[str, TextEncoderConfig]()
        for name, config in self.text.items():
            columns |= config.columns(name)
        return columns

    @model_validator(mode="after")
    def _columns_have_names_of_their_own(self) -> "EncodersConfig":
        texts = [column for name, config in self.text.items() for column in (name, *config.also)]
        for kind, names in (("image", list(self.image_columns)), ("text", texts)):
            if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
                raise ValueError(
                    f"the {kind} columns {', '.join(map(repr, twice))} are named more than once, "
                    f"in [encoders.{kind}] and the `also` of its encoders. Give each a name of its "
                    f"own"
                )
        return self


class PublishedNumbers(BaseModel):
    """Numbers of a publication, of a suite of evaluations (`sail eval --suite`)."""

    model_config = SETTINGS

    by: str
    """Who published them, and for which model."""
    percent: dict[str, float]
    """By the name of a result: task, data set, metric."""
    absent: dict[str, str] = {}
    """Data sets of the suite that were not found, and what was looked for."""


class ReportConfig(BaseModel):
    """What stands in the report beside the run's own numbers."""

    model_config = SETTINGS

    published: PublishedNumbers | None = None
    """Shown beside the run's own numbers, with the difference; a suite sets it."""

    title: str | None = None
    """Title of the report; the name of the run if not given."""
    reference: Annotated[Path, BesideRunFile] | None = None
    """JSON file of numbers measured earlier, shown as such and never mixed with the run's own."""


class RunConfig(BaseModel):
    """Every setting of every stage."""

    model_config = SETTINGS

    run: RunSettings = RunSettings()
    data: dict[Name, Source] = Field(min_length=1)
    """One source of image–text pairs per split (`train`, `test`, … any names)."""
    encoders: EncodersConfig = EncodersConfig()
    extract: ExtractConfig = ExtractConfig()
    align: AlignConfig = AlignConfig()
    eval: EvalConfig = EvalConfig()
    report: ReportConfig = ReportConfig()

    @model_validator(mode="after")
    def _names_exist(self) -> "RunConfig":
        named: list[tuple[str, str | None]] = [
            *(("align.mix", split) for split in self.align.mix),
            ("align.split", None if self.align.mix or not self._names_split else self.align.split),
            *(
                (setting, split)
                for measure in MEASURES
                for setting, splits in measure.mentions(self.eval).items()
                for split in splits
            ),
        ]
        for setting, split in named:
            if split is not None and split not in self.data:
                raise ValueError(
                    f"{setting} names the split {split!r}; [data] has {list(self.data)}"
                )
        for kind, names, given in [
            ("image", list(self.encoders.image_columns), self.align.names("image")),
            ("text", list(self.encoders.text_columns), self.align.names("text")),
        ]:
            for name in given:
                if names and name not in names:
                    raise ValueError(f"align.{kind} names {name!r}; [encoders.{kind}] has {names}")
        return self

    @property
    def extracted(self) -> dict[str, Source]:
        """The splits whose features `sail extract` makes: those that were not imported."""
        return {split: source for split, source in self.data.items() if source.has_samples}

    @property
    def trained_splits(self) -> tuple[str, ...]:
        """The splits that the head is trained on: those that are mixed, or the one.

        None where the run has no such split: its features are for a head from elsewhere.
        """
        named = tuple(self.align.mix) or (self.align.split,)
        return tuple(split for split in named if split in self.data)

    @property
    def _names_split(self) -> bool:
        return "split" in self.align.model_fields_set

    def check_trains(self) -> None:
        """Refuse a run that has no split to train on.

        Raises:
            ConfigError: It has none.
        """
        if not self.trained_splits:
            raise ConfigError(
                f"align.split names the split {self.align.split!r}; [data] has {list(self.data)}. "
                f"A split to train on was expected. Add it to [data], or set align.split to one "
                f"of these."
            )

    def aligned_encoder(self, kind: Literal["image", "text"]) -> str:
        """Return the name of the column of one kind that `align` uses, several joined by `+`.

        Raises:
            ConfigError: The recipe has several and names none, or has none.
        """
        encoders = self.encoders.image if kind == "image" else self.encoders.text
        if names := self.align.names(kind):
            return BESIDE.join(names)
        if len(encoders) != 1:
            raise ConfigError(
                f"The recipe has {len(encoders)} {kind} encoders ({', '.join(encoders) or 'none'}) "
                f"and align.{kind} is not set. Set it to the name of one of them."
            )
        return next(iter(encoders))


def load_config(recipe: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read and check a run file, before any work starts.

    Args:
        recipe: Path of a TOML file, the folder of a run, or the name of a recipe that ships with
            the program.
        overrides: `section.key=value`, the value as in TOML (or a bare word).

    Raises:
        ConfigError: There is no such file, it is not TOML, or a setting is unknown or out of
            range. The message lists every fault in the file, not only the first.
    """
    path = _find_recipe(recipe)
    _check_kept(path)
    document = read_toml(path, OF_A_RECIPE)
    run = document.setdefault("run", {})
    if path.name == SETTINGS_FILE and path.parent == Path(recipe) and isinstance(run, dict):
        run["dir"] = recipe  # where it is now
    for override in overrides:
        _apply(document, override)
    run = document.setdefault("run", {})
    if isinstance(run, dict):
        run.setdefault("name", path.stem)
        run.setdefault("dir", str(Path("runs") / str(run["name"])))
    return config_of(document, str(path), path.resolve().parent)


def vary_config(config: RunConfig, folder: Path, overrides: Sequence[str]) -> RunConfig:
    """Return the settings of a run in another folder, on the features of this one.

    Args:
        config: Of this run.
        folder: Run folder of the other.
        overrides: What else differs, as in `load_config`.

    Raises:
        ConfigError: A setting is unknown or out of range.
    """
    document = config.model_dump(mode="json", exclude_unset=True)
    features = config.run.features or config.run.dir
    where = [f"run.dir={json.dumps(str(folder))}", f"run.features={json.dumps(str(features))}"]
    what = f"The run {config.run.name!r} with {', '.join(overrides)}"
    return config_of(document, what, overrides=[*overrides, *where])


def config_of(
    document: dict[str, Any],
    what: str,
    folder: Path | None = None,
    *,
    overrides: Sequence[str] = (),
) -> RunConfig:
    """Check the settings of a run.

    Args:
        document: As TOML has them; changed by the overrides.
        what: Where they are from, for messages.
        folder: That paths in them are relative to.
        overrides: As in `load_config`.

    Raises:
        ConfigError: A setting is unknown or out of range.
    """
    for override in overrides:
        _apply(document, override)
    try:
        return RunConfig.model_validate(document, context={"folder": folder})
    except ValidationError as error:
        faults = [_describe(fault) for fault in error.errors()]
        where = "; ".join(faults) if len(faults) == 1 else "".join(f"\n  {f}" for f in faults)
        raise ConfigError(
            f"{what} cannot be used; correct it (`sail settings` lists all settings): "
            f"{without_secrets(where)}"
        ) from None  # the cause would repeat what a URL in it may hide


def dump_config(config: RunConfig) -> str:
    """Return the resolved run file as TOML, every default written out.

    Those that follow from the number of rows are left out where they are not given.
    """
    exclude = {"align": left_open(config.align)}
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True, exclude=exclude))


KEPT = "# What this stage ran with; change the run file instead. crc32c of what follows: "


def dump_kept(config: RunConfig) -> str:
    """Return the resolved run file of a stage as TOML, with a checksum that `load_config` checks.

    It is without `run.dir`, so that the run folder may move.
    """
    exclude: dict[str, set[str]] = {"run": {"dir"}, "align": set(left_open(config.align))}
    text = tomli_w.dumps(config.model_dump(mode="json", exclude_none=True, exclude=exclude))
    return f"{KEPT}{google_crc32c.value(text.encode()):08x}\n{text}"


def _check_kept(path: Path) -> None:
    first, _, text = read_text(path, OF_A_RECIPE).partition("\n")
    crc = google_crc32c.value(text.encode())
    if first.startswith(KEPT) and first != f"{KEPT}{crc:08x}":
        raise ConfigError(
            f"{path} is not as the stage left it: its crc32c is {crc:08x}. The settings that the "
            f"stage ran with were expected. Put the file back, run the stage again from the run "
            f"file, or delete the first line if these settings are meant."
        )


def shipped_recipes() -> list[str]:
    """Return the names of the recipes that ship with the program."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def folder_of_run(name: str) -> Path:
    """Return the folder of a run that is given by its folder, its run file or its recipe's name."""
    is_recipe = Path(name).is_file() or name in shipped_recipes()
    return load_config(name).run.dir if is_recipe and not is_run(Path(name)) else Path(name)


def is_run(folder: Path) -> bool:
    """Return whether a folder is that of a run."""
    return (folder / SETTINGS_FILE).is_file()


def _find_recipe(recipe: str) -> Path:
    shipped = shipped_recipes()
    path = RECIPES / f"{recipe}.toml" if recipe in shipped else Path(recipe)
    if is_run(path):
        path /= SETTINGS_FILE
    if not path.is_file():
        close = difflib.get_close_matches(recipe, shipped, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ConfigError(
            f"There is no recipe {recipe!r}. Give the path of a TOML file, the folder of a run, or "
            f"one of {', '.join(shipped)}.{hint}"
        )
    return path


def _apply(document: dict[str, Any], override: str) -> None:
    name, separator, text = override.partition("=")
    if not separator or not name.strip():
        raise ConfigError(
            f"--set {shown(override)} has no value. Write it as in `--set align.batch_size=1024`."
        )
    try:
        value: object = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()  # a bare word, such as a path
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"--set {cut(override)} cannot be read: {reason_of(error)}. A value as in TOML was "
            f"expected. Correct it."
        ) from error
    *sections, key = name.strip().split(".")
    table = document
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise ConfigError(
                f"--set {shown(override)}: {shown(section)} is a value, not a section. Name a key "
                f"of a section, as in `--set align.batch_size=1024`."
            )
    table[key] = value


def kinds_of(annotation: Any) -> dict[str, type[BaseModel]]:
    """Return the sections that a setting can be, by their `kind`; none where it has no kinds."""
    if get_origin(annotation) is not Annotated:
        return {}
    return {
        str(get_args(each.model_fields["kind"].annotation)[0]): each
        for each in get_args(get_args(annotation)[0])
        if isinstance(each, type) and issubclass(each, BaseModel)
    }


def _describe(fault: ErrorDetails) -> str:
    place, section = _find(fault["loc"])
    where = ".".join(place)
    if fault["type"] == "extra_forbidden":
        known = section.model_fields if section else ()
        close = difflib.get_close_matches(place[-1], known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        return f"{where}: there is no such setting.{hint}"
    if fault["type"] == "value_error":  # a validator of ours: its message is complete
        return f"{where or 'run file'}: {fault['ctx']['error']}"
    if fault["type"] == "missing":
        return f"{where}: this setting is needed."
    expected = EXPECTED.get(fault["type"], fault["msg"])
    return f"{where}: {expected}, got {shown(fault['input'])}"


def _find(location: Sequence[int | str]) -> tuple[list[str], type[BaseModel] | None]:
    """Return a place as the run file has it, and the section in which its last part stands.

    Pydantic adds the kind of a section to the place; the file has none there.
    """
    place, section = list[str](), None
    at: Any = RunConfig
    for part in map(str, location):
        if part in (kinds := kinds_of(at)):
            at = kinds[part]
            continue
        place.append(part)
        section = at if isinstance(at, type) and issubclass(at, BaseModel) else None
        if section is not None:
            field = section.model_fields.get(part)
            at = field.annotation if field else None
        else:
            at = get_args(at)[1] if get_origin(at) is dict else None
    return place, section
