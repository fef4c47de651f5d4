"""The report: self-contained, safe against the words it shows, and right in what it says."""

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from evaluate.charts import Curve, line_chart
from evaluate.confusion import (
    Confusions,
    by_attribute,
    confusion_view,
    hardest_classes,
    matrix_chart,
    worst_mistakes,
)
from evaluate.examples import Candidate, ExamplePanel, RetrievalExample, thumbnail
from evaluate.measures import MEASURES
from evaluate.measures.compositional import GroupExample
from evaluate.measures.knn import knn_tables
from evaluate.measures.measure import Measure
from evaluate.report import (
    ColumnFacts,
    EncoderFacts,
    Report,
    Section,
    SplitFacts,
    TrainingFacts,
    marked,
    ordinal,
    render,
)
from evaluate.results import Result

HOSTILE = '<script>alert("x")</script>'
FINGERPRINT = {
    "model": "org/model",
    "revision": "0123456789abcdef",
    "pooling": "cls",
    "supervision": "labels of shapes",
    "licence": None,
    "weights_sha256": "ff" * 32,
}
CONFUSIONS = Confusions(
    "test",
    ("red circle", "red square", "blue circle", "blue square"),
    np.array([[3, 1, 0, 0], [0, 4, 0, 0], [2, 0, 1, 0], [0, 0, 0, 0]]),
)


def result(task: str, metric: str, value: float = 0.5, **protocol: Any) -> Result:
    return Result(
        task=task,
        dataset="test",
        metric=metric,
        value=value,
        n=40,
        ci95=(value - 0.1, value + 0.1),
        encoders={"image": "eye", "text": None if task == "knn/image_features" else "reader"},
        protocol={"chance": 0.025, "gallery": 40, "queries": 40} | protocol,
    )


def knn(kind: str, k: int, value: float) -> Result:
    return result(f"knn/{kind}", "knn_top1", value, k=k, reference="train", temperature=0.07)


RESULTS = (
    result("zero_shot", "top1", 0.613),
    result("retrieval/text_to_image", "recall@1", 0.271),
    result("retrieval/image_to_text", "recall@1", 0.342),
    knn("image_features", 10, 0.4),
    knn("image_features", 20, 0.45),
    knn("image_embeddings", 10, 0.7),
    result("compositional", "group_score", 0.2),
)


def sections(results: tuple[Result, ...], **exhibits: tuple[Any, ...]) -> tuple[Section, ...]:
    """What every measure of the table found, of some numbers."""
    return tuple(
        Section(
            measure,
            tuple(each for each in results if measure.owns(each)),
            exhibits.get(measure.name, ()),
        )
        for measure in MEASURES
    )


def report(**changes: Any) -> Report:
    picture = thumbnail(Image.new("RGB", (300, 200), "teal"))
    wrong = RetrievalExample(
        words=HOSTILE,
        picture=None,
        rank=22,
        gallery=40,
        found=(Candidate("a dog", 0.61, False, picture), Candidate("a cat", 0.6, False, None)),
        missed=Candidate("a fish", 0.1, True, picture),
    )
    right = replace(wrong, rank=1, found=(Candidate("a fish", 0.9, True, picture),), missed=None)
    basis = Report(
        title="A title",
        run="run-7",
        written="Written today",
        checkpoint_sha256="ab" * 32,
        checkpoint="best head, of step 20",
        encoders=(
            EncoderFacts("image", "eye", True, 8, FINGERPRINT),
            EncoderFacts("text", "reader", True, 10, FINGERPRINT | {"revision": None}),
        ),
        splits=(
            SplitFacts("train", ("training",), 90, ("0", "1"), 0, "folder", ()),
            SplitFacts(
                "test",
                ("zero-shot",),
                40,
                ("short",),
                4,
                HOSTILE,
                (ColumnFacts("image/eye", 38, {"truncated image": 2}),),
            ),
        ),
        training=TrainingFacts(
            facts=(("head", "small"),),
            loss=Curve("loss (nats per image)", [1.0, 2.0, 3.0], [9.0, 3.0, 2.0]),
            recalls=(Curve("recall@1", [1.0, 3.0], [0.1, 0.3]),),
            best_step=3,
        ),
        sections=sections(
            RESULTS,
            retrieval=(
                ExamplePanel("retrieval/text_to_image", "test", (right, wrong)),
                ExamplePanel("retrieval/image_to_text", "test", (replace(right, picture=picture),)),
            ),
            zero_shot=(ExamplePanel("zero_shot", "test", (wrong,)), CONFUSIONS),
            compositional=(
                GroupExample(
                    "test",
                    (picture, None),
                    ("a on b", "b on a"),
                    ((0.3, 0.2), (0.1, 0.4)),
                    True,
                    True,
                ),
            ),
        ),
        notes=("7 groups are left out.",),
        reference=({"what": "older", "value": 0.1}, {"what": "oldest", "commit": "abc"}),
    )
    return replace(basis, **changes)


def test_the_page_shows_numbers_data_examples_and_where_they_come_from() -> None:
    page = render(report())
    shown = ["61.3", "27.1", "34.2", "labels of shapes", "2 truncated image", "7 groups are left"]
    shown += ["best head, of step 20", "came 22nd of 40", "a on b", "oldest", "not from this run"]
    assert [words for words in shown if words not in page] == []


def test_words_from_outside_cannot_become_markup() -> None:
    page = render(report(title=HOSTILE, notes=(HOSTILE,)))
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_the_page_needs_nothing_but_itself() -> None:
    page = render(report())
    places = re.findall(r"(?:src|href)=\"([^\"]*)\"|url\(([^)]*)\)", page)
    outside = [a or b for a, b in places if not (a or b).startswith(("data:image/", "#"))]
    assert outside == []
    assert "default-src 'none'" in page


def test_sections_without_numbers_are_left_out() -> None:
    page = render(report(sections=sections(()), reference=()))
    assert 'id="zero-shot"' not in page
    assert 'id="compositional"' not in page
    assert 'id="reference"' not in page


def test_groups_of_one_picture_are_explained_where_there_are_some() -> None:
    choice = result("compositional", "text_score", form="one image, 3 captions, the first right")
    assert "one picture with several captions" in render(report(sections=sections((choice,))))
    assert "one picture with several captions" not in render(report())


def test_numbers_and_intervals_below_zero_are_shown_in_one_unit_and_without_a_negative_zero() -> (
    None
):
    facts = {"calibrated": -0.0004, "p_value": 0.5, "chance": -0.0001}
    page = render(
        report(sections=sections((result("alignment/embeddings", "cka_debiased", 0.05, **facts),)))
    )
    assert "0.0500</td><td>-0.0500 – 0.1500" in page
    assert "-0.000<" not in page


def test_a_run_without_metrics_still_has_a_report() -> None:
    nothing = TrainingFacts((), Curve("loss", [], []), (), 0)
    assert "No rows were held out" in render(report(training=nothing))


def test_headlines_take_k_of_twenty_for_the_image_encoder() -> None:
    found = {
        headline.title: headline.result.value
        for section in sections(RESULTS)
        for headline in section.measure.headlines(section.results)
    }
    assert found == {
        "Zero-shot classification": 0.613,
        "Caption → image": 0.271,
        "Image → caption": 0.342,
        "k-NN, image encoder alone": 0.45,
        "Compositional understanding": 0.2,
    }


def test_knn_is_a_table_of_vectors_by_k_with_the_best_marked() -> None:
    (table,) = knn_tables([each for each in RESULTS if each.metric == "knn_top1"])
    assert table.ks == [10, 20]
    assert [(row.vectors, row.encoder, row.best) for row in table.rows] == [
        ("image_features", "eye", 20),
        ("image_embeddings", "eye + reader", 10),
    ]


def test_the_columns_of_retrieval_are_the_recalls_there_are() -> None:
    found = [result("retrieval/text_to_image", f"recall@{k}", k / 100) for k in (1, 5, 10, 50)]
    found += [result("retrieval/image_to_text", f"recall@{k}", k / 200) for k in (1, 50)]
    page = render(report(sections=sections(tuple(found))))
    table = page[page.index("<th>direction</th>") :].partition("</table>")[0]
    headings, *rows = table.split("<tr>")
    assert re.findall(r"recall@\d+", headings) == ["recall@1", "recall@5", "recall@10", "recall@50"]
    cells = [re.findall(r"<b>([\d.]+)</b> %|<td>(–)</td>", row) for row in rows]
    assert cells[0] == [("1.0", ""), ("5.0", ""), ("10.0", ""), ("50.0", "")]
    assert cells[1] == [("0.5", ""), ("", "–"), ("", "–"), ("25.0", "")]


@pytest.mark.parametrize("measure", MEASURES, ids=lambda measure: measure.name)
def test_every_measure_explains_itself(measure: Measure) -> None:
    assert not measure.in_short.endswith(".")
    assert measure.explained.endswith(".")
    assert measure.metric
    assert f"eval.{measure.name}" in measure.mentions(measure.settings()) or not measure.mentions(
        measure.settings()
    )


def test_marks_become_elements_and_what_looks_like_markup_does_not() -> None:
    assert marked("**a** *b* `c` <d>") == "<b>a</b> <i>b</i> <code>c</code> &lt;d&gt;"


@pytest.mark.parametrize(
    ("number", "word"),
    [
        (1, "1st"),
        (2, "2nd"),
        (3, "3rd"),
        (4, "4th"),
        (11, "11th"),
        (112, "112th"),
        (1021, "1,021st"),
    ],
)
def test_places_are_said_as_in_english(number: int, word: str) -> None:
    assert ordinal(number) == word


def test_a_picture_is_small_and_keeps_its_proportions() -> None:
    uri = thumbnail(Image.new("RGBA", (1000, 500)))
    assert uri.startswith("data:image/jpeg;base64,")
    assert len(uri) < 4000


# Charts


def test_a_curve_leaves_out_what_is_not_a_number() -> None:
    chart = line_chart(
        [Curve("a", [1.0, 2.0, 3.0], [1.0, float("nan"), 2.0])], x_label="step", y_label="loss"
    )
    assert chart.count("<use") == 2
    assert "nan" not in chart


def test_a_curve_without_points_is_no_chart() -> None:
    assert line_chart([Curve("a", [1.0], [float("inf")])], x_label="x", y_label="y") == ""


@pytest.mark.parametrize("values", [[5.0], [0.0, 0.0], [1e-6, 1e6], [-3.0, -1.0], [2.0, 2.0]])
def test_any_range_of_values_gives_coordinates_within_the_chart(values: list[float]) -> None:
    chart = line_chart(
        [Curve("a", [float(i) for i in range(len(values))], values)], x_label="x", y_label="y"
    )
    places = [float(each) for each in re.findall(r"<use [^>]*? [xy]=\"(-?[\d.]+)\"", chart)]
    assert len(places) == len(values)
    assert all(0 <= each <= 570 for each in places)


def test_a_long_curve_is_thinned_but_keeps_its_end() -> None:
    many = [float(i) for i in range(10_000)]
    curve = Curve("a", many, [i % 7 + 0.1 * (i % 3) for i in range(10_000)])
    chart = line_chart([curve], x_label="x", y_label="y")
    (line,) = re.findall(r'<path d="([^"]*)"[^>]*stroke: var\(--s0\)', chart)
    points = [point.split() for point in line[1:].split("L")]
    assert 100 <= len(points) <= 402
    assert float(points[-1][0]) == pytest.approx(536, abs=10)


def test_charts_take_the_colours_of_the_page_and_share_no_ids() -> None:
    curves = [Curve("a", [1.0, 2.0], [0.1, 0.2]), Curve("<b>", [1.0, 2.0], [0.2, 0.3])]
    charts = [line_chart(curves, x_label="step", y_label=name) for name in ("loss", "recall")]
    assert "#000" not in charts[0]
    assert "var(--s1)" in charts[0]
    assert "&lt;b&gt;" in charts[0]
    first, second = (set(re.findall(r' id="([^"]*)"', chart)) for chart in charts)
    assert first
    assert not first & second


def test_a_meter_has_the_length_of_its_value() -> None:
    page = render(report(sections=sections((result("zero_shot", "top1", 0.25),))))
    assert '<rect class="fill" width="25.00"' in page
    assert '<rect class="whisker" x="15.00"' in page


# Confusions


def test_the_worst_mistakes_come_first_and_right_answers_are_none() -> None:
    found = [(each.true, each.predicted, each.count) for each in worst_mistakes(CONFUSIONS, 5)]
    assert found == [("blue circle", "red circle", 2), ("red circle", "red square", 1)]


def test_the_hardest_classes_are_those_of_lowest_recall_that_have_images() -> None:
    assert hardest_classes(CONFUSIONS, 5) == [
        ("blue circle", 1, 3),
        ("red circle", 3, 4),
        ("red square", 4, 4),
    ]


def test_two_word_names_are_also_counted_word_by_word() -> None:
    colours, shapes = by_attribute(CONFUSIONS)
    assert colours.class_names == ("red", "blue")
    assert colours.matrix.tolist() == [[8, 0], [2, 1]]
    assert shapes.matrix.tolist() == [[6, 1], [0, 4]]


@pytest.mark.parametrize(
    "names", [("a b", "a c", "d b", "e c"), ("cat", "a dog", "a cow", "a hen"), ("a b",)]
)
def test_names_that_are_no_grid_of_words_are_not_taken_apart(names: tuple[str, ...]) -> None:
    size = len(names)
    assert by_attribute(Confusions("test", names, np.eye(size, dtype=np.int64))) == []


def test_each_pair_that_occurs_is_one_square() -> None:
    squares = matrix_chart(CONFUSIONS)["squares"]
    kinds = [each["kind"] for each in squares]
    assert (kinds.count("hit"), kinds.count("miss")) == (3, 2)
    assert "blue circle → red circle: 2 of 3" in [each["title"] for each in squares]
    page = render(report())
    assert page.count('class="hit"') == 3 + 2 + 2  # the words apart and together


def test_neighbouring_classes_are_drawn_as_one_where_there_are_too_many() -> None:
    names = tuple(f"class {i}" for i in range(1000))
    chart = matrix_chart(Confusions("test", names, np.eye(1000, dtype=np.int64)))
    assert len(chart["squares"]) == 250
    assert chart["squares"][0]["title"] == "class 0 … class 3 → class 0 … class 3: 4 of 4"


def test_names_of_classes_are_escaped() -> None:
    names = (HOSTILE, "b")
    matrix = Confusions("test", names, np.eye(2, dtype=np.int64))
    found = sections((result("zero_shot", "top1"),), zero_shot=(matrix,))
    assert "<script" not in render(report(sections=found))
    assert confusion_view(matrix)["hardest"][0][0] == HOSTILE
