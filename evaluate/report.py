"""The report: one self-contained HTML file, readable by someone who was not there.

What it shows is plain data of a run; nothing here reads a store. Each measure has a section, with
its own title, explanation and template. Words from outside (captions, class names, file names) are
escaped, and the page asks the browser to load and run nothing.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from evaluate.charts import Curve, line_chart
from evaluate.measures.leaks import leaked
from evaluate.measures.measure import Measure
from evaluate.results import Result

TEMPLATES = Path(__file__).parent / "templates"
MARKS = ((r"\*\*(.+?)\*\*", "b"), (r"\*(.+?)\*", "i"), (r"`(.+?)`", "code"))


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


@dataclass(frozen=True)
class Section:
    """What a measure found on all its splits."""

    measure: Measure
    results: tuple[Result, ...]
    exhibits: tuple[Any, ...] = ()
    """What its template shows beside the numbers."""


@dataclass(frozen=True)
class PublishedBeside:
    """What was published of the same tasks."""

    by: str
    rows: tuple[tuple[str, float, Result | None], ...]
    """Name of a result, the published number in per cent, and the run's own."""
    absent: dict[str, str]
    """Data sets that were not there, and what was looked for."""

    @classmethod
    def beside(
        cls, results: Iterable[Result], by: str, percent: dict[str, float], absent: dict[str, str]
    ) -> "PublishedBeside":
        """Put published numbers beside those of a run."""
        own = {result.name: result for result in results}
        rows = tuple((name, value, own.get(name)) for name, value in percent.items())
        return cls(by, rows, absent)


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
    sections: tuple[Section, ...]
    notes: tuple[str, ...] = ()
    """What a reader must know: measures that were left out, captions that repeat."""
    published: PublishedBeside | None = None
    """Numbers of a publication, beside the run's own."""
    reference: tuple[dict[str, Any], ...] = ()
    """Rows of numbers that were recorded earlier, elsewhere."""


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
        "interval": _interval,
        "ordinal": ordinal,
        "grouped": grouped,
        "marked": marked,
    }
    sections = [each for each in report.sections if each.results]
    results = [result for section in sections for result in section.results]
    style = (TEMPLATES / "report.css").read_text(encoding="utf-8")
    return environment.get_template("report.html.j2").render(
        report=report,
        style=Markup(style),
        headlines=[
            each for section in sections for each in section.measure.headlines(section.results)
        ],
        aligned={each.kind: each for each in report.encoders if each.is_aligned},
        loss_chart=_loss_chart(report.training),
        recall_chart=_recall_chart(report.training),
        sections=[_rendered(environment, section) for section in sections],
        results=results,
        leaked=leaked(results),
        listed=[each for each in results if not each.is_detail],
        columns_of_reference=list(dict.fromkeys(key for row in report.reference for key in row)),
    )


def _rendered(environment: Environment, section: Section) -> dict[str, Any]:
    measure = section.measure
    shown = {"measure": measure, "results": section.results, "exhibits": section.exhibits}
    shown |= measure.view(section.results, section.exhibits)
    body = environment.get_template(measure.template).render(shown)
    return {"id": measure.name.replace("_", "-"), "measure": measure, "body": Markup(body)}


def grouped(results: Iterable[Result], attribute: str) -> list[tuple[Any, list[Result]]]:
    """Return results that have the same value of an attribute together, in order of first sight."""
    groups: dict[Any, list[Result]] = {}
    for result in results:
        groups.setdefault(getattr(result, attribute), []).append(result)
    return list(groups.items())


def marked(text: str) -> Markup:
    """Return a text with its **bold**, *italic* and `code` parts as such."""
    html = str(escape(text))
    for pattern, tag in MARKS:
        html = re.sub(pattern, rf"<{tag}>\1</{tag}>", html)
    return Markup(html)


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
