"""Held-out recall: by its definition, on stores with captions that cannot be used."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from align.columns import Columns, select_rows
from align.config import AlignConfig
from align.heads import AlignmentModel
from align.heldout import HeldOut, HeldOutRows
from tests.feature_stores import IMAGE, TEXT, make_store


@pytest.mark.parametrize("identical", [False, True])
def test_recall_is_its_definition_among_the_captions_that_can_be_used(
    tmp_path: Path, identical: bool
) -> None:
    words = {"bare": [f"{row % 9}" for row in range(40)], "long": [f"l{row}" for row in range(40)]}
    store = make_store(tmp_path / "s.zarr", rows=40, text_dim=8, captions=words)
    columns = Columns.open(store, AlignConfig(), IMAGE, TEXT)
    text_ok = np.random.default_rng(0).random((40, 2)) < 0.7
    text_ok[~text_ok.any(axis=1), 0] = True
    rows = HeldOutRows(columns, np.arange(40), text_ok)
    model = AlignmentModel(nn.Identity(), nn.Identity(), log_scale=0.0, bias=0.0)
    heldout = HeldOut([rows], identical=identical, device=torch.device("cpu"))

    image = F.normalize(torch.from_numpy(columns.image.read(0, 40)).double(), dim=-1).numpy()
    text = F.normalize(torch.from_numpy(rows.texts()).double(), dim=-1).numpy()
    used = [(row, field) for row in range(40) for field in range(2) if text_ok[row, field]]
    cosine = np.array([[image[i] @ text[row, field] for row, field in used] for i in range(40)])
    said = [words[columns.fields[field]][row] for row, field in used]
    right = np.array([[row == i for row, _ in used] for i in range(40)])
    if identical:
        right = np.array(
            [[said[j] in set(np.array(said)[own]) for j in range(len(used))] for own in right]
        )

    def ranks(scores: np.ndarray, right: np.ndarray) -> np.ndarray:
        pairs = zip(scores, right, strict=True)
        return np.array([(row[~own] >= row[own].max() - 1e-6).sum() for row, own in pairs])

    scores = heldout.score(model)
    for k in (1, 5, 10):
        by_image, by_text = ranks(cosine, right), ranks(cosine.T, right.T)
        assert scores[f"recall@{k}/image_to_text"] == pytest.approx(np.mean(by_image < k))
        assert scores[f"recall@{k}/text_to_image"] == pytest.approx(np.mean(by_text < k))
        assert scores[f"recall@{k}"] == pytest.approx(
            (np.mean(by_image < k) + np.mean(by_text < k)) / 2
        )


def test_scores_do_not_depend_on_the_type_of_the_matrix_products(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s.zarr", rows=2000)
    columns = Columns.open(store, AlignConfig(fields=("bare",)), IMAGE, TEXT)
    columns = replace(columns, text=(columns.image,))  # each image is its own caption
    rows = HeldOutRows(columns, np.arange(2000), np.ones((2000, 1), dtype=bool))
    heldout = HeldOut([rows], identical=False, device=torch.device("cpu"))
    model = AlignmentModel(nn.Identity(), nn.Identity(), log_scale=0.0, bias=0.0)
    with torch.autocast("cpu", torch.bfloat16):
        scores = heldout.score(model)
    assert scores["recall@1"] > 0.99
    assert scores == heldout.score(model)


def test_rows_that_are_not_used_are_told_once_for_a_store(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    store = make_store(tmp_path / "s.zarr", rows=20, bad_images=(0,))
    for _ in range(3):  # as the probes of a study do
        columns = Columns.open(store, AlignConfig(), IMAGE, TEXT)
        select_rows(columns, holdout=0.0, holdout_rows=1)
    said = [message for message in caplog.messages if "cannot be used" in message]
    assert len(said) == 1
    assert said[0].startswith(f"1 row of {store.path} cannot be used: image: ")
