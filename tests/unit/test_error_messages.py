"""Each message of an error says more than what is wrong, and what to do, as far as one can parse.

A message that is put together elsewhere (a variable, a call) is not seen here; the tests of what
raises it match its words.
"""

import ast
import errno
import os
import re
from pathlib import Path

import pytest

from features import errors
from features.errors import SailError, refused, remedy_of

ROOT = Path(__file__).parents[2]
SOURCES = [
    path
    for package in ("features", "align", "evaluate", "pipeline")
    for path in sorted((ROOT / package).rglob("*.py"))
]
ERRORS = {
    name
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, SailError)
}
REMEDIES = (
    "add|align|ask|call|change|check|choose|compute|convert|copy|correct|create|delete|encode|evaluate|"
    "export|extract|fetch|fill|find|finish|free|give|install|leave|lower|make|name|pick|put|raise|"
    "remove|rename|restore|run|see|send|set|start|take|train|unpack|use|write"
)
ENDS = re.compile(r"[.;:?!] ")
REMEDY = re.compile(rf"(?:[.;:?!}}]|, or|, and|,) ?(?:or |and )?(?:{REMEDIES})\b", re.IGNORECASE)
WHOLE = re.compile(r"[.;:?!}]\s*\{\}\.?$")
"""A message that ends in a sentence from a variable: what to do differs from case to case."""


def messages() -> list[tuple[str, str]]:
    """Return place and text, `{}` for what is put in, of each message that is written in full."""
    return [
        (f"{path.relative_to(ROOT)}:{node.lineno}", text)
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        if node.func.id in ERRORS and len(node.args) == 1
        if (text := text_of(node.args[0])) is not None
    ]


def text_of(node: ast.expr) -> str | None:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(
            str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values
        )
    return None


def faults(text: str) -> list[str]:
    found = [] if ENDS.search(text) else ["it is one sentence"]
    return found if REMEDY.search(text) or WHOLE.search(text) else [*found, "it has no remedy"]


def test_a_message_without_a_remedy_is_told_from_one_with_it() -> None:
    assert faults("{} is empty.") == ["it is one sentence", "it has no remedy"]
    assert faults("{} is empty. Rows were expected.") == ["it has no remedy"]
    assert not faults("{} is empty. Rows were expected. Correct `path`.")


def test_the_messages_of_the_troubleshooting_page_are_in_the_program() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
    quoted = re.findall(r"^\| `(.+?)` \|", page, re.MULTILINE)
    assert len(quoted) > 10
    constants = [
        node.value
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    assert not [words for words in quoted if not any(words in each for each in constants)]


def test_every_message_says_what_is_wrong_and_what_to_do() -> None:
    found = messages()
    assert len(found) > 200
    poor = [f"{place}: {fault}: {text}" for place, text in found for fault in faults(text)]
    assert not poor, "\n".join(poor)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "Make room on the disk"),
        (errno.EACCES, "Give this user the right"),
        (errno.EROFS, "disk that can be written"),
        (errno.ENOENT, "Correct the path"),
        (errno.EMFILE, "ulimit -n"),
    ],
)
def test_what_to_do_depends_on_what_the_operating_system_says(number: int, words: str) -> None:
    error = OSError(number, os.strerror(number), "runs/x")
    assert words in refused(error, "this command")
    of_safetensors = Exception(f"I/O error: {os.strerror(number)} (os error {number})")
    assert words in remedy_of(of_safetensors)
