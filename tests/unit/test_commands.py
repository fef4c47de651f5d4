"""What holds for every command: help, examples that parse, exit codes, plain text in a pipe."""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from pipeline.cli import SECTIONS, cli

ESCAPE = "\x1b"
EXAMPLE = re.compile(r"^ +sail (.+?)(?: \|.*)?$", re.MULTILINE)
COLOURS = {"NO_COLOR", "FORCE_COLOR", "CLICOLOR_FORCE"}
FOR_PEOPLE = {"explore"}  # it serves a page until it is stopped
PRINTS_A_PATH = {
    *("embed", "export", "export-head", "convert", "import-store"),
    *("merge", "subset", "rechunk", "reorder"),
}
"""These print one line, which a script takes as it is."""


@pytest.mark.parametrize("name", cli.commands)
def test_a_command_says_what_it_does_and_how_it_is_called(name: str) -> None:
    command = cli.commands[name]
    assert command.help
    for option in command.params:
        if isinstance(option, click.Option):
            assert option.help, f"{name} {option.opts}"
    examples = EXAMPLE.findall(command.help.replace("\\\n", " "))
    assert examples
    for example in examples:
        called, *arguments = shlex.split(example)
        cli.commands[called].make_context(called, arguments)  # raises UsageError if it is wrong


@pytest.mark.parametrize("name", cli.commands)
def test_what_a_script_reads_is_there_as_json(name: str) -> None:
    options = {option for each in cli.commands[name].params for option in each.opts}
    assert "--json" in options or name in FOR_PEOPLE | PRINTS_A_PATH


def test_the_help_lists_every_command_with_a_whole_sentence() -> None:
    text = CliRunner().invoke(cli, ["--help"], terminal_width=80).stdout
    listed = [str(command.name) for commands in SECTIONS.values() for command in commands]
    assert sorted(listed) == sorted(cli.commands)
    assert not re.findall(r"^  .*\.\.\.$", text, re.MULTILINE)


@pytest.mark.parametrize(
    ("begun", "offered"),
    [
        ("sail ex", "plain,explore plain,export plain,export-head plain,extract"),
        ("sail extract sai", "plain,sail plain,sail-paper plain,sail-small"),
        ("sail extract my", "file,my"),
        ("sail verify runs/", "dir,runs/"),
    ],
)
def test_the_shell_completes_commands_recipes_and_paths(begun: str, offered: str) -> None:
    words = {"COMP_WORDS": begun, "COMP_CWORD": str(begun.count(" "))}
    asked = words | {"_SAIL_COMPLETE": "bash_complete"}
    result = CliRunner().invoke(cli, prog_name="sail", env=asked)
    assert result.stdout.split() == offered.split()


@pytest.mark.parametrize("name", cli.commands)
def test_an_unknown_option_ends_a_command_with_2(name: str) -> None:
    result = CliRunner().invoke(cli, [name, "--no-such-option"])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "--no-such-option" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code"), [(["--help"], 0), (["plan", "nowhere"], 1), (["inspect", "nowhere"], 1)]
)
def test_a_pipe_gets_no_escape_codes(arguments: list[str], code: int) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "pipeline.cli", *arguments],
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if name not in COLOURS}
        | {"TERM": "xterm-256color"},
        check=False,
    )
    assert ended.returncode == code, ended.stderr
    assert ended.stdout or ended.stderr
    assert ESCAPE not in ended.stdout + ended.stderr


def test_a_search_for_nothing_is_refused() -> None:
    for arguments in ([""], [], ["a circle", "--image", "photo.jpg"]):
        result = CliRunner().invoke(cli, ["search", "runs/none", *arguments])
        assert result.exit_code == 2
        assert "Give either a sentence or --image FILE" in result.output


def test_settings_are_found_by_section_and_by_name() -> None:
    shown = CliRunner().invoke(cli, ["settings", "webdataset"])
    assert "Glob pattern(s) of the tar files" in " ".join(shown.stdout.replace("│", " ").split())
    assert "batch_size" not in shown.stdout
    found = json.loads(CliRunner().invoke(cli, ["settings", "batch_size", "--json"]).stdout)
    assert found.keys() >= {"[align]", "[encoders.image.NAME]"}
    assert {row["name"] for rows in found.values() for row in rows} == {"batch_size"}
    assert CliRunner().invoke(cli, ["settings", "btach_size"]).exit_code == 1


def test_no_message_names_a_page_that_an_installed_program_lacks() -> None:
    """Docstrings are read beside the pages; what is raised or logged is read without them."""
    root = Path(__file__).parents[2]
    for package in ("features", "align", "evaluate", "pipeline"):
        for path in (root / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.Raise):
                    assert not re.search(r"docs/\w+\.md", ast.unparse(node)), path
