"""results.json as other tools read it."""

import json
from pathlib import Path

import pytest

from evaluate.results import Result, read_results, write_results

RESULT = Result(
    task="retrieval/text_to_image",
    dataset="test",
    metric="recall@1",
    value=0.25,
    n=8,
    ci95=(0.125, 0.5),
    encoders={"image": "dinov2", "text": "minilm"},
    protocol={"k": 1, "ties": "wrong", "chance": 0.1},
)


def test_the_file_has_the_fields_of_the_contract(tmp_path: Path) -> None:
    path = tmp_path / "eval" / "results.json"
    write_results(path, run="demo", checkpoint_sha256="ab" * 32, results=[RESULT])
    document = json.loads(path.read_text(encoding="utf-8"))
    assert document == {
        "schema": 1,
        "run": "demo",
        "checkpoint_sha256": "ab" * 32,
        "results": [
            {
                "task": "retrieval/text_to_image",
                "dataset": "test",
                "metric": "recall@1",
                "value": 0.25,
                "n": 8,
                "ci95": [0.125, 0.5],
                "encoders": {"image": "dinov2", "text": "minilm"},
                "protocol": {"k": 1, "ties": "wrong", "chance": 0.1},
            }
        ],
    }
    assert read_results(path) == [RESULT]
    assert list(path.parent.iterdir()) == [path]


def test_a_value_that_is_not_a_number_is_not_written(tmp_path: Path) -> None:
    broken = Result(**{**vars(RESULT), "value": float("nan")})
    with pytest.raises(ValueError, match="JSON"):
        write_results(tmp_path / "r.json", run="x", checkpoint_sha256="", results=[broken])
    assert not (tmp_path / "r.json").exists()
