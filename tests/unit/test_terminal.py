"""Text of strangers, shown harmlessly in tables, JSON and file names."""

import json
import unicodedata

import pytest

from features.terminal import harmless
from pipeline.tables import hits_table, row_table

STEERING = "\x1b]0;owned\x07 \x9b31m \x00 \r \u202e \u2066 \u2028 \u2029 \x85 \ud800 \x7f"
SHOWN = (
    r"\u001b]0;owned\u0007 \u009b31m \u0000 \u000d \u202e \u2066 \u2028 \u2029 \u0085 \ud800 \u007f"
)


def test_what_steers_a_terminal_is_shown_as_an_escape() -> None:
    assert harmless(STEERING) == SHOWN


def test_every_control_character_is_an_escape() -> None:
    for code in range(0x11_0000):
        character = chr(code)
        kind = unicodedata.category(character)
        is_bidi = unicodedata.bidirectional(character) in {
            *("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"),
        }
        if is_bidi or kind in ("Cs", "Zl", "Zp") or (kind == "Cc" and character != "\t"):
            assert harmless(character) != character, hex(code)


@pytest.mark.parametrize("text", ["ein Käfer", "鳥 🟥", "نص", "क्‍ष", "👩‍👩‍👧", "a\tb"])
def test_text_of_any_script_stays_as_it_is(text: str) -> None:
    assert harmless(text) == text


def test_a_json_document_stays_the_same_document() -> None:
    document = {"key": STEERING, "é": ["\n", 1.5]}
    text = json.dumps(document, ensure_ascii=False, indent=1)
    shown = harmless(text, lines=True)
    assert json.loads(shown) == document
    assert not any(unicodedata.category(each) == "Cc" for each in shown.replace("\n", ""))


def test_tables_show_captions_and_keys_harmlessly() -> None:
    evil = f"{STEERING}\nkey: another"
    hits = [{"rank": 1, "cosine": 0.5, "key": evil, "captions": {evil: evil}}]
    row = {
        "row": 1,
        "key": evil,
        "captions": {"short": evil},
        "label": 1,
        "class": evil,
        "group": None,
        "columns": {evil: {"status": "ok", "norm": 1.0, "first": [1.0]}},
    }
    for table in (hits_table(hits), row_table(row)):
        left = {each for each in table if unicodedata.category(each) in ("Cc", "Cf", "Cs", "Zl")}
        assert left == {"\n"}
        assert r"\u000akey: another" in "".join(line.strip() for line in table.splitlines())
