"""Every fenced block of the pages is of a known language and is true as far as a parser can tell.

The examples in Python of README.md, docs/store.md and docs/formats.md are run in end_to_end.
"""

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

import click
import pytest
import tomli_w

from pipeline.cli import cli
from pipeline.reference import sections
from pipeline.run.config import load_config

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))


class Block(NamedTuple):
    """A fenced block and where it stands."""

    page: str
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.text.splitlines()[0][:40]}"


BLOCKS = [
    Block(page.name, *found)
    for page in PAGES
    for found in re.findall(
        r"^```(\w*)[^\n]*\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL
    )
]


def of(*languages: str) -> list[Block]:
    return [block for block in BLOCKS if block.language in languages]


def accept(command: str) -> None:
    """See that the command line takes a line, without running it."""
    name, *arguments = shlex.split(command, comments=True)
    subcommand = cli.get_command(click.Context(cli), name)
    assert subcommand is not None, command
    subcommand.make_context(name, arguments)  # raises UsageError if it does not


def test_every_block_is_of_a_language_that_is_checked_here() -> None:
    assert len(BLOCKS) > 50
    for block in BLOCKS:
        assert block.language in {"", "bash", "console", "json", "python", "toml"}, block


@pytest.mark.parametrize("block", of("python"), ids=str)
def test_python_compiles(block: Block) -> None:
    compile(block.text, block.page, "exec")


@pytest.mark.parametrize("block", of("toml"), ids=str)
def test_toml_is_a_run_file_or_a_part_of_one(block: Block, tmp_path: Path) -> None:
    document: dict[str, Any] = tomllib.loads(block.text)
    data = document.setdefault("data", {})
    for split in ("train", *document.get("eval", {}).get("split_templates", {})):
        data.setdefault(split, {"kind": "webdataset", "path": "shards.tar"})
    path = tmp_path / "run.toml"
    path.write_text(tomli_w.dumps(document), encoding="utf-8")
    load_config(str(path))  # raises ConfigError where a setting is unknown or out of range


@pytest.mark.parametrize("block", of("", "bash", "console"), ids=str)
def test_commands_are_ones_that_sail_accepts(block: Block) -> None:
    for line in block.text.splitlines():
        command = line.removeprefix("$ ")
        if found := re.match(r"(?:torchrun .*-m pipeline\.cli|sail) (.+)", command):
            accept(found[1])


def test_targets_of_make_exist() -> None:
    lines = [line for block in of("", "bash", "console") for line in block.text.splitlines()]
    prose = " ".join(page.read_text("utf-8") for page in PAGES)
    lines += re.findall(r"`(make [^`]+)`", prose)
    calls = [line.removeprefix("$ ").partition(" #")[0].split() for line in lines]
    named = {word for call in calls if call[:1] == ["make"] for word in call[1:] if "=" not in word}
    assert len(named) > 5
    assert named <= TARGETS, named - TARGETS


def test_settings_that_the_pages_name_exist() -> None:
    prose = " ".join(page.read_text("utf-8") for page in PAGES)
    stages = "run|extract|align|eval|report"
    named = re.findall(rf"`((?:{stages})(?:\.(?!py`)[a-z_0-9]+)+)(?: = [^`]*)?`", prose)
    known = {
        f"{title.strip('[]')}.{key}" for title, model in sections() for key in model.model_fields
    }
    modules = {name for name in named if is_module(*name.split(".")[:2])}
    assert len(set(named)) > 30
    assert not set(named) - known - modules


def is_module(package: str, name: str) -> bool:
    return (ROOT / package / f"{name}.py").is_file()
