"""The report: one self-contained HTML file, readable by someone who was not there.

What it shows is plain data, made by `pipeline/evaluation/report.py` from a run; nothing here reads
a store. Words from outside (captions, class names, file names) are escaped, and the page asks the
browser to load and run nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from evaluate.charts import Curve, line_chart, meter
from evaluate.results import Result


@dataclass(frozen=True)
class LegendEntry:
    """A class of a segmented picture."""

    colour: str
    """As CSS has it."""
    name: str
    is_there: bool
    is_predicted: bool


@dataclass(frozen=True)
class SegmentedPicture:
    """A picture, its mask, and what was predicted."""

    dataset: str
    name: str
    picture: str
    """Data URI, as the next two."""
    truth: str
    prediction: str
    accuracy: float | None
    """Fraction of its pixels that are right; None where none counts."""
    legend: tuple[LegendEntry, ...]


@dataclass(frozen=True)
class SegmentationView:
    """The numbers and pictures of a data set."""

    dataset: str
    scores: list[Result]
    classes: list[Result]
    """IoU of each class, best first."""
    pictures: list[SegmentedPicture]


def segmentation_views(
    results: Sequence[Result], pictures: Sequence[SegmentedPicture]
) -> list[SegmentationView]:
    """Gather the numbers and pictures of each segmented data set."""
    found = [result for result in results if result.task == "segmentation"]
    return [
        SegmentationView(
            name,
            [each for each in found if each.dataset == name],
            sorted(
                (each for each in found if each.is_detail and each.split == name),
                key=lambda each: -each.value,
            ),
            [each for each in pictures if each.dataset == name],
        )
        for name in dict.fromkeys(each.split for each in found)
    ]


MOST_LABELLED = 130
MOST_DRAWN = 260
SIDE = 860


@dataclass(frozen=True)
class Confusions:
    """Which class was taken for which."""

    dataset: str
    class_names: tuple[str, ...]
    matrix: Int64[np.ndarray, "classes classes"]
    """Images of the class of the row that were taken for the class of the column."""


@dataclass(frozen=True)
class Mistake:
    """A pair of classes that is confused."""

    true: str
    predicted: str
    count: int
    images: int
    """Images of the true class."""


def worst_mistakes(confusions: Confusions, count: int) -> list[Mistake]:
    """Return the most frequent mistakes, most frequent first."""
    wrong = confusions.matrix.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:count]
    names, totals = confusions.class_names, confusions.matrix.sum(axis=1)
    places = [divmod(int(place), len(names)) for place in order]
    return [
        Mistake(names[true], names[taken], int(wrong[true, taken]), int(totals[true]))
        for true, taken in places
        if wrong[true, taken]
    ]


def hardest_classes(confusions: Confusions, count: int) -> list[tuple[str, int, int]]:
    """Return the name, right and all images of the classes of the lowest recall."""
    totals, right = confusions.matrix.sum(axis=1), np.diag(confusions.matrix)
    share = np.where(totals > 0, right / np.maximum(totals, 1), 2.0)
    order = np.lexsort((-totals, share))[:count]
    return [(confusions.class_names[i], int(right[i]), int(totals[i])) for i in order if totals[i]]


def by_attribute(confusions: Confusions) -> list[Confusions]:
    """Sum the matrix over each word of the class names, where these are a grid of two words.

    `red circle`, `red square`, `blue circle`, `blue square` give a matrix of colours and one of
    shapes. Other class names give nothing.
    """
    words = [name.split() for name in confusions.class_names]
    if len(words) < 4 or any(len(pair) != 2 for pair in words):
        return []
    matrices = []
    for position in range(2):
        values = list(dict.fromkeys(pair[position] for pair in words))
        number = np.array([values.index(pair[position]) for pair in words])
        summed = np.zeros((len(values), len(values)), dtype=np.int64)
        np.add.at(summed, (number[:, None], number[None, :]), confusions.matrix)
        which = ("first", "last")[position]
        matrices.append(Confusions(f"{confusions.dataset}, {which} word", tuple(values), summed))
    is_grid = len(matrices[0].class_names) * len(matrices[1].class_names) == len(words)
    return matrices if is_grid and all(len(m.class_names) > 1 for m in matrices) else []


def matrix_chart(confusions: Confusions, *, side: int = SIDE) -> Markup:
    """Draw the matrix: a square for each pair that occurs, stronger for a larger share of its row.

    With more classes than can be drawn, neighbours are drawn as one.
    """
    shown = _merged(confusions)
    size = len(shown.class_names)
    labelled = size <= MOST_LABELLED
    cell = min(34.0, side / size)
    font = min(12.5, 0.92 * cell)
    longest = max(len(name) for name in shown.class_names)
    margin = font * 0.56 * longest + 12 if labelled else 14.0
    extent = size * cell
    parts = [
        f'<rect class="track" x="{margin:.1f}" y="{margin:.1f}" width="{extent:.1f}" '
        f'height="{extent:.1f}"/>'
    ]
    parts += _cells(shown, cell, margin)
    if labelled:
        parts += _labels(shown.class_names, cell, margin, font)
    total = margin + extent + 4
    return Markup(
        f'<div class="scroll"><svg class="matrix" viewBox="0 0 {total:.0f} {total:.0f}" '
        f'style="max-width:{total:.0f}px;min-width:{min(total, 12 * size):.0f}px" role="img" '
        f'aria-label="confusion matrix of {escape(confusions.dataset)}">'
        + "".join(parts)
        + "</svg></div>"
    )


def _cells(shown: Confusions, cell: float, margin: float) -> list[str]:
    totals = shown.matrix.sum(axis=1)
    parts = []
    for true, taken in np.argwhere(shown.matrix).tolist():
        count, total = int(shown.matrix[true, taken]), int(totals[true])
        names = shown.class_names
        title = escape(f"{names[true]} → {names[taken]}: {count} of {total}")
        kind = "hit" if true == taken else "miss"
        parts.append(
            f'<rect class="{kind}" x="{margin + taken * cell:.1f}" y="{margin + true * cell:.1f}" '
            f'width="{cell:.1f}" height="{cell:.1f}" '
            f'fill-opacity="{0.12 + 0.88 * (count / total) ** 0.7:.2f}"><title>{title}</title>'
            f"</rect>"
        )
    return parts


def _labels(names: Sequence[str], cell: float, margin: float, font: float) -> list[str]:
    parts = []
    for number, name in enumerate(names):
        middle = margin + (number + 0.5) * cell
        text = escape(name)
        parts.append(
            f'<text x="{margin - 4:.1f}" y="{middle + font * 0.35:.1f}" font-size="{font:.1f}" '
            f'text-anchor="end">{text}</text>'
            f'<text transform="translate({middle + font * 0.35:.1f} {margin - 4:.1f}) rotate(-90)" '
            f'font-size="{font:.1f}">{text}</text>'
        )
    return parts


def _merged(confusions: Confusions) -> Confusions:
    size = len(confusions.class_names)
    each = -(-size // MOST_DRAWN)
    if each == 1:
        return confusions
    starts = np.arange(0, size, each)
    matrix = np.add.reduceat(np.add.reduceat(confusions.matrix, starts, axis=0), starts, axis=1)
    names = confusions.class_names
    merged = tuple(f"{names[i]} … {names[min(i + each, size) - 1]}" for i in range(0, size, each))
    return Confusions(confusions.dataset, merged, matrix)


TEMPLATES = Path(__file__).parent / "templates"
STANDARD_K = 20  # the k that DINO reports
MISTAKES = 12


@dataclass(frozen=True)
class EncoderFacts:
    """A frozen encoder, as its fingerprint says."""

    kind: str
    """`image` or `text`."""
    name: str
    is_aligned: bool
    """Whether the head was trained on it; the others stand beside it for comparison."""
    dim: int
    fingerprint: dict[str, Any]


@dataclass(frozen=True)
class ColumnFacts:
    """What became of the rows of a feature column."""

    name: str
    ok: int
    quarantined: dict[str, int]
    """Rows that are not ok, by reason."""


@dataclass(frozen=True)
class SplitFacts:
    """A split of the data."""

    name: str
    used_for: tuple[str, ...]
    rows: int
    fields: tuple[str, ...]
    classes: int
    source: str
    columns: tuple[ColumnFacts, ...]


@dataclass(frozen=True)
class TrainingFacts:
    """How the head was trained."""

    facts: tuple[tuple[str, str], ...]
    """What is set beside the curves: head, weights, loss, steps, rows."""
    loss: Curve
    """Its name says the unit."""
    recalls: tuple[Curve, ...]
    """On the held-out rows, as fractions."""
    best_step: int
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True)
class Candidate:
    """An item that a query found."""

    words: str
    cosine: float
    is_right: bool
    picture: str | None = None
    """Data URI; None for a caption, or where the image cannot be read."""


@dataclass(frozen=True)
class RetrievalExample:
    """A query and what it found."""

    words: str
    """The caption that was asked with, or what is written under the picture."""
    picture: str | None
    """The picture that was asked with."""
    rank: int
    """Place of the first right item, from 1."""
    gallery: int
    found: tuple[Candidate, ...]
    missed: Candidate | None = None
    """The right item, where it is not among those found."""

    @property
    def is_right(self) -> bool:
        """Whether a right item came first."""
        return self.rank == 1


@dataclass(frozen=True)
class ExamplePanel:
    """Examples of one measure, drawn at random among the right and the wrong ones."""

    task: str
    dataset: str
    examples: tuple[RetrievalExample, ...]

    @property
    def right(self) -> list[RetrievalExample]:
        """Those where a right item came first."""
        return [example for example in self.examples if example.is_right]

    @property
    def wrong(self) -> list[RetrievalExample]:
        """The others."""
        return [example for example in self.examples if not example.is_right]


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


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything the page shows."""

    title: str
    run: str
    written: str
    """Date, and by which version of the program."""
    checkpoint_sha256: str
    checkpoint: str
    """Which one, and of which step."""
    encoders: tuple[EncoderFacts, ...]
    splits: tuple[SplitFacts, ...]
    training: TrainingFacts
    results: tuple[Result, ...]
    panels: tuple[ExamplePanel, ...] = ()
    groups: tuple[GroupExample, ...] = ()
    confusions: tuple[Confusions, ...] = ()
    segmented: tuple[SegmentedPicture, ...] = ()
    notes: tuple[str, ...] = ()
    """What a reader must know: measures that were left out, captions that repeat."""
    reference: tuple[dict[str, Any], ...] = ()
    """Rows of numbers that were recorded earlier, elsewhere."""


@dataclass(frozen=True)
class Headline:
    """A number at the top of the page."""

    name: str
    explained: str
    result: Result


def render(report: Report) -> str:
    """Return the page."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {
        "percent": percent,
        "meter": _meter,
        "interval": _interval,
        "ordinal": ordinal,
    }
    template = environment.get_template("report.html.j2")
    style = (TEMPLATES / "report.css").read_text(encoding="utf-8")
    return template.render(
        report=report,
        style=Markup(style),
        headlines=headlines(report.results),
        aligned={each.kind: each for each in report.encoders if each.is_aligned},
        loss_chart=_loss_chart(report.training),
        recall_chart=_recall_chart(report.training),
        retrieval=by_dataset(report.results, "retrieval/"),
        zero_shot=by_dataset(report.results, "zero_shot"),
        has_unseen=any(each.dataset.endswith("/unseen classes") for each in report.results),
        knn=knn_tables(report.results),
        probes=[each for each in report.results if each.metric == "linear_probe_top1"],
        alignment=by_dataset(report.results, "alignment/"),
        compositional=by_dataset(report.results, "compositional"),
        has_choices=any("one image" in str(r.protocol.get("form")) for r in report.results),
        segmentation=segmentation_views(report.results, report.segmented),
        listed=[each for each in report.results if not each.is_detail],
        confusions=[_confusion_view(each) for each in report.confusions],
        columns_of_reference=list(dict.fromkeys(key for row in report.reference for key in row)),
    )


def headlines(results: Sequence[Result]) -> list[Headline]:
    """Choose the numbers that stand at the top: one of each kind of question."""
    zero_shot = "A picture's class, picked from all class names without a labelled example"
    wanted = [
        ("zero_shot", "top1", "Zero-shot classification", zero_shot),
        ("retrieval/text_to_image", "recall@1", "Caption → image", "The right image comes first"),
        ("retrieval/image_to_text", "recall@1", "Image → caption", "A right caption comes first"),
        ("compositional", "group_score", "Compositional", "Two images, two captions: all matched"),
        (
            "segmentation",
            "miou",
            "Segmentation",
            "Each pixel's class from the names alone: mean IoU",
        ),
    ]
    chosen = []
    for task, metric, name, explained in wanted:
        found = [r for r in results if r.task == task and r.metric == metric]
        if found:
            chosen.append(Headline(name, explained, found[0]))
    knn = [r for r in results if r.task == "knn/image_features"]
    if knn:
        standard = [r for r in knn if r.protocol.get("k") == STANDARD_K] or knn
        k = standard[0].protocol.get("k")
        text = f"Class by the {k} nearest frozen image features: no text, no training"
        chosen.insert(1, Headline("k-NN, image encoder alone", text, standard[0]))
    return chosen


def by_dataset(results: Sequence[Result], task: str) -> dict[str, dict[str, list[Result]]]:
    """Group the results of a task, or of those that begin so: dataset, then task, in order."""
    grouped: dict[str, dict[str, list[Result]]] = {}
    for result in results:
        if result.task == task or (task.endswith("/") and result.task.startswith(task)):
            grouped.setdefault(result.dataset, {}).setdefault(result.task, []).append(result)
    return grouped


@dataclass(frozen=True)
class KnnRow:
    """The accuracies of one kind of vectors, by k."""

    vectors: str
    encoder: str
    by_k: dict[int, Result]
    best: int


@dataclass(frozen=True)
class KnnTable:
    """All k-NN accuracies of a split."""

    dataset: str
    reference: str
    temperature: float
    ks: list[int]
    rows: list[KnnRow]


def knn_tables(results: Sequence[Result]) -> list[KnnTable]:
    """Arrange the k-NN accuracies: a table per split, a row per kind of vectors, a column per k."""
    tables = []
    found = [result for result in results if result.task.startswith("knn/")]
    for dataset in dict.fromkeys(result.dataset for result in found):
        of_split = [result for result in found if result.dataset == dataset]
        kinds = dict.fromkeys((r.task, r.encoders["image"], r.encoders["text"]) for r in of_split)
        rows = []
        for kind in kinds:
            same = [r for r in of_split if (r.task, *r.encoders.values()) == kind]
            by_k = {int(r.protocol["k"]): r for r in same}
            best = max(by_k, key=lambda k: by_k[k].value)
            names = [name for name in kind[1:] if name]
            rows.append(KnnRow(kind[0].removeprefix("knn/"), " + ".join(names), by_k, best))
        protocol = of_split[0].protocol
        ks = sorted({k for row in rows for k in row.by_k})
        tables.append(
            KnnTable(dataset, str(protocol["reference"]), float(protocol["temperature"]), ks, rows)
        )
    return tables


def percent(value: float) -> str:
    """Return a fraction in per cent with one digit."""
    return f"{100 * value:z.1f}"


def ordinal(number: int) -> str:
    """Return 1st, 2nd, 3rd, 4th, … 11th, … 21st."""
    teens = 10 < number % 100 < 20
    ending = "th" if teens else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number:,}{ending}"


def _interval(result: Result) -> str:
    if result.ci95 is None:
        return ""
    low, high = result.ci95
    return f"{100 * low:.1f} – {100 * high:.1f}"


def _meter(result: Result) -> Markup:
    return meter(result.value, result.ci95, result.chance)


def _loss_chart(training: TrainingFacts) -> Markup:
    loss = training.loss
    return line_chart([loss], x_label="step", y_label=loss.name, mark=float(training.best_step))


def _recall_chart(training: TrainingFacts) -> Markup:
    return line_chart(
        training.recalls,
        x_label="step",
        y_label="held-out recall",
        percent=True,
        mark=float(training.best_step),
    )


def _confusion_view(confusions: Confusions) -> dict[str, Any]:
    return {
        "confusions": confusions,
        "chart": matrix_chart(confusions),
        "attributes": [
            (each.dataset, matrix_chart(each, side=380)) for each in by_attribute(confusions)
        ],
        "mistakes": worst_mistakes(confusions, MISTAKES),
        "hardest": hardest_classes(confusions, MISTAKES),
    }
