"""results.json: every number of an evaluation, with what could change it."""

import hashlib
import io
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from features.errors import EvaluationError
from features.storage.files import write, write_json
from features.storage.reading import Expected, read_json, read_npz

EXPECTED = Expected(
    "What `sail eval` wrote", "Delete it, and run `sail eval` again.", EvaluationError
)
logger = logging.getLogger(__name__)
SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Result:
    """One number."""

    task: str
    """`retrieval/image_to_text`, `zero_shot`, `knn/image_features`, `compositional`, …"""
    dataset: str
    """Split, and behind a slash which part of it."""
    metric: str
    """`recall@1`, `top1`, `knn_top1`, `group_score`, …"""
    value: float
    """Fraction in [0, 1] (correlations in [-1, 1])."""
    n: int
    """Test items it was measured on."""
    ci95: tuple[float, float] | None
    """95 % interval: by bootstrap over these items, but of alignment by halves of them."""
    encoders: dict[str, str | None]
    """Names of the `image` and `text` encoder."""
    protocol: dict[str, Any] = field(default_factory=dict)
    """What could change the number: k, temperature, templates, tie rule; and its chance value."""

    @property
    def split(self) -> str:
        """The split that `dataset` is or is a part of."""
        return self.dataset.partition("/")[0]

    @property
    def name(self) -> str:
        """Identity of a number across runs: without the trained encoders, so heads compare."""
        parts = [self.task, self.dataset, self.metric]
        if self.encoders["text"] is None and self.encoders["image"] is not None:
            parts.append(self.encoders["image"])  # frozen features: the encoder is what is measured
        if self.metric == "knn_top1":
            parts.append(f"k={self.protocol['k']}")
        if "score" in self.protocol:
            parts.append(self.protocol["score"])
        return " ".join(parts)

    @property
    def is_detail(self) -> bool:
        """Whether it is of a single class (IoU, AP): overviews and comparisons leave it out."""
        return self.metric in ("iou", "ap")

    @property
    def chance(self) -> float | None:
        """What guessing would score, where that is known."""
        value = self.protocol.get("chance")
        return None if value is None else float(value)


def write_results(
    path: Path, *, run: str, checkpoint_sha256: str, results: Sequence[Result]
) -> None:
    """Write results.json: whole, or not at all."""
    document = {
        "schema": SCHEMA,
        "run": run,
        "checkpoint_sha256": checkpoint_sha256,
        "results": [asdict(result) for result in results],
    }
    write_json(path, document, allow_nan=False)


@dataclass(frozen=True)
class Evaluation:
    """What a results.json says."""

    run: str
    checkpoint_sha256: str
    results: list[Result]


def read_evaluation(path: Path) -> Evaluation:
    """Read a results.json.

    Raises:
        EvaluationError: It is missing, damaged, or not the one that the evaluation wrote.
    """
    _check_written(path)
    evaluation: Evaluation = read_json(path, Evaluation, EXPECTED)
    return evaluation


def read_results(path: Path) -> list[Result]:
    """Read the numbers of a results.json; raises what `read_evaluation` does."""
    return read_evaluation(path).results


STAMP = "inputs.sha256"


def write_stamp(folder: Path, inputs: str, names: Iterable[str]) -> None:
    """Write down what the files of an evaluation were made of, and their hashes.

    Args:
        folder: Of the files.
        inputs: Hash of everything that they depend on.
        names: Of the files.
    """
    hashes = {"inputs": inputs} | {name: sha256_of(folder / name) for name in names}
    write_json(folder / STAMP, hashes)


def read_stamp(folder: Path) -> dict[str, str]:
    """Return what `write_stamp` wrote; nothing where that is missing or damaged."""
    try:
        hashes: dict[str, str] = read_json(folder / STAMP, dict[str, str], EXPECTED)
    except EvaluationError:
        return {}
    return hashes


def sha256_of(path: Path) -> str | None:
    """Return the hash of a file, None where there is none."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_written(path: Path) -> None:
    """Refuse a file that is not as the evaluation wrote it, where that is known."""
    known = read_stamp(path.parent).get(path.name)
    if known is not None and (found := sha256_of(path)) not in (None, known):
        raise EXPECTED.refusal(path, f"its sha256 is {found}, and was {known} when it was written")


PARTS = ("hits", "counts", "classes", "taken", "rows")


@dataclass(frozen=True)
class Items:
    """The items of one number, in the order of the rows of the store.

    The number is Σ hits / Σ counts, or where there are classes, the mean of that over the classes.
    """

    hits: Int[np.ndarray, "items"]
    """What each item got right: 0 or 1, or of an image with several captions how many."""
    counts: Int[np.ndarray, "items"] | None = None
    """Out of how many; 1 each if not given."""
    classes: Int[np.ndarray, "items"] | None = None
    """The class of each, where the number is a mean over classes."""
    taken: Int[np.ndarray, "items"] | None = None
    """The class that each was taken for, where images are classified."""
    rows: Int[np.ndarray, "items each"] | None = None
    """The rows of the store that each is about: one, or the two of a group."""

    @property
    def out_of(self) -> Int[np.ndarray, "items"]:
        """The counts, also where they are 1 each."""
        return np.ones_like(self.hits) if self.counts is None else self.counts


def rows_sha256(keys_sha256: str, rows: Int[np.ndarray, "items each"]) -> str:
    """Return the hash that stands in a protocol for the rows of a store that a number is about."""
    digest = hashlib.sha256(keys_sha256.encode())
    digest.update(np.ascontiguousarray(rows, dtype="<i8").tobytes())
    return digest.hexdigest()


@dataclass
class Findings:
    """What a measure found on a split."""

    results: list[Result] = field(default_factory=list)
    items: dict[str, Items] = field(default_factory=dict)
    """By the name of a result that is a sum over items: what each item scored."""
    exhibits: list[Any] = field(default_factory=list)
    """What the measure's template shows beside the numbers: examples, matrices, pictures."""
    notes: list[str] = field(default_factory=list)
    """What a reader of the report must know."""

    def note(self, text: str) -> None:
        """Say something in the log and in the report."""
        logger.info("%s", text)
        self.notes.append(text)

    def add(self, result: Result, items: Items | None = None, keys_sha256: str = "") -> None:
        """Keep a number, and what each item scored.

        Args:
            result: The number.
            items: What it is the sum over; None where it is none.
            keys_sha256: Of the store whose rows the items are about; the protocol says which.
        """
        if items is not None:
            if items.rows is not None:
                digest = rows_sha256(keys_sha256, items.rows)
                result = replace(result, protocol=result.protocol | {"rows_sha256": digest})
            self.items[result.name] = items
        self.results.append(result)


def write_items(path: Path, items: Mapping[str, Items]) -> None:
    """Write the items of all numbers, each under the name of its result: whole, or not at all.

    The file is a NumPy archive of int32 arrays, `NAME.hits`, `NAME.rows` and where the number needs
    them `NAME.counts`, `NAME.classes` and `NAME.taken`.
    """
    arrays = {
        f"{name}.{part}": getattr(each, part).astype(np.int32)
        for name, each in items.items()
        for part in PARTS
        if getattr(each, part) is not None
    }
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write(path, buffer.getvalue())


def read_items(path: Path) -> dict[str, Items]:
    """Read what `write_items` wrote; nothing where there is no such file.

    Raises:
        EvaluationError: It is damaged, or missing or another than what the evaluation wrote.
    """
    if not path.exists():
        if path.name in read_stamp(path.parent):
            raise EXPECTED.refusal(path, "it is missing, and the evaluation wrote it")
        return {}
    _check_written(path)
    arrays = read_npz(path, EXPECTED)
    for name, values in arrays.items():
        number, _, part = name.rpartition(".")
        hits = arrays.get(f"{number}.hits", np.empty(0))
        if part not in PARTS or values.dtype != np.int32 or len(values) != len(hits):
            why = f"{name!r} is {values.dtype} of shape {values.shape}"
            raise EXPECTED.refusal(path, why)
    names = [name.removesuffix(".hits") for name in arrays if name.endswith(".hits")]
    return {
        name: Items(arrays[f"{name}.hits"], *(arrays.get(f"{name}.{part}") for part in PARTS[1:]))
        for name in names
    }
