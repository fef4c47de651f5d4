"""`sail sweep` and `sail scaling` as typed, with an evaluation of every head."""

import json
from pathlib import Path

import pytest

from tests import tiny
from tests.commands import sail


@pytest.mark.slow
def test_heads_are_compared_by_held_out_recall_and_by_their_evaluation(tmp_path: Path) -> None:
    run_file = str(tiny.world(tmp_path, rows=60))
    sail("extract", run_file)
    done = sail("scaling", run_file, "--rows", "16,32", "--seeds", "0,1", "--eval", "--json")
    found = json.loads(done.stdout)
    assert [row["settings"] for row in found["summary"]] == [
        {"align.rows": "16"},
        {"align.rows": "32"},
    ]
    scores = found["summary"][0]["scores"]
    assert {name.split("/")[0] for name in scores} >= {"heldout", "retrieval"}
    assert all(0 <= score["mean"] <= 1 and score["n"] == 2 for score in scores.values())
    table = sail("sweep", run_file, "--over", "align.head.kind=linear,glu", "--seeds", "0").stdout
    assert "heldout/recall@10" in table
    assert table.endswith("sweep.png\n")
