"""Zero-shot accuracy and retrieval recall equal those of CLIP_benchmark on the same arrays.

The numbers below were computed by its own functions at commit 48de38c (metrics/zeroshot_retrieval:
`recall_at_k`, `batchify`; metrics/zeroshot_classification: `zero_shot_classifier`, `accuracy`, and
`balanced_accuracy_score` of scikit-learn 1.9.1, which it calls) from the arrays of `retrieval` and
`classification`. `accuracy` fails with NumPy 2; in the copy that was run, the one value of its sum
was taken out with `[0]`. Where nothing ties, its top-k and our count of nearer items are the same.
"""

import numpy as np
import pytest
import torch
from torch import Tensor

from align.heldout import Relevance, retrieval_ranks
from evaluate.classification import class_embeddings, classify
from evaluate.measures.retrieval import recall
from evaluate.results import Items
from evaluate.statistics import value_of

RECALLS = {
    ("image", 1): 0.48,
    ("image", 5): 0.8166666627,
    ("image", 10): 0.9166666865,
    ("text", 1): 0.6000000238,
    ("text", 5): 0.9833333492,
    ("text", 10): 0.9833333492,
}
ACCURACIES = {"acc1": 0.66, "acc5": 0.98, "mean_per_class_recall": 0.6521900553150554}


def retrieval() -> tuple[Tensor, Tensor, Tensor]:
    """60 images, 300 captions somewhat like them, and the image of each caption."""
    generator = np.random.default_rng(5)
    image = generator.standard_normal((60, 16))
    owner = np.repeat(np.arange(60), 5)
    text = image[owner] + 1.6 * generator.standard_normal((300, 16))
    return torch.from_numpy(image), torch.from_numpy(text), torch.from_numpy(owner)


def classification() -> tuple[Tensor, Tensor, np.ndarray]:
    """Prompts of 12 classes by 7 templates, 200 images, and the class of each, unevenly."""
    generator = np.random.default_rng(6)
    centres = generator.standard_normal((12, 16))
    prompts = centres[:, None] + generator.standard_normal((12, 7, 16))
    labels = (12 * generator.random(200) ** 2).astype(np.int64)
    images = centres[labels] + 2 * generator.standard_normal((200, 16))
    return torch.from_numpy(prompts), torch.from_numpy(images), labels


@pytest.mark.parametrize("k", [1, 5, 10])
def test_recall_is_that_of_clip_benchmark(k: int) -> None:
    image, text, owner = retrieval()
    ranks = retrieval_ranks(image, text, Relevance(len(image), owner))
    found = {"image": recall(ranks.by_text.numpy(), k), "text": recall(ranks.by_image.numpy(), k)}
    assert found == {side: pytest.approx(RECALLS[side, k], abs=1e-6) for side in found}


def test_zero_shot_accuracy_is_that_of_clip_benchmark() -> None:
    prompts, images, labels = classification()
    found = classify(images, class_embeddings(prompts), labels)
    right = (found.ranks < 1).astype(np.int64)
    assert value_of(Items(right)) == pytest.approx(ACCURACIES["acc1"])
    assert (found.ranks < 5).mean() == pytest.approx(ACCURACIES["acc5"])
    assert value_of(Items(right, classes=found.labels)) == pytest.approx(
        ACCURACIES["mean_per_class_recall"]
    )
