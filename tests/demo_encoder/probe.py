"""Measures frozen features of drawn scenes with nearest neighbours, beside two baselines."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.nn import functional as F
from transformers import ViTConfig, ViTModel

from features.scenes.shards import SPLITS
from features.scenes.world import COLOURS, EVERY, HELD_OUT, SEEN
from tests.demo_encoder.batches import INPUT, draw_batch, normalised

NEIGHBOURS = 20
TEMPERATURE = 0.07
PICTURES_AT_ONCE = 250
Encode = Callable[[UInt8[Tensor, "batch 3 height width"]], Float[Tensor, "batch ..."]]


@dataclass(frozen=True)
class Scores:
    """Fractions of test scenes whose main object is told right, and how many scenes there were."""

    classes: float
    shapes: float
    colours: float
    held_out_shapes: float
    """Shapes told right among test scenes of a combination that no reference scene shows."""
    queries: int

    def __str__(self) -> str:
        """Return the scores in per cent, with the standard error of the first."""
        error = (self.classes * (1 - self.classes) / self.queries) ** 0.5
        return (
            f"class {100 * self.classes:.1f} ± {100 * error:.1f}, shape {100 * self.shapes:.1f}, "
            f"colour {100 * self.colours:.1f}, shape of unseen combinations "
            f"{100 * self.held_out_shapes:.1f}"
        )


class Probe:
    """Scenes of the splits `train` and `test`, drawn once, to compare encoders on."""

    def __init__(self, *, references: int = 6000, queries: int = 1000, seed: int = 0) -> None:
        self.references = draw_batch((seed, SPLITS["train"]), 0, references, SEEN)
        self.queries = draw_batch((seed, SPLITS["test"]), 0, queries, EVERY)

    def scores(self, encode: Encode) -> Scores:
        """Tell the class, shape and colour of each query by a vote of its neighbours."""
        reference = _encode_all(encode, self.references.pixels)
        features = _encode_all(encode, self.queries.pixels)
        near, weight = _neighbours(features, reference)
        labels, truth = self.references.labels[near], self.queries.labels
        unseen = np.isin(truth, list(HELD_OUT))
        shapes = _vote(labels // len(COLOURS), weight) == truth // len(COLOURS)
        colours = _vote(labels % len(COLOURS), weight) == truth % len(COLOURS)
        return Scores(
            classes=float((_vote(labels, weight) == truth).mean()),
            shapes=float(shapes.mean()),
            colours=float(colours.mean()),
            held_out_shapes=float(shapes[unseen].mean()),
            queries=len(truth),
        )


def raw_pixels(pixels: UInt8[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch feature_dim"]:
    """Return the picture itself, at 32 × 32: a baseline."""
    return F.avg_pool2d(pixels.float(), INPUT // 32).flatten(1)


def random_vit(seed: int) -> Encode:
    """Return a vision transformer with untrained weights, mean and maximum pooled: a baseline."""
    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=192,
        num_hidden_layers=6,
        num_attention_heads=3,
        intermediate_size=768,
        image_size=INPUT,
        patch_size=8,
    )
    model = ViTModel(config, add_pooling_layer=False).eval()

    def encode(
        pixels: UInt8[Tensor, "batch 3 height width"],
    ) -> Float[Tensor, "batch feature_dim"]:
        patches = model(normalised(pixels)).last_hidden_state[:, 1:]
        return torch.cat([patches.mean(1), patches.amax(1)], dim=1)

    return encode


def mean_max(
    maps: Float[Tensor, "batch dim rows columns"],
) -> Float[Tensor, "batch feature_dim"]:
    """Return the mean and the maximum of each channel, side by side."""
    return torch.cat([maps.mean((2, 3)), maps.amax((2, 3))], dim=1)


def _encode_all(
    encode: Encode, pixels: UInt8[np.ndarray, "rows 3 height width"]
) -> Float[Tensor, "rows feature_dim"]:
    starts = range(0, len(pixels), PICTURES_AT_ONCE)
    with torch.inference_mode():
        parts = [encode(torch.from_numpy(pixels[i : i + PICTURES_AT_ONCE])) for i in starts]
    return torch.cat(parts)


def _neighbours(
    queries: Float[Tensor, "queries feature_dim"], references: Float[Tensor, "rows feature_dim"]
) -> tuple[Int[np.ndarray, "queries k"], Float[np.ndarray, "queries k"]]:
    """Return the rows nearest by cosine after centring, and the weight of each."""
    centre = references.mean(0)
    similarity = F.normalize(queries - centre) @ F.normalize(references - centre).T
    cosine, near = similarity.topk(NEIGHBOURS, dim=1)
    return near.numpy(), (cosine / TEMPERATURE).softmax(1).numpy()


def _vote(
    labels: Int[np.ndarray, "queries k"], weight: Float[np.ndarray, "queries k"]
) -> Int[np.ndarray, "queries"]:
    votes = np.zeros((len(labels), int(labels.max()) + 1))
    np.add.at(votes, (np.arange(len(labels))[:, None], labels), weight)
    return np.asarray(votes.argmax(1))
