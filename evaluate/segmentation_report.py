"""What the report shows of segmented data sets."""

from collections.abc import Sequence
from dataclasses import dataclass

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
