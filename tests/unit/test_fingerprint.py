"""In what two fingerprints differ, and what is no difference."""

from features.storage.fingerprint import Fingerprint

MADE = {"model": "m", "preprocessing": {"crop": [224, 224]}, "versions": {"torch": "2"}}


def test_library_versions_and_licences_are_no_difference() -> None:
    assert Fingerprint(MADE).differences({**MADE, "versions": {}, "licence": "mit"}) == []
    assert Fingerprint(MADE).deciding == {"model": "m", "preprocessing": {"crop": [224, 224]}}


def test_a_fact_within_another_is_named_by_its_place() -> None:
    other = {**MADE, "preprocessing": {"crop": [256, 256]}}
    differences = [("preprocessing.crop", [224, 224], [256, 256])]
    assert Fingerprint(MADE).differences(other) == differences


def test_tuples_are_as_the_lists_that_a_store_holds() -> None:
    assert Fingerprint(MADE).differences({**MADE, "preprocessing": {"crop": (224, 224)}}) == []


def test_what_was_not_recorded_once_has_the_value_that_it_had_then() -> None:
    now = {**MADE, "mode": "exact", "upright": False, "layer": -1}
    assert Fingerprint(MADE).differences(now) == []
    assert Fingerprint(MADE).differences({**now, "mode": "fast"}) == [("mode", "exact", "fast")]
