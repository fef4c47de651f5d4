"""Mean average precision of pictures that have several classes each (PASCAL VOC 2007)."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath

import numpy as np
from jaxtyping import Bool, Float, Int8, Int64
from pydantic import Field

from evaluate.config import EvalSettings
from evaluate.measures.measure import TIES, Context, Inputs, Measure, Splits
from evaluate.measures.zero_shot import ZeroShotSettings, prompts_protocol
from evaluate.prompts import read_prompts
from evaluate.results import Findings, Result
from evaluate.statistics import Interval, percentile_interval
from features.config import DataPattern
from features.errors import EvaluationError, UnusableSplitError
from features.storage import files
from features.store import FeatureStore

TIE = 1e-6
RESAMPLES_AT_ONCE = 32
MARKS = {"1": 1, "-1": -1, "0": 0}
POINTS = np.linspace(0, 1, 11)


class MultiLabelSettings(EvalSettings):
    """Settings of the classification of pictures with several classes each."""

    multi_label: dict[str, DataPattern] = Field(default={})
    """Splits of pictures that have several classes each, and pattern of the files that say which:
    one a class, named after it, with a line `NAME 1` of each picture that shows it, `NAME -1` of
    the others and `NAME 0` of those left out, as `ImageSets/Main/*_test.txt` of VOC. The prompts
    are those of zero-shot classification."""


@dataclass(frozen=True)
class ClassFiles:
    """Files of marks, one a class."""

    pattern: str

    def version(self) -> object:
        """Return the hash of all of them."""
        digest = hashlib.sha256()
        for name, text in self._texts.items():
            digest.update(f"{name}\0{text}\0".encode())
        return digest.hexdigest()

    @cached_property
    def _texts(self) -> dict[str, str]:
        try:
            places = files.matching_places(self.pattern)
            texts = [files.read(place).decode() for place in places]
        except (OSError, ValueError) as error:
            raise EvaluationError(
                f"eval.multi_label names {self.pattern}, which cannot be read ({error}). Text "
                f"files of one class each were expected, as VOC's ImageSets/Main/*_test.txt. "
                f"Correct it."
            ) from error
        stems = [PurePosixPath(place.name).stem for place in places]
        endings = {stem.rpartition("_")[2] for stem in stems if "_" in stem}
        if len(stems) > 1 and len(endings) == 1 and all("_" in stem for stem in stems):
            stems = [stem.rpartition("_")[0] for stem in stems]  # that of the split: `dog_test`
        return dict(zip(stems, texts, strict=True))

    def read(self) -> tuple[list[str], list[str], Int8[np.ndarray, "pictures classes"]]:
        """Return the pictures, the classes, and the mark of each: 1, -1, or 0 for left out.

        Raises:
            EvaluationError: A line is none, or the files do not list the same pictures.
        """
        columns: dict[str, dict[str, int]] = {}
        for name, text in self._texts.items():
            marks: dict[str, int] = {}
            for number, line in enumerate(text.splitlines(), 1):
                picture, _, mark = line.strip().rpartition(" ")
                if line.strip() and (mark not in MARKS or not picture.strip()):
                    raise EvaluationError(
                        f"Line {number} of the marks of {name!r} ({self.pattern}) is {line!r:.80}. "
                        f"The name of a picture and 1, -1 or 0 were expected. Correct the line, or "
                        f"eval.multi_label."
                    )
                if line.strip():
                    marks[picture.strip()] = MARKS[mark]
            columns[name] = marks
        pictures = list(next(iter(columns.values())))
        for name, marks in columns.items():
            if marks.keys() != set(pictures):
                raise EvaluationError(
                    f"The marks of {name!r} ({self.pattern}) are of {len(marks)} pictures, and "
                    f"those of {next(iter(columns))!r} of {len(pictures)} others. The same "
                    f"pictures in each file were expected. Name one split in eval.multi_label."
                )
        marked = [[marks[picture] for marks in columns.values()] for picture in pictures]
        return pictures, list(columns), np.array(marked, dtype=np.int8)


class MultiLabel(Measure):
    """Mean average precision over the classes."""

    name = "multi_label"
    title = "Pictures of several classes"
    in_short = "For each class, the pictures that show it before those that do not"
    explained = (
        "A picture may show a dog and a chair. For each class all pictures are ordered by how near "
        "they are to its sentences, and **average precision** is the mean, over the pictures that "
        "show it, of the share of such pictures up to there; **map** is its mean over the classes. "
        "**map 11 point** is the form of VOC 2007: the mean of the best precision at a recall of "
        "at least 0, 0.1, … 1."
    )
    metric = "map"
    settings = MultiLabelSettings
    needs = "pictures"

    def can_measure(self, store: FeatureStore) -> bool:
        """Return whether there are features of images."""
        return any(name.startswith("image/") for name in store.columns())

    def mentions(self, settings: EvalSettings) -> dict[str, Sequence[str]]:
        """Return the splits that are named."""
        return {"eval.multi_label": tuple(settings.of(MultiLabelSettings).multi_label)}

    def splits(self, settings: EvalSettings, splits: Splits) -> tuple[str, ...]:
        """Return the splits that are named; no other has files that say the classes."""
        named = self.mentions(settings)["eval.multi_label"]
        return super().splits(settings, splits) if named else ()

    def inputs(self, settings: EvalSettings, max_pixels: int) -> Mapping[str, Inputs]:  # noqa: ARG002
        """Return the files of marks."""
        named = settings.of(MultiLabelSettings).multi_label
        return {split: ClassFiles(pattern) for split, pattern in named.items()}

    def run(self, context: Context, split: str) -> Findings:
        """Score every class, and their mean."""
        found, store = Findings(), context.stores[split]
        pictures, names, marks = context.inputs[self.name][split].read()
        images = context.embedder.images(store)
        rows, listed = _rows_of(store, pictures)
        there = np.isin(rows, images.rows)
        if missing := len(pictures) - int(there.sum()):
            found.note(
                f"{missing} of the {len(pictures)} pictures in the marks of {split} are left out: "
                f"they are not in {store.path}, or cannot be used."
            )
        marks = marks[listed][there]
        if not (marks > 0).any():
            raise UnusableSplitError(
                f"No picture of {store.path} has a class by eval.multi_label. Keys that end in the "
                f"names of pictures, such as {pictures[0]!r}, were expected. Correct the source or "
                f"the setting."
            )
        settings = context.settings.of(ZeroShotSettings)
        classes = context.class_embeddings(read_prompts(settings.templates_of(split), names))
        cosines = (images.at(rows[there]) @ classes.T).double().cpu().numpy()
        ranked = {name: rank_pictures(cosines[:, i], marks[:, i]) for i, name in enumerate(names)}
        ranked = {name: each for name, each in ranked.items() if each[1].any()}
        protocol = {
            "templates": prompts_protocol(settings, split),
            "classes": len(ranked),
            "ties": TIES,
            "left_out": int((marks == 0).sum()),
        }

        def add(part: str, metric: str, value: float, interval: Interval | None) -> None:
            shares = [shown.mean() for name, (_, shown) in ranked.items() if part in ("", name)]
            result = Result(
                task=self.name,
                dataset=f"{split}/{part}".rstrip("/"),
                metric=metric,
                value=value,
                n=len(marks),
                ci95=interval,
                encoders=context.encoders,
                protocol=protocol | {"chance": round(float(np.mean(shares)), 8)},
            )
            found.add(result)

        whole = np.ones((1, len(marks)), dtype=np.int64)
        values = np.stack([average_precision(*each, whole)[0] for each in ranked.values()])
        drawn = _resampled(list(ranked.values()), len(marks), context.settings)
        for i, metric in enumerate(("map", "map_11_point")):
            means = np.nanmean(drawn[:, :, i], axis=0) if drawn.size else drawn
            add("", metric, float(values[:, i].mean()), _interval(means))
        for i, name in enumerate(ranked):
            add(name, "ap", float(values[i, 0]), _interval(drawn[i, :, 0]))
        return found


def average_precision(
    order: Int64[np.ndarray, "ranked"],
    shown: Bool[np.ndarray, "ranked"],
    counts: Int64[np.ndarray, "resamples pictures"],
) -> Float[np.ndarray, "resamples 2"]:
    """Return the average precision of a ranking, and that of 11 points, for each resample.

    Args:
        order: Pictures, the nearest first.
        shown: Which of these show the class.
        counts: How often a resample has each picture.

    Returns:
        NaN where a resample has no picture of the class.

    Reference:
        Everingham et al. 2010, The PASCAL Visual Object Classes Challenge, section 4.2 (11 points).
    """
    drawn = counts[:, order]
    right = np.cumsum(drawn * shown, axis=1)
    precision = right / np.maximum(np.cumsum(drawn, axis=1), 1)
    with np.errstate(invalid="ignore"):
        whole = (drawn * shown * precision).sum(axis=1) / right[:, -1]
    best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    reached = [(right >= point * right[:, -1:] - TIE).argmax(axis=1) for point in POINTS]
    eleven = np.mean([best[np.arange(len(best)), first] for first in reached], axis=0)
    return np.stack([whole, np.where(right[:, -1] > 0, eleven, np.nan)], axis=1)


def rank_pictures(
    cosines: Float[np.ndarray, "pictures"], marks: Int8[np.ndarray, "pictures"]
) -> tuple[Int64[np.ndarray, "ranked"], Bool[np.ndarray, "ranked"]]:
    """Order the pictures that are not left out; one without the class goes before one as near."""
    kept = np.flatnonzero(marks)
    shown = marks[kept] > 0
    nearness = np.nan_to_num(cosines[kept], nan=-np.inf) - TIE * shown
    order = np.lexsort((shown, -nearness))
    return kept[order], shown[order]


def _resampled(
    ranked: Sequence[tuple[np.ndarray, np.ndarray]], pictures: int, settings: EvalSettings
) -> Float[np.ndarray, "classes resamples 2"]:
    """Return both numbers of each class for pictures drawn anew, with replacement."""
    generator = np.random.default_rng(settings.seed)
    found = [np.empty((len(ranked), 0, 2))]
    for start in range(0, settings.bootstrap, RESAMPLES_AT_ONCE):
        size = min(RESAMPLES_AT_ONCE, settings.bootstrap - start)
        counts = generator.multinomial(pictures, np.full(pictures, 1 / pictures), size=size)
        found.append(np.stack([average_precision(*each, counts) for each in ranked]))
    return np.concatenate(found, axis=1)


def _interval(drawn: Float[np.ndarray, "*resamples"]) -> Interval | None:
    known = drawn[np.isfinite(drawn)]
    return percentile_interval(known) if known.size else None


def _rows_of(
    store: FeatureStore, pictures: Sequence[str]
) -> tuple[Int64[np.ndarray, "listed"], Int64[np.ndarray, "listed"]]:
    """Return the rows of pictures in order, by the last part of their keys, and which these are."""
    places = {name: i for i, name in enumerate(pictures)}
    names = [key.rpartition("/")[2] for key in store.keys().tolist()]
    rows = [row for row, name in enumerate(names) if name in places]
    if len({names[row] for row in rows}) < len(rows):
        raise EvaluationError(
            f"{store.path} has several rows of one of the pictures that eval.multi_label lists. "
            f"Keys whose last part is the name of one picture were expected. Correct the source."
        )
    listed = [places[names[row]] for row in rows]
    return np.array(rows, dtype=np.int64), np.array(listed, dtype=np.int64)
