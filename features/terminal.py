"""Text of strangers on its way to a terminal, a log or a file name.

Captions, keys, class names, and the names of files and encoders come with the data. What would
steer a terminal, turn the order of the letters round, or begin a line of its own is shown as an
escape.
"""

import re

_STEERING = (
    "\x00-\x08\x0b-\x1f"  # C0 with ESC; tab and line feed are below
    "\x7f-\x9f"  # DEL and C1, of which CSI is one
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # direction of writing
    "\u2028\u2029"  # line and paragraph separators
    "\ufff9-\ufffb"  # annotations, which hide text
    "\ud800-\udfff"  # halves of characters: bytes of a file name that are not UTF-8
)
_IN_LINES = re.compile(f"[{_STEERING}]")
_IN_ONE_LINE = re.compile(f"[\n{_STEERING}]")


def harmless(text: str, *, lines: bool = False) -> str:
    r"""Return a text in which whatever steers a terminal is an escape, as `\u001b` for ESC.

    The escapes are those of JSON: a JSON document stays the same document.

    Args:
        text: Anything.
        lines: Whether line feeds stay: the text is several lines of ours.
    """
    pattern = _IN_LINES if lines else _IN_ONE_LINE
    return pattern.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
