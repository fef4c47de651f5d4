"""What identifies the features of a column, and in what two descriptions of them differ."""

import json
from collections.abc import Collection, Mapping
from typing import Any

RECORDED_ONLY = frozenset({"versions", "licence"})
"""Facts that do not decide the features: no reason to compute them again."""
FILES = "files"
"""The sha256 of each file beside the weights that decides the features, by its name."""
BEFORE_THEY_WERE_RECORDED: dict[str, Any] = {"mode": "exact", "upright": False, "layer": -1}
"""What holds of features that were made before these facts were recorded."""


def differences(
    found: Any, expected: Any, *, without: Collection[str] = (), name: str = ""
) -> list[tuple[str, Any, Any]]:
    """Return the leaves in which two JSON values differ: their dotted name and both values.

    Args:
        found: One of them.
        expected: The other; what only one of them has is None in the other.
        without: Keys to leave out, at any depth.
        name: Dotted name of the values themselves.
    """
    if not (isinstance(found, Mapping) and isinstance(expected, Mapping)):
        return [] if found == expected else [(name, found, expected)]
    return [
        each
        for key in sorted((found.keys() | expected.keys()) - set(without))
        for each in differences(
            found.get(key), expected.get(key), without=without, name=f"{name}.{key}".lstrip(".")
        )
    ]


class Fingerprint(dict[str, Any]):
    """Facts about an encoder and its settings, as the attributes of a column hold them."""

    @property
    def deciding(self) -> dict[str, Any]:
        """The facts that decide the features."""
        return {name: value for name, value in self.items() if name not in RECORDED_ONLY}

    def differences(self, expected: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
        """Return in what deciding facts it differs: dotted name, ours, and what was expected."""
        ours, theirs = (
            json.loads(json.dumps(BEFORE_THEY_WERE_RECORDED | dict(each)))
            for each in (self, expected)
        )
        # Of what was made before files were recorded it is not known which they were.
        is_known = FILES in self and FILES in expected
        without = RECORDED_ONLY if is_known else RECORDED_ONLY | {FILES}
        return differences(ours, theirs, without=without)
