"""Text in files of others: its encoding, its lines, and the numbers and names written in it."""

import ast
import codecs
import json
import math
import re
from collections import Counter
from decimal import Decimal
from typing import Annotated, Any

from pydantic import AfterValidator

BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",  # before UTF-16: it begins with the mark of that
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}


def _known_encoding(name: str) -> str:
    try:
        codecs.lookup(name)
        "".encode(name)  # some codecs are not of text
    except LookupError:
        raise ValueError(f"there is no encoding {name!r}; give one such as 'cp1252'") from None
    return name


Encoding = Annotated[str, AfterValidator(_known_encoding)]
"""The name of a text encoding, as Python has them."""


def encoding_of(beginning: bytes, given: str | None) -> tuple[str, int]:
    """Return the encoding of a text and the bytes of its mark: by the mark, as given, or UTF-8."""
    for mark, name in BYTE_ORDER_MARKS.items():
        if beginning.startswith(mark):
            return name, len(mark)
    return given or "utf-8", 0


def decoded(content: bytes, encoding: str | None = None, *, is_cut: bool = False) -> str | None:
    """Return a text, None where its bytes are not of its encoding, or hold NUL as no text does.

    Args:
        content: The bytes.
        encoding: What it is in where it has no byte order mark; UTF-8 if not given.
        is_cut: Whether the last character may be there in part.
    """
    name, skipped = encoding_of(content, encoding)
    try:
        text = codecs.getincrementaldecoder(name)().decode(content[skipped:], final=not is_cut)
    except UnicodeDecodeError:
        return None
    return None if "\0" in text else text


def lines_of(text: str) -> list[str]:
    """Return the lines of a text, each ended by a line feed and nothing else.

    `str.splitlines` also ends lines at U+2028, U+0085 and others, which captions may hold.
    """
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


LITERAL = r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
LIST = re.compile(rf"\[\s*{LITERAL}(?:(?:\s*,\s*|\s+){LITERAL})*\s*,?\s*\]", re.DOTALL)


def listed_texts(text: str) -> list[str] | None:
    """Return the texts of a list written as text (JSON, Python, NumPy), None if it is none."""
    if not (text.startswith("[") and text.endswith("]") and LIST.fullmatch(text)):
        return None
    try:
        found = json.loads(text)
    except ValueError:
        try:
            found = [ast.literal_eval(item) for item in re.findall(LITERAL, text, re.DOTALL)]
        except (ValueError, SyntaxError):
            return None
    return found if all(isinstance(item, str) for item in found) else None


WHOLE = re.compile(r"([+-]?\d+)(\.0*|,0)?", re.ASCII)
NUMBER = re.compile(
    r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?inf(inity)?", re.ASCII | re.IGNORECASE
)
NO_VALUE = frozenset({"", "nan", "null", "n/a", "<na>"})
"""What tables hold where they have no number, in lower case."""
MAX_DIGITS = 20
NO_NUMBER = "labels or groups that are no whole number from 0 (taken as unknown)"


def number_or_name(value: Any, counts: Counter[str], *, of_any_size: bool = False) -> int | str:
    """Return a label or group: a whole number, -1 for none, or the name that stands there.

    `2`, `2.0` and `"2.0"` are 2. `"1_12"` is a name. What is neither is counted.

    Args:
        value: What stands in the data.
        counts: Where it is counted.
        of_any_size: Whether a number beyond int32 is a name, as it may be of groups.
    """
    found = _number_in(value.strip()) if isinstance(value, str) else _number_of(value)
    if isinstance(found, str):
        return found
    if found is not None and -1 <= found < 2**31:
        return found
    if of_any_size and found is not None and found > 0:
        return str(found)
    counts[NO_NUMBER] += 1
    return -1


def _number_in(text: str) -> int | str | None:
    """Return the whole number that a text is, the text if it is no number, None otherwise."""
    if text.lower() in NO_VALUE:
        return -1
    if (whole := WHOLE.fullmatch(text)) and len(text) <= MAX_DIGITS:
        return int(whole[1])
    return None if whole or NUMBER.fullmatch(text) else text


def _number_of(value: Any) -> int | None:
    if value is None:
        return -1
    if isinstance(value, (float, Decimal)) and math.isfinite(value) and value % 1 == 0:
        return int(value)
    return int(value) if isinstance(value, int) else None
