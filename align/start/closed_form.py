"""The head in closed form: regularised canonical correlation analysis of both kinds of features.

From the moments alone (see `moments`) follow the two linear maps under which images and their
captions correlate most. How much both covariances are shrunk, and how far components of a weaker
correlation are scaled down, is chosen on rows that the moments do not have.

Reference:
    Hotelling 1936, Relations Between Two Sets of Variates. Ridge: Vinod 1976, Canonical ridge and
    econometrics of joint production. Components scaled by a power of their correlations: Gong et
    al. 2014, A Multi-View Embedding Space for Modeling Internet Images, Tags, and their Semantics,
    arXiv:1212.4522.
"""

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float32, Float64
from torch import Tensor, nn
from torch.nn import functional as F

from align.config import AlignConfig
from align.heads import MAX_LOG_SCALE, AlignmentModel, linear_map, standardised
from align.heldout import HeldOut, HeldOutRows, retrieval_ranks
from align.start.moments import Moments, PairedRows, normalised
from features.store import store_key_hashes

logger = logging.getLogger(__name__)
SHRINKAGES = tuple(10 ** (power / 2) for power in range(-4, 5))
"""0.01 to 100, each about three times the one before: few pairs want an image side of 10."""
POWERS = (0.5, 0.7, 0.85, 1.0)
FIRST = (SHRINKAGES[4], SHRINKAGES[3])
"""Where the choice begins: λ of 1 for images, 0.3 for texts."""
FLOOR = 1e-9  # of the eigenvalues, for features that are all the same
WHOLE = 200
"""Fewer held-out rows than this do not choose the shrinkage; rows of the training do, in turn."""
FOLDS, FOLD_ROWS = 4, 500
SCORED = 2000
"""At most this many held-out rows choose, and at most half as many fit scale and bias."""
BINS = 1 << 14
SHARPNESS, EASE = 1.6, 4.0
"""Training begins with so many times the inverse temperature that fits held-out rows best, and with
the bias of a batch with so many times fewer wrong pairs: measured, see docs/heads.md."""


@dataclass(frozen=True)
class Shrinkage:
    """What the moments do not say."""

    image: float
    """λ_x: times the mean eigenvalue, it is added to every eigenvalue of the images' covariance."""
    text: float
    """λ_t, likewise."""
    power: float
    """p: components are scaled by their correlation to this power."""


@dataclass(frozen=True)
class LinearMap:
    """What takes a normalised feature into the shared space: Wx̂ + b."""

    weight: Float64[Tensor, "components dim"]
    bias: Float64[Tensor, "components"]

    def __call__(self, features: Float64[Tensor, "rows dim"]) -> Float32[Tensor, "rows components"]:
        """Map normalised features, in float32 as a head does."""
        return F.linear(features, self.weight, self.bias).float()

    @torch.no_grad()
    def copy_to(self, linear: nn.Linear) -> None:
        """Write it into a layer: zeros where that has more outputs, its first ones where fewer."""
        linear.weight.zero_()
        linear.bias.zero_()
        linear.weight[: len(self.weight)] = self.weight[: len(linear.weight)]
        linear.bias[: len(self.bias)] = self.bias[: len(linear.bias)]


class CanonicalAnalysis:
    """Regularised canonical correlation analysis of two kinds of features, from their moments.

    With C the centred covariances and W = (C + λ tr(C)/d · I)^(-1/2) of each side, and
    U S Vᵀ = svd(W_x C_xt W_t), the maps are x ↦ S^p Uᵀ W_x (x − m_x) and t ↦ S^p Vᵀ W_t (t − m_t).
    The eigenvectors of both covariances are found once; each λ then costs matrix products, and the
    eigenvectors of a matrix of the size of the shorter feature.
    """

    def __init__(self, moments: Moments) -> None:
        """Find the eigenvectors, on the CPU, in float64."""
        moments = moments.to("cpu")
        self.mean_image = moments.image / moments.rows
        self.mean_text = moments.text / moments.rows
        self._image, self._image_vectors = _eigen(
            moments.image_image / moments.rows, self.mean_image
        )
        self._text, self._text_vectors = _eigen(moments.text_text / moments.rows, self.mean_text)
        cross = moments.image_text / moments.rows - torch.outer(self.mean_image, self.mean_text)
        self._cross = self._image_vectors.T @ cross @ self._text_vectors

    def solve(
        self, image: float, text: float
    ) -> tuple[LinearMap, LinearMap, Float64[Tensor, "components"]]:
        """Return the map of either side with p = 0, and the correlations, the greatest first.

        Args:
            image: λ_x.
            text: λ_t.
        """
        of_image, of_text = _whitening(self._image, image), _whitening(self._text, text)
        between = of_image[:, None] * self._cross * of_text
        turned = len(of_text) > len(of_image)
        product = between.T if turned else between
        squares, vectors = torch.linalg.eigh(product.T @ product)
        correlations = squares.flip(0).clamp(min=0).sqrt()
        right = vectors.flip(1)
        left = product @ right / correlations.clamp(min=FLOOR)
        if turned:
            left, right = right, left
        maps = [
            (self._image_vectors @ (of_image[:, None] * left)).T,
            (self._text_vectors @ (of_text[:, None] * right)).T,
        ]
        means = self.mean_image, self.mean_text
        first, second = (
            LinearMap(weight, -weight @ mean) for weight, mean in zip(maps, means, strict=True)
        )
        return first, second, correlations

    def maps(self, shrinkage: Shrinkage, dim: int) -> tuple[LinearMap, LinearMap]:
        """Return the map of either side, of the first `dim` components or as many as there are."""
        image, text, correlations = self.solve(shrinkage.image, shrinkage.text)
        factors = correlations**shrinkage.power
        first, second = (_scaled(each, factors, dim) for each in (image, text))
        return first, second


def _eigen(
    second: Float64[Tensor, "dim dim"], mean: Float64[Tensor, "dim"]
) -> tuple[Float64[Tensor, "dim"], Float64[Tensor, "dim dim"]]:
    values, vectors = torch.linalg.eigh(second - torch.outer(mean, mean))
    return values.clamp(min=0), vectors


def _whitening(values: Float64[Tensor, "dim"], shrinkage: float) -> Float64[Tensor, "dim"]:
    return (values + shrinkage * values.mean() + FLOOR).rsqrt()


def _scaled(each: LinearMap, factors: Float64[Tensor, "components"], dim: int) -> LinearMap:
    return LinearMap((factors[:, None] * each.weight)[:dim], (factors * each.bias)[:dim])


class HeldOutTrial:
    """Rows that a choice is scored on, and the analysis of others."""

    def __init__(self, moments: Moments, heldout: HeldOut) -> None:
        """Find the eigenvectors of the moments, which have none of the held-out rows."""
        self.analysis = CanonicalAnalysis(moments)
        self._heldout = heldout

    @cached_property
    def _features(
        self,
    ) -> tuple[Float64[Tensor, "images image_dim"], Float64[Tensor, "texts text_dim"]]:
        held = self._heldout
        image, text = (
            normalised(standardised(features.cpu().double(), dims))
            for features, dims in zip((held.image, held.text), held.dims, strict=True)
        )
        return image, text

    def log_ranks(self, image: float, text: float, dim: int) -> dict[float, float]:
        """Return the sum of `HeldOut.log_ranks` over the rows, for each of the powers.

        Captions with the same words are right here, whatever the loss says: where there are many
        of them, their random order among themselves would decide.
        """
        first, second, correlations = self.analysis.solve(image, text)
        heldout, found = self._heldout, {}
        relevance = heldout.alike.to("cpu")
        features = zip((first, second), self._features, strict=True)
        images, texts = (each(of_rows)[:, :dim] for each, of_rows in features)
        for power in POWERS:
            factors = (correlations[:dim] ** power).float()
            ranks = retrieval_ranks(images * factors, texts * factors, relevance)
            found[power] = heldout.log_ranks(ranks).sum().item()
        return found

    def cosines(
        self, shrinkage: Shrinkage, dim: int
    ) -> tuple[Float32[Tensor, "images texts"], Bool[Tensor, "images texts"]]:
        """Return the cosine of every row with every caption, and which of them are right."""
        maps = self.analysis.maps(shrinkage, dim)
        some = slice(0, SCORED // 2)
        texts = self._heldout.relevance.owner.cpu() < some.stop
        image = F.normalize(maps[0](self._features[0][some]), dim=-1)
        text = F.normalize(maps[1](self._features[1][texts]), dim=-1)
        relevance = self._heldout.relevance.to("cpu").first(some.stop)
        return image @ text.T, relevance.right(slice(0, len(image)), slice(0, len(text)))

    def __len__(self) -> int:
        return len(self._heldout)


def choose(trials: Sequence[HeldOutTrial], dim: int) -> tuple[Shrinkage, float]:
    """Find the shrinkage with the least mean of `HeldOut.log_ranks` over all trials.

    Both λ are changed in turn, each over the whole of `SHRINKAGES`, until neither gets better;
    every pair of them is tried with each of `POWERS`.

    Returns:
        The shrinkage, and that mean.
    """
    rows = sum(map(len, trials))
    tried: dict[tuple[float, float], dict[float, float]] = {}

    def score(image: float, text: float) -> dict[float, float]:
        """Return the mean for each of the powers."""
        if (image, text) not in tried:
            found = [each.log_ranks(image, text, dim) for each in trials]
            tried[image, text] = {
                power: sum(each[power] for each in found) / rows for power in POWERS
            }
        return tried[image, text]

    image, text = FIRST
    while True:
        before = image, text
        image = min(SHRINKAGES, key=lambda each: min(score(each, text).values()))
        text = min(SHRINKAGES, key=lambda each: min(score(image, each).values()))
        if (image, text) == before:
            break
    powers = score(image, text)
    power = min(POWERS, key=lambda each: powers[each])
    return Shrinkage(image, text, power), powers[power]


def trials(
    rows: Sequence[PairedRows],
    factors: Sequence[float],
    total: Moments,
    heldout: HeldOut | None,
) -> list[HeldOutTrial]:
    """Return what the shrinkage is chosen on.

    These are the held-out rows if there are at least `WHOLE`. Otherwise it is up to 500 rows of the
    training four times, each time without them in the moments (cross-validation).

    Args:
        rows: Of the training, of each store.
        factors: Weight of a row of each store in `total`.
        total: Moments of all rows of the training.
        heldout: The held-out rows, if there are any.
    """
    if heldout is not None and _is_enough(heldout):
        return [HeldOutTrial(total, heldout.first(SCORED))]
    of_stores = [_folds(each) for each in rows]
    found = []
    for fold in zip(*of_stores, strict=True):
        without, parts = total, []
        for each, chosen, factor in zip(rows, fold, factors, strict=True):
            if len(chosen):
                sums = each.of(chosen, torch.device("cpu"))
                without -= sums.times(factor)
                parts.append(HeldOutRows(each.columns, chosen, each.weights[chosen] > 0))
        if parts and without.rows > FLOOR:
            scored = HeldOut(parts, identical=False, device=torch.device("cpu"))
            found.append(HeldOutTrial(without, scored))
    return found


def _is_enough(heldout: HeldOut | None) -> bool:
    return heldout is not None and len(heldout) >= WHOLE


def _folds(rows: PairedRows) -> list[np.ndarray]:
    """Deal the rows of the smallest hashes out to the folds."""
    there = np.flatnonzero(rows.rows)
    hashes = store_key_hashes(rows.columns.store)[there]
    chosen = there[np.argsort(hashes, kind="stable")][: FOLDS * FOLD_ROWS]
    return [np.sort(chosen[number::FOLDS]) for number in range(FOLDS)]


def start_from_closed_form(
    model: AlignmentModel,
    rows: Sequence[PairedRows],
    factors: Sequence[float],
    total: Moments,
    heldout: HeldOut | None,
    config: AlignConfig,
) -> None:
    """Put the closed form, a scale and a bias into a model; say in the log what was chosen.

    Args:
        model: Whose heads have a linear map to begin with.
        rows: Of the training, of each store.
        factors: Weight of a row of each store in `total`.
        total: Moments of all rows of the training.
        heldout: The held-out rows, if there are any.
        config: Settings.
    """
    dim = config.head.dim
    on = trials(rows, factors, total.to("cpu"), heldout)
    shrinkage = Shrinkage(10.0, 1.0, 1.0)  # what the fewest pairs want
    if on:
        shrinkage, log_rank = choose(on, dim)
        logger.info(
            "closed form: shrinkage %.3g of images and %.3g of texts, power %.3g; mean "
            "ln(1 + rank) %.3f on %s rows%s",
            shrinkage.image,
            shrinkage.text,
            shrinkage.power,
            log_rank,
            f"{sum(map(len, on)):,}",
            "" if _is_enough(heldout) else " of the training, in turn (cross-validation)",
        )
        pairs = [each.cosines(shrinkage, dim) for each in on]
        fit = _fit_sigmoid if config.loss.kind == "sigmoid" else _fit_softmax
        log_scale, bias = fit(pairs, config.batch_size, trains=config.steps != 0)
        with torch.no_grad():
            model.log_scale.fill_(log_scale)
            model.bias.fill_(bias if bias is not None else model.bias)
    analysis = on[0].analysis if _is_enough(heldout) else CanonicalAnalysis(total)
    for head, each in zip(
        (model.image_head, model.text_head), analysis.maps(shrinkage, dim), strict=True
    ):
        if (linear := linear_map(head)) is None:
            raise ValueError(f"{type(head).__name__} has no linear map to start from.")
        each.copy_to(linear)


Pairs = Iterable[tuple[Tensor, Tensor]]
"""Of some images with some texts, the cosines, and which of them are right."""


def _fit_sigmoid(pairs: Pairs, batch_size: int, *, trains: bool) -> tuple[float, float]:
    """Find log t and b with the least sigmoid loss on pairs, as if they were of a batch.

    The loss Σ log(1 + exp(∓(t·cos + b))) is convex in (t, b); wrong pairs weigh as many times more
    as a batch has more of them for an image. Newton's method, on cosines in bins. For a training
    that begins with them, t is multiplied by `SHARPNESS`, and b found once more, with `EASE`.
    """
    right, wrong = (torch.zeros(BINS, dtype=torch.float64) for _ in range(2))
    for cosines, is_right in pairs:
        weight = (batch_size - 1) / max(len(cosines) - 1, 1)
        right += torch.histc(cosines[is_right], BINS, -1, 1).double()
        wrong += weight * torch.histc(cosines[~is_right], BINS, -1, 1).double()
    cosine = (torch.arange(BINS, dtype=torch.float64) + 0.5) * (2 / BINS) - 1
    one = torch.ones_like(cosine)
    scale, bias = _newton(torch.stack([cosine, one]), right, wrong, 0 * one, (10.0, -10.0))
    scale = max(scale, 1.0) * (SHARPNESS if trains else 1.0)
    scale = min(scale, math.exp(MAX_LOG_SCALE))
    wrong = wrong / EASE if trains else wrong
    (bias,) = _newton(one[None], right, wrong, scale * cosine, (bias,))
    return math.log(scale), bias


def _newton(
    inputs: Float64[Tensor, "parameters bins"],
    right: Float64[Tensor, "bins"],
    wrong: Float64[Tensor, "bins"],
    offset: Float64[Tensor, "bins"],
    first: tuple[float, ...],
) -> list[float]:
    """Find the parameters with the least sigmoid loss of right and wrong pairs in bins."""
    found = torch.tensor(first, dtype=torch.float64)

    def loss(found: Tensor) -> float:
        logits = found @ inputs + offset
        return (right * F.softplus(-logits) + wrong * F.softplus(logits)).sum().item()

    for _ in range(100):
        probability = (found @ inputs + offset).sigmoid()
        gradient = inputs @ (wrong * probability - right * (1 - probability))
        curvature = (right + wrong) * probability * (1 - probability)
        hessian = (inputs * curvature) @ inputs.T
        hessian += FLOOR * torch.eye(len(found), dtype=torch.float64)
        step = torch.linalg.solve(hessian, gradient)
        before = loss(found)
        while step.abs().max() > 1e-6 and not loss(found - step) <= before:
            step = step / 2
        if not step.abs().max() > 1e-6:
            break
        found = found - step
    values: list[float] = found.tolist()
    return values


def _fit_softmax(pairs: Pairs, _batch_size: int, *, trains: bool) -> tuple[float, None]:
    """Find log t with the least softmax loss on pairs, among a hundred from 1 to 100."""
    found = {}
    for log_scale in np.linspace(0, MAX_LOG_SCALE, 100):
        total = 0.0
        for cosines, is_right in pairs:
            logits = math.exp(log_scale) * cosines
            for dim in (0, 1):
                share = is_right / is_right.sum(dim, keepdim=True).clamp(min=1)
                loss = (logits.logsumexp(dim, keepdim=True) - logits) * share
                total += loss.sum().item() / logits.shape[1 - dim]
        found[float(log_scale)] = total
    best = min(found, key=lambda each: found[each])
    return min(best + math.log(SHARPNESS if trains else 1.0), MAX_LOG_SCALE), None
