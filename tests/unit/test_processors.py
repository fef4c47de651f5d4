"""How many workers there are when the recipe does not say."""

import os
from pathlib import Path

import pytest

from pipeline.run import cpu as processors


@pytest.mark.parametrize(
    ("quota", "expected"),
    [("max 100000", 8), ("300000 100000", 3), ("50000 100000", 1), ("1600000 100000", 8), ("", 8)],
)
def test_the_smaller_of_affinity_and_quota_counts(
    quota: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpu.max").write_text(quota)
    monkeypatch.setattr(processors, "CPU_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert processors.usable_processors() == expected


def test_without_quota_or_affinity_all_processors_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processors, "CPU_QUOTA", tmp_path / "not there")
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    assert processors.usable_processors() == 5
