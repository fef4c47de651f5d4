"""What holds for the losses whatever the batch, the fields and the blocks."""

from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from align.loss import LossOptions, Pairs, contrastive_loss
from tests.pairs import pairs_of

Kind = Literal["sigmoid", "infonce"]


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, Tensor, Pairs]:
    """Images, texts and pairs, with some captions that repeat and some that are missing."""
    images, fields = draw(st.integers(1, 9)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    image = torch.randn(images, 4, generator=generator, dtype=torch.float64)
    text = torch.randn(images, fields, 4, generator=generator, dtype=torch.float64)
    weights = torch.rand(images, fields, generator=generator, dtype=torch.float64)
    weights[:, 1:] *= torch.rand(images, fields - 1, generator=generator) > 0.3
    ids = torch.randint(0, 6, (images, fields), generator=generator)
    return image, text, pairs_of(weights, ids if draw(st.booleans()) else None)


def loss(kind: Kind, image: Tensor, text: Tensor, pairs: Pairs, block_rows: int = 100) -> float:
    return contrastive_loss(
        image,
        text,
        log_scale=torch.tensor(1.5, dtype=torch.float64),
        bias=torch.tensor(-2.0, dtype=torch.float64),
        pairs=pairs,
        options=LossOptions(kind, "image", block_rows),
    ).item()


@pytest.mark.parametrize("kind", ["sigmoid", "infonce"])
@settings(deadline=None, max_examples=30)
@given(batch=batches(), block_rows=st.integers(1, 10))
def test_the_size_of_the_blocks_changes_nothing(
    kind: Kind, batch: tuple[Tensor, Tensor, Pairs], block_rows: int
) -> None:
    assert loss(kind, *batch, block_rows) == pytest.approx(loss(kind, *batch), rel=1e-12)


@pytest.mark.parametrize("kind", ["sigmoid", "infonce"])
@settings(deadline=None, max_examples=30)
@given(batch=batches(), seed=st.integers(0, 99))
def test_the_order_of_the_images_changes_nothing(
    kind: Kind, batch: tuple[Tensor, Tensor, Pairs], seed: int
) -> None:
    image, text, pairs = batch
    order = torch.randperm(len(image), generator=torch.Generator().manual_seed(seed))
    ids = None if pairs.caption_ids is None else pairs.caption_ids[order]
    permuted = pairs_of(pairs.weights[order], ids)
    assert loss(kind, image[order], text[order], permuted) == pytest.approx(
        loss(kind, image, text, pairs), rel=1e-12
    )


@pytest.mark.parametrize("kind", ["sigmoid", "infonce"])
@settings(deadline=None, max_examples=30)
@given(batch=batches(), factor=st.floats(0.1, 10))
def test_the_length_of_the_embeddings_changes_nothing(
    kind: Kind, batch: tuple[Tensor, Tensor, Pairs], factor: float
) -> None:
    image, text, pairs = batch
    assert loss(kind, factor * image, text / factor, pairs) == pytest.approx(
        loss(kind, image, text, pairs), rel=1e-9
    )
