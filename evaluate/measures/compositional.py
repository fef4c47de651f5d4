"""Compositional scores of a split whose rows form groups of two, or are each a choice."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Int64

from evaluate.config import EvalSettings, Names
from evaluate.examples import draw
from evaluate.measures.measure import Context, Measure
from evaluate.results import Findings, Items, Result
from features.errors import UnusableSplitError
from features.store import FeatureStore

NEGATIVE = "negative"
"""How the names of fields begin that hold wrong captions; else all but the first are wrong."""
CHANCE = {"text_score": 1 / 4, "image_score": 1 / 4, "group_score": round(1 / 6, 8)}
"""Scores of random cosines: both of two independent choices, and all four at once."""


class CompositionalSettings(EvalSettings):
    """Settings of the compositional scores."""

    compositional: Names = ()
    """Splits with groups; every such split if empty."""
    compositional_fields: Names = ()
    """Caption fields that are compared; all in which the captions of a group differ if empty."""


class CompositionalScores(Measure):
    """Share of groups whose images and captions are told apart."""

    name = "compositional"
    title = "Compositional understanding"
    in_short = "Two images, two captions of the same words: all matched"
    explained = (
        "Each group has two pictures and two captions that say nearly the same words: who is left "
        "of whom, which thing has which colour. Knowing *what* is there does not help; one has to "
        "know *how* it is put together. **text score**: each picture prefers its own caption. "
        "**image score**: each caption prefers its own picture. **group score**: both. A tie is "
        "wrong. Scores below guessing are common: when one of the two pictures is nearer to *both* "
        "captions, the image score is lost for certain. Where the authors name kinds of examples, "
        "each is scored apart, and so is the mean over the kinds."
    )
    method = "Winoground’s scores, by strictly greater cosine."
    metric = "group_score"
    settings = CompositionalSettings
    needs = "groups with captions"
    of_groups = True
    template = "compositional.html.j2"

    def can_measure(self, store: FeatureStore) -> bool:
        """Return whether there are groups and captions."""
        return store.groups() is not None and bool(store.fields)

    def run(self, context: Context, split: str) -> Findings:
        """Score the groups, for each caption field that tells the rows of a group apart.

        Where every group is one row with several captions, the first of these is the right one, or
        all that are not called `negative…` are.
        """
        found = Findings()
        named = context.settings.of(CompositionalSettings).compositional_fields
        fields = context.caption_fields(split, named, "compositional_fields")
        store = context.stores[split]
        if len(fields) > 1 and _has_one_row_each(store):
            _score_choice(context, found, split, fields)
            return found
        telling = [name for name in fields if named or _tells_apart(store, name)]
        for name in telling:
            dataset = split if len(telling) == 1 else f"{split}/{name}"
            _score_field(context, found, dataset, name)
        if not telling:
            found.note(
                f"The two captions of every group of {split} are the same in {list(fields)}: there "
                f"is nothing to tell apart, and so no compositional score."
            )
        return found

    def view(self, results: Sequence[Result], exhibits: Sequence[Any]) -> dict[str, Any]:  # noqa: ARG002
        """Return whether some groups are one image with several captions."""
        return {"has_choices": any("one image" in str(r.protocol.get("form")) for r in results)}


@dataclass(frozen=True)
class GroupExample:
    """Two images, two captions, and the four cosines."""

    dataset: str
    pictures: tuple[str | None, str | None]
    captions: tuple[str, str]
    cosines: tuple[tuple[float, float], tuple[float, float]]
    """Image i (row) with caption j (column)."""
    text: bool
    image: bool

    @property
    def is_right(self) -> bool:
        """Whether all four choices are right."""
        return self.text and self.image


@dataclass(frozen=True)
class Compositional:
    """The cosines of every group, and which of its choices were right."""

    cosines: Float[np.ndarray, "groups 2 2"]
    """Image i of the group (row) with caption j (column)."""

    @property
    def text(self) -> Bool[np.ndarray, "groups"]:
        """Each image is nearer to its own caption than to the other one."""
        s = self.cosines
        right: np.ndarray = (s[:, 0, 0] > s[:, 0, 1]) & (s[:, 1, 1] > s[:, 1, 0])
        return right

    @property
    def image(self) -> Bool[np.ndarray, "groups"]:
        """Each caption is nearer to its own image than to the other one."""
        s = self.cosines
        right: np.ndarray = (s[:, 0, 0] > s[:, 1, 0]) & (s[:, 1, 1] > s[:, 0, 1])
        return right

    @property
    def group(self) -> Bool[np.ndarray, "groups"]:
        """All of that."""
        right: np.ndarray = self.text & self.image
        return right

    def hits(self) -> dict[str, Bool[np.ndarray, "groups"]]:
        """Return what each group scores, by the name of the metric."""
        return {"text_score": self.text, "image_score": self.image, "group_score": self.group}


def compare_groups(
    image: Float[np.ndarray, "rows dim"],
    text: Float[np.ndarray, "rows dim"],
    pairs: Int64[np.ndarray, "groups 2"],
) -> Compositional:
    """Compare both images with both captions of every group.

    A choice between equally near ones counts as wrong, and so does one with a cosine that is not a
    number. Cosines are computed in float64, each in the same order, so that equal captions tie.

    Args:
        image: Image embeddings of any length; normalised here.
        text: Caption embeddings; row i is the caption of row i of `image`.
        pairs: The two rows of each group, from `pair_rows`.

    Reference:
        Thrush et al. 2022, Winoground, arXiv:2204.03162, equations 1 to 3.
    """
    images, texts = _normalised(image[pairs]), _normalised(text[pairs])  # (groups, 2, dim)
    cosines = np.empty((len(pairs), 2, 2))
    for i in range(2):
        for j in range(2):
            cosines[:, i, j] = (images[:, i] * texts[:, j]).sum(axis=-1)
    return Compositional(cosines)


def choose_captions(
    image: Float[np.ndarray, "groups dim"],
    text: Float[np.ndarray, "groups captions dim"],
    *,
    right: int = 1,
) -> Bool[np.ndarray, "groups"]:
    """Return for which images their first captions are nearer than each of the others.

    Equally near ones, and cosines that are not numbers, count as wrong, as in `compare_groups`.

    Args:
        image: Image embeddings of any length; normalised here.
        text: Caption embeddings, likewise; the first of each image are right.
        right: How many of them.

    Reference:
        Hsieh et al. 2023, SugarCrepe, arXiv:2306.14610; Yuksekgonul et al. 2023, ARO,
        arXiv:2210.01936, whose argmax would count some ties as right. Dumpala et al. 2024,
        SugarCrepe++, arXiv:2406.11171 (image-to-text task), with two right ones.
    """
    cosines = (_normalised(image)[:, None] * _normalised(text)).sum(axis=-1)
    chosen: np.ndarray = cosines[:, :right].min(axis=1) > cosines[:, right:].max(axis=1)
    return chosen


def tell_texts_apart(
    text: Float[np.ndarray, "groups captions dim"], *, right: int
) -> Bool[np.ndarray, "groups"]:
    """Return where the right captions are nearer to each other than to any wrong one.

    Args:
        text: Caption embeddings of any length; the first `right` of each group are right.
        right: How many of them, two or more.

    Reference:
        Dumpala et al. 2024, SugarCrepe++, arXiv:2406.11171 (text-only task).
    """
    texts = _normalised(text)
    cosines = np.einsum("gid,gjd->gij", texts, texts)
    first, second = np.triu_indices(right, 1)
    chosen: np.ndarray = cosines[:, first, second].min(axis=1) > cosines[:, :right, right:].max(
        axis=(1, 2)
    )
    return chosen


def pair_rows(
    groups: Int[np.ndarray, "rows"], usable: Bool[np.ndarray, "rows"]
) -> tuple[Int64[np.ndarray, "groups 2"], int]:
    """Return the two rows of each group in order, and how many groups are left out.

    A group is left out when it has not exactly two rows, or one of them cannot be used.

    Args:
        groups: The group of each row, -1 for none.
        usable: Rows whose image and caption are ok.
    """
    numbers, first, counts = np.unique(groups, return_index=True, return_counts=True)
    order = np.argsort(groups, kind="stable")
    starts = np.cumsum(counts) - counts
    chosen = (numbers >= 0) & (counts == 2)
    pairs = np.stack([order[starts[chosen]], order[starts[chosen] + 1]], axis=1)
    pairs = pairs[np.argsort(first[chosen], kind="stable")]
    pairs = pairs[usable[pairs].all(axis=1)]
    return pairs, int((numbers >= 0).sum()) - len(pairs)


def _normalised(rows: Float[np.ndarray, "*rows dim"]) -> Float[np.ndarray, "*rows dim"]:
    rows = rows.astype(np.float64)
    norms = np.linalg.norm(rows, axis=-1, keepdims=True)
    normalised: np.ndarray = rows / np.maximum(norms, 1e-12)
    return normalised


def _score_field(context: Context, found: Findings, dataset: str, field: str) -> None:
    store = context.stores[dataset.partition("/")[0]]
    images, texts = context.embedder.images(store), context.embedder.captions(store, field)
    usable = np.zeros(store.rows, dtype=bool)
    usable[np.intersect1d(images.rows, texts.rows)] = True
    pairs, left_out = pair_rows(_groups(store), usable)
    if left_out:
        found.note(
            f"{left_out} groups of {dataset} are left out: they have not exactly two rows, or one "
            f"of these cannot be used."
        )
    if not len(pairs):
        raise UnusableSplitError(
            f"No group of {store.path} has two rows that can be used. Two rows with the same "
            f"`group` were expected. Correct the source, or name other splits in "
            f"eval.compositional."
        )
    numbers = np.arange(pairs.size).reshape(-1, 2)
    flat = pairs.ravel()
    compared = compare_groups(images.at(flat).cpu().numpy(), texts.at(flat).cpu().numpy(), numbers)
    scores = _Scores(context, found, pairs, dataset)
    for metric, hits in compared.hits().items():
        protocol = {
            "form": "Winoground: two images, two captions",
            "captions": field,
            "ties": "count as wrong (strictly greater)",
            "groups_left_out": left_out,
            "chance": CHANCE[metric],
        }
        scores.add(metric, hits, protocol)
    _add_examples(context, found, dataset, field, pairs, compared)


def _score_choice(context: Context, found: Findings, split: str, fields: tuple[str, ...]) -> None:
    store = context.stores[split]
    wrong = tuple(field for field in fields if field.startswith(NEGATIVE))
    fields = tuple(field for field in fields if field not in wrong) + wrong
    right = len(fields) - len(wrong) if 0 < len(wrong) < len(fields) else 1
    images = context.embedder.images(store)
    texts = [context.embedder.captions(store, field) for field in fields]
    rows = np.flatnonzero(_groups(store) >= 0)
    left_out = len(rows)
    for embedded in (images, *texts):
        rows = np.intersect1d(rows, embedded.rows)
    if left_out := left_out - len(rows):
        found.note(
            f"{left_out} groups of {split} are left out: their image or one of their "
            f"{len(fields)} captions cannot be used."
        )
    if not len(rows):
        raise UnusableSplitError(
            f"No group of {store.path} has an image and {len(fields)} captions that can be used. "
            f"At least one was expected. Correct the source, or name other splits in "
            f"eval.compositional."
        )
    vectors = np.stack([embedded.at(rows).cpu().numpy() for embedded in texts], axis=1)
    first = "the first right" if right == 1 else f"the first {right} right"
    about = {
        "form": f"one image, {len(fields)} captions, {first}",
        "captions": list(fields),
        "ties": "count as wrong (strictly greater)",
        "groups_left_out": left_out,
        "chance": round(1 / math.comb(len(fields), right), 8),
    }
    scores = _Scores(context, found, rows[:, None], split)
    scores.add(
        "text_score", choose_captions(images.at(rows).cpu().numpy(), vectors, right=right), about
    )
    if right > 1:
        pairs = math.comb(right, 2), right * len(wrong)  # of right ones, and with a wrong one
        about |= {"form": "texts alone", "chance": round(1 / math.comb(sum(pairs), pairs[0]), 8)}
        scores.add("text_only_score", tell_texts_apart(vectors, right=right), about)


@dataclass(frozen=True)
class _Scores:
    """Keeps the scores of groups; where their rows have classes, of each and their mean too."""

    context: Context
    found: Findings
    rows: Int64[np.ndarray, "groups each"]
    dataset: str

    def add(self, metric: str, hits: Bool[np.ndarray, "groups"], protocol: dict[str, Any]) -> None:
        right, rows = hits.astype(np.int64), self.rows
        self._add(self.dataset, metric, Items(right, rows=rows), protocol)
        store = self.context.stores[self.dataset.partition("/")[0]]
        labels, names = store.labels(), store.class_names
        if labels is None or names is None or (labels[rows] != labels[rows[:, :1]]).any():
            return  # labels of the pictures, and not of the groups
        kinds = labels[rows[:, 0]].astype(np.int64)
        there, known = np.unique(kinds[kinds >= 0]), kinds >= 0
        if len(there) < 2:
            return
        for kind in there:
            chosen = kinds == kind
            items = Items(right[chosen], rows=rows[chosen])
            self._add(f"{self.dataset}/{names[kind]}", metric, items, protocol)
        mean = f"{self.dataset}/mean of {len(there)} kinds"
        items = Items(right[known], classes=kinds[known], rows=rows[known])
        self._add(mean, metric, items, protocol | {"mean_over": [names[kind] for kind in there]})

    def _add(self, dataset: str, metric: str, items: Items, protocol: dict[str, Any]) -> None:
        about = {"dataset": dataset, "metric": metric, "protocol": protocol}
        self.context.add(self.found, items, task="compositional", **about)


def _add_examples(
    context: Context,
    found: Findings,
    dataset: str,
    field: str,
    pairs: Int64[np.ndarray, "groups 2"],
    compared: Compositional,
) -> None:
    split = dataset.partition("/")[0]
    settings, gallery = context.settings, context.gallery(split)
    for number in draw(compared.group, settings.examples, seed=settings.seed):
        first, second = (int(row) for row in pairs[number])
        s = compared.cosines[number].tolist()
        found.exhibits.append(
            GroupExample(
                dataset=split,
                pictures=(gallery.picture(first), gallery.picture(second)),
                captions=(gallery.caption(field, first), gallery.caption(field, second)),
                cosines=((s[0][0], s[0][1]), (s[1][0], s[1][1])),
                text=bool(compared.text[number]),
                image=bool(compared.image[number]),
            )
        )


def _tells_apart(store: FeatureStore, field: str) -> bool:
    pairs, _ = pair_rows(_groups(store), np.ones(store.rows, dtype=bool))
    captions = store.captions(field)
    return bool(np.any(captions[pairs[:, 0]] != captions[pairs[:, 1]]))


def _has_one_row_each(store: FeatureStore) -> bool:
    groups = _groups(store)
    _, counts = np.unique(groups[groups >= 0], return_counts=True)
    return bool(np.all(counts == 1))


def _groups(store: FeatureStore) -> np.ndarray:
    groups = store.groups()
    return np.full(store.rows, -1, dtype=np.int32) if groups is None else groups
