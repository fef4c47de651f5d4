"""Captions as records of others have them: texts, lists, languages."""

import difflib
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from features.errors import SourceError
from features.sources.text import listed_texts
from features.storage.reading import cut_text

logger = logging.getLogger(__name__)
Counts = Counter[str]
AUTOMATIC = ("caption", "captions", "short", "long", "txt")
LISTS = "captions written as a list (each text a field)"
CUT = "texts over 1 MiB (cut there)"
NO_TEXT = "captions that are no text, nor a list of texts (ignored)"
RECORDS_LOOKED_AT = 1000
MAX_NAMES_LISTED = 20
MAX_NAME_BYTES = 200
TEXT_KEYS = ("caption", "text", "raw", "sentence")
"""Where a record that stands for a caption has its text."""


class CaptionPicker:
    """Takes the captions out of a record (a JSON object, a row of a table)."""

    def __init__(self, names: Sequence[str], place: str) -> None:
        self.names = tuple(names) or AUTOMATIC
        """What is looked for."""
        self._explicit = bool(names)
        self._place = place
        self._found: set[str] = set()
        self._seen: dict[str, None] = {}
        self._records = 0
        for name in names:
            _check_field_name(name)

    def see(self, names: Iterable[str]) -> None:
        """Note what records have, also where it is not handed over."""
        self._seen |= dict.fromkeys(names)

    @property
    def found(self) -> list[str]:
        """Names under which there were captions."""
        return [name for name in self.names if name in self._found]

    @property
    def seen(self) -> list[str]:
        """Names that the first records have."""
        return list(self._seen)[:MAX_NAMES_LISTED]

    def see_captions(self, names: Iterable[str]) -> None:
        """Note that captions were found under these names, though not in a record."""
        for name in names:
            _check_field_name(name)
        self._found.update(names)

    def pick(self, record: Mapping[str, Any], counts: Counts) -> dict[str, str]:
        """Return the captions of a record by field; a list gives the fields 0, 1, and on.

        Args:
            record: May hold anything under any name.
            counts: Where captions are counted that are no text.

        Raises:
            SourceError: Two of the names hold lists, so that both would be field 0.
        """
        if self._records < RECORDS_LOOKED_AT:
            self._records += 1
            self.see(map(str, record))
        captions: dict[str, str] = {}
        list_name = None
        for name in self.names:
            value = record.get(name)
            if value is None:
                continue
            self._found.add(name)
            value = _as_written(value, counts)
            if isinstance(value, (list, tuple)):
                if list_name is not None:
                    raise self._two_lists(list_name, name)
                list_name = name
                captions |= _texts(value, counts)
            else:
                captions |= _named_texts(name, value, counts)
        return captions

    def check(self) -> None:
        """Refuse a name of captions that no record had.

        Raises:
            SourceError: With what the records have instead.
        """
        missing = [name for name in self.names if name not in self._found]
        if self._explicit and missing:
            close = difflib.get_close_matches(missing[0], self._seen, n=1, cutoff=0.5)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise SourceError(
                f"No sample of {self._place} has captions under {missing[0]!r}.{hint} One of "
                f"{self.seen} was expected. Correct `captions` of the "
                f"source."
            )

    def _two_lists(self, first: str, second: str) -> SourceError:
        return SourceError(
            f"A sample of {self._place} has lists of captions under {first!r} and {second!r}. One "
            f"list was expected, since its items become the fields 0, 1, and on. Name one of them "
            f"in `captions` of the source."
        )


def as_text(value: str, counts: Counts | None = None) -> str:
    """Return a string that can be stored: JSON may hold halves of characters, UTF-8 may not.

    What is over 1 MiB is cut there, and counted.
    """
    text = cut_text(value)
    if text is not value:
        if counts is None:
            logger.warning("a text over 1 MiB is cut there")
        else:
            counts[CUT] += 1
    if text.isascii():
        return text
    return text.encode("utf-8", errors="replace").decode("utf-8")


def _as_written(value: Any, counts: Counts) -> Any:
    """Return the list that a text stands for, or the record that a map of Arrow does."""
    if isinstance(value, str) and (texts := listed_texts(value.strip())) is not None:
        counts[LISTS] += 1
        return texts
    is_map = isinstance(value, list) and value and isinstance(value[0], tuple)
    return _text_in(dict(value) if is_map else value)


def _text_in(value: Any) -> Any:
    """Return the text of a record that stands for one, anything else as it is."""
    keys = TEXT_KEYS if isinstance(value, dict) else ()
    return next((value[key] for key in keys if isinstance(value.get(key), str)), value)


def _named_texts(name: str, value: Any, counts: Counts) -> dict[str, str]:
    """Return a text by its name; those of a record by both names: `caption.en`, `caption.de`."""
    named = {name: value}
    if isinstance(value, dict):
        named = {f"{name}.{key}": text for key, text in value.items()}
    found = {key: as_text(text, counts) for key, text in named.items() if isinstance(text, str)}
    for key in found:
        _check_field_name(key)
    if not found:
        counts[NO_TEXT] += 1
    return found


def _texts(values: Sequence[Any], counts: Counts) -> dict[str, str]:
    """Return the texts of a list by their number, also of one of records with a text in each."""
    values = list(map(_text_in, values))
    if others := sum(not isinstance(value, str | None) for value in values):
        counts[NO_TEXT] += others
    return {str(i): as_text(text, counts) for i, text in enumerate(values) if isinstance(text, str)}


def _check_field_name(name: str) -> None:
    is_reserved = name.startswith((".", "__")) or name in ("", "zarr.json")
    if is_reserved or "/" in name or "\0" in name or len(name.encode()) > MAX_NAME_BYTES:
        raise SourceError(
            f"The name {name!r:.{MAX_NAME_BYTES}} in `captions` of the source cannot be a caption "
            f"field, since fields name folders of the feature store. A name without `/` that does "
            f"not begin with a dot or `__`, is not `zarr.json` and has at most {MAX_NAME_BYTES} "
            f"bytes was expected. Rename it in the data."
        )
