"""Checkpoints of the head: written whole or not at all, and loaded without running any code.

    run_dir/last, run_dir/best       symbolic links into `checkpoints`, replaced atomically
    run_dir/checkpoints/step-00000120/
        model.safetensors            the weights of both heads, scale and bias
        config.json                  everything needed to build and to judge them
        state.safetensors            what else training goes on from; only in the last one

A folder gets its name after all its files are on the disk, and a link moves after the folder it
points to, so that a run killed at any moment leaves what it had.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import BaseModel, Field, NonNegativeInt, PositiveInt, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from align.config import HeadConfig, LossConfig, OptimizerConfig
from align.heads import HEADS, AlignmentModel, build_model
from features.errors import CheckpointError, ConfigError, remedy_of
from features.storage.files import write_json
from features.storage.fingerprint import RECORDED_ONLY, differences
from features.storage.joined_column import BESIDE
from features.storage.reading import (
    Expected,
    check_regular,
    checked,
    read_json,
    read_safetensors,
    reading,
)
from features.storage.synchronise import make_folder, synchronise, synchronise_all

FORMAT = "sail-head"
FORMAT_VERSION = 1
HINTS = {
    "store.rows": "The store grew, or is another. To train on all of them and keep this head, "
    "set `run.features` of another run to this one. ",
    "fields": "To go on with the same captions, name them in `align.fields`. ",
}
MAY_DIFFER = {*RECORDED_ONLY, "checkpoint_every"}  # from a run to the one that goes on from it
REMEDY = "Delete the folder of this training and run `sail align` again."
ATTEMPTS = 10
MODEL, STATE, CONFIG = "model.safetensors", "state.safetensors", "config.json"
Result = TypeVar("Result")
Length = Annotated[int, Field(gt=0, le=1 << 24)]
EXPECTED = Expected("A whole checkpoint", REMEDY, CheckpointError)
NOT_DESCRIBED = ("sha256", "exported")


class _Encoder(BaseModel):
    name: str
    dim: Length
    fingerprint: dict[str, Any]
    dims: dict[str, Length] | None = None

    @model_validator(mode="after")
    def _columns_add_up(self) -> "_Encoder":
        if self.dims is not None:
            names = self.name.split(BESIDE)
            known = [fp for fp in self.fingerprint.values() if isinstance(fp, dict)]
            if not (
                len(known) == len(names)
                and set(names) == set(self.dims) == set(self.fingerprint)
                and sum(self.dims.values()) == self.dim
            ):
                raise ValueError(f"its columns {self.name!r} are not those of its dims {self.dims}")
        return self


class _Align(BaseModel):
    head: dict[str, Any]
    loss: LossConfig
    optimizer: OptimizerConfig
    batch_size: PositiveInt


class _Rows(BaseModel):
    rows: PositiveInt


class _Run(BaseModel):
    align: _Align
    image: _Encoder
    text: _Encoder
    store: _Rows
    seed: int
    fields: list[str]


class _Metadata(BaseModel):
    """What every reader of a checkpoint relies on."""

    step: NonNegativeInt
    epoch: float
    finished: bool
    heldout: dict[str, float]
    best_step: NonNegativeInt
    run: _Run
    sha256: dict[str, str] = {}


@dataclass(frozen=True)
class Checkpoint:
    """What config.json says about a checkpoint."""

    path: Path
    """The folder itself, links resolved."""
    metadata: dict[str, Any]
    """config.json: step, epoch, finished, heldout, and under `run` what the training was given."""

    @classmethod
    def open(cls, path: Path) -> "Checkpoint":
        """Read the description of a checkpoint.

        Raises:
            CheckpointError: There is none, or it is damaged or of another format.
        """
        folder = Path(os.path.realpath(path))  # which takes links that lead in a circle too
        try:
            return cls(folder, _described(path, folder))
        except CheckpointError:
            if Path(os.path.realpath(path)) == folder:
                raise
        return cls.open(path)  # training has put another one there

    @property
    def step(self) -> int:
        """Updates that were made."""
        return int(self.metadata["step"])

    @property
    def run(self) -> dict[str, Any]:
        """What the training was given: `align`, `seed`, `image`, `text`, `store`."""
        run: dict[str, Any] = self.metadata["run"]
        return run

    @property
    def head(self) -> HeadConfig:
        """The network of both modalities.

        Raises:
            CheckpointError: This version has no such kind, or no such setting.
        """
        settings = self.run["align"]["head"]
        try:
            return HeadConfig.model_validate(settings)
        except ValidationError as error:
            raise CheckpointError(
                f"{self.path / CONFIG} has the head {settings!r}, of which this version cannot "
                f"take {error.errors()[0]['loc'][0]!r}. One of the kinds "
                f"{list(HEADS)} with its settings was expected. Use the version that trained it."
            ) from error

    @property
    def image(self) -> dict[str, Any]:
        """The image encoder: `name`, `dim`, `fingerprint`; of several columns see `columns`."""
        encoder: dict[str, Any] = self.run["image"]
        return encoder

    @property
    def text(self) -> dict[str, Any]:
        """The text encoder: `name`, `dim`, `fingerprint`."""
        encoder: dict[str, Any] = self.run["text"]
        return encoder

    def columns(self, kind: Literal["image", "text"]) -> list[dict[str, Any]]:
        """Return what each column that a head reads is of: `name`, `dim`, `fingerprint`."""
        return columns_of(self.run[kind])

    @property
    def heldout(self) -> dict[str, float]:
        """Scores on the held-out rows, empty where none were taken at this step."""
        scores: dict[str, float] = self.metadata["heldout"]
        return scores

    @cached_property
    def sha256(self) -> str:
        """Hash of the weights.

        Raises:
            CheckpointError: They are missing, or not those that were written.
        """
        return self._checked_sha256(MODEL)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of one of its files.

        Raises:
            CheckpointError: It is missing, damaged, or not the one that was written.
        """
        _ = self.sha256 if name == MODEL else self._checked_sha256(name)
        return read_tensors(self.path / name)

    def _checked_sha256(self, name: str) -> str:
        path = self.path / name
        with reading(path, EXPECTED), check_regular(path).open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        written = self.metadata.get("sha256", {}).get(name, found)
        if found != written:
            why = f"its sha256 is {found}, and was {written} when it was written"
            raise EXPECTED.refusal(path, why)
        return found


def _described(path: Path, folder: Path) -> dict[str, Any]:
    """Return what config.json of a folder says, which was opened under a path."""
    if not (folder / CONFIG).exists():
        raise CheckpointError(
            f"There is no checkpoint at {path}. A folder with {CONFIG} was expected. "
            f"Train one with `sail align`."
        )
    metadata: dict[str, Any] = read_json(folder / CONFIG, dict[str, Any], EXPECTED)
    found = (metadata.get("format"), metadata.get("format_version"))
    if found != (FORMAT, FORMAT_VERSION):
        raise CheckpointError(
            f"{path} has format {found[0]!r}, version {found[1]!r}. {FORMAT!r}, version "
            f"{FORMAT_VERSION}, was expected. Check the path, or train again."
        )
    known = checked(metadata, _Metadata, folder / CONFIG, EXPECTED).sha256.get(CONFIG)
    if known is not None and known != _described_sha256(metadata):
        why = "what it says does not have the sha256 that stands in it"
        raise EXPECTED.refusal(folder / CONFIG, why)
    return metadata


def load_head(path: Path, device: torch.device | str = "cpu") -> tuple[AlignmentModel, Checkpoint]:
    """Load a trained head, ready to embed (no dropout, no gradients).

    Args:
        path: Folder of a checkpoint, such as `runs/demo/align/best`.
        device: Where to put the weights.

    Raises:
        CheckpointError: There is no whole checkpoint at `path`, or its weights are of another head.
    """

    def load(checkpoint: Checkpoint) -> tuple[AlignmentModel, Checkpoint]:
        model = build_described(checkpoint.run, checkpoint.head)
        load_weights(model, checkpoint)  # from here on its sha256 is known, and files may go
        return model.requires_grad_(False).eval().to(device), checkpoint

    return read_checkpoint(path, load)


def read_checkpoint(path: Path, read: Callable[[Checkpoint], Result]) -> Result:
    """Read files of a checkpoint; again where training puts another one there meanwhile.

    Args:
        path: Its folder, or a link to it such as `runs/demo/align/best`.
        read: Is given the checkpoint.

    Raises:
        CheckpointError: There is none, it is damaged, or it is replaced all the time.
    """
    for _ in range(ATTEMPTS):
        checkpoint = Checkpoint.open(path)
        try:
            return read(checkpoint)
        except (CheckpointError, OSError):
            if Path(os.path.realpath(path)) == checkpoint.path:
                raise
    raise CheckpointError(
        f"{path} was replaced {ATTEMPTS} times while it was read. One that training leaves there "
        f"for a while was expected. Wait for the training, or raise align.checkpoint_every."
    )


def build_described(run: dict[str, Any], head: HeadConfig) -> AlignmentModel:
    """Build the model of a training, with random weights.

    Args:
        run: The description of the training, as `Checkpoint.run`.
        head: The network of both modalities.

    Raises:
        ConfigError: The head does not fit the features.
    """
    try:
        return build_model(
            dict(head),
            image_dim=[each["dim"] for each in columns_of(run["image"])],
            text_dim=[each["dim"] for each in columns_of(run["text"])],
            initial_scale=run["align"]["loss"]["initial_scale"],
            initial_bias=run["align"]["loss"]["initial_bias"],
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


def columns_of(encoder: dict[str, Any]) -> list[dict[str, Any]]:
    """Return `name`, `dim` and `fingerprint` of each column that stands under one description."""
    if (dims := encoder.get("dims")) is None:
        return [encoder]
    names = encoder["name"].split(BESIDE)
    known = encoder["fingerprint"]
    return [{"name": name, "dim": dims[name], "fingerprint": known[name]} for name in names]


def facts_of(encoder: dict[str, Any]) -> dict[str, Any]:
    """Return the fingerprint of an encoder to show; where columns differ, all values."""
    every = [each["fingerprint"] for each in columns_of(encoder)]
    facts = {}
    for key in {key: None for each in every for key in each}:
        values = [each.get(key) for each in every]
        same = all(value == values[0] for value in values)
        facts[key] = values[0] if same else f" {BESIDE} ".join(map(str, values))
    return facts


def load_weights(model: AlignmentModel, checkpoint: Checkpoint) -> None:
    """Put the weights of a checkpoint into a model of the same form.

    Raises:
        CheckpointError: The file is missing or damaged, or has other weights.
    """
    tensors = checkpoint.tensors(MODEL)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != expected:
        name = min(name for name in found | expected if found.get(name) != expected.get(name))
        raise CheckpointError(
            f"{checkpoint.path / MODEL} has {name} of shape {found.get(name)}, but the head in its "
            f"{CONFIG} has {expected.get(name)}. {REMEDY}"
        )
    model.load_state_dict(tensors)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file into memory.

    Raises:
        CheckpointError: It is missing or damaged.
    """
    return read_safetensors(path, EXPECTED)


@dataclass(frozen=True)
class Snapshot:
    """Weights at a step, with what config.json is to say about them."""

    step: int
    weights: dict[str, Tensor]
    metadata: dict[str, Any]


class CheckpointFolder:
    """The checkpoints of one run: the last one, and the best one."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.last = run_dir / "last"
        self.best = run_dir / "best"
        self._steps = run_dir / "checkpoints"

    def resume(self, run: dict[str, Any]) -> Checkpoint | None:
        """Return the last checkpoint, or None; finish or undo what a killed run left half done.

        Args:
            run: What this training is given; that of the checkpoint must be equal.

        Raises:
            CheckpointError: The checkpoint is of a training with other settings or features.
        """
        make_folder(self._steps)
        if not self.last.is_symlink():
            self._clean()
            return None
        checkpoint = Checkpoint.open(self.last)
        differing = differences(_with_new_settings(checkpoint.run), run, without=MAY_DIFFER)
        # What says most comes first: settings that were not given follow from the rows.
        first = ["imported", "store.rows"]
        differing.sort(key=lambda each: first.index(each[0]) if each[0] in first else len(first))
        differing.sort(key=lambda each: each[0] == "store.keys_sha256")
        for name, found, expected in differing:
            raise CheckpointError(
                f"{self.last} was trained with {name} = {found!r}, but this run has {expected!r}. "
                f"Equal settings were expected, to go on from it. {HINTS.get(name, '')}Give this "
                f"run another `run.dir`, or delete {self.run_dir} to train anew."
            )
        self._point(self.best, checkpoint.metadata["best_step"])
        self._clean()
        return checkpoint

    def save(self, snapshot: Snapshot, state: dict[str, Tensor], best: Snapshot | None) -> None:
        """Write the last checkpoint, and the best one if it is new, and remove the ones before.

        Args:
            snapshot: The last weights; its metadata names the step of the best ones.
            state: What else the next update depends on.
            best: The best weights, if they are not on disk yet.

        Raises:
            CheckpointError: It cannot be written; the one before is whole.
        """
        if best is not None and best.step != snapshot.step:
            self._write(best, None)
        self._write(snapshot, state)
        self._point(self.last, snapshot.step)  # from here on the new one counts
        self._point(self.best, snapshot.metadata["best_step"])
        self._clean()

    def _write(self, snapshot: Snapshot, state: dict[str, Tensor] | None) -> None:
        partial = self._steps / ".partial"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            self._write_files(partial, snapshot, state)
        except (SafetensorError, OSError) as error:
            shutil.rmtree(partial, ignore_errors=True)  # gives back what room it took
            size = sum(
                each.nbytes for each in [*snapshot.weights.values(), *(state or {}).values()]
            )
            kept = f"The last one, {self.last.resolve()}, is whole. " if self.last.exists() else ""
            raise CheckpointError(
                f"The checkpoint of step {snapshot.step} cannot be written in {self._steps}: "
                f"{error}. A place that can be written, with room for {size / 1e6:,.1f} MB, was "
                f"expected. {kept}{remedy_of(error)}, and run `sail align` again: it goes on from "
                f"there."
            ) from error
        target = self._folder(snapshot.step)
        shutil.rmtree(target, ignore_errors=True)  # nothing points to it: see `resume`
        partial.rename(target)
        synchronise(self._steps)

    def _write_files(
        self, partial: Path, snapshot: Snapshot, state: dict[str, Tensor] | None
    ) -> None:
        partial.mkdir()
        save_file(snapshot.weights, partial / MODEL)
        if state is not None:
            save_file(state, partial / STATE)
        metadata = {"format": FORMAT, "format_version": FORMAT_VERSION, **snapshot.metadata}
        hashes = {CONFIG: _described_sha256(metadata)}
        for path in partial.iterdir():
            with path.open("rb") as file:
                hashes[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
        write_json(partial / CONFIG, metadata | {"sha256": hashes})
        synchronise_all(partial)

    def _point(self, link: Path, step: int) -> None:
        target = self._folder(step).relative_to(self.run_dir)
        if link.is_symlink() and link.readlink() == target:
            return
        partial = link.with_name(f".{link.name}.partial")
        partial.unlink(missing_ok=True)
        partial.symlink_to(target, target_is_directory=True)
        partial.replace(link)
        synchronise(self.run_dir)

    def _clean(self) -> None:
        """Remove every folder but those pointed to, and the state of one that is only the best."""
        last, best = (os.path.realpath(link) for link in (self.last, self.best))
        for path in self._steps.iterdir():
            if os.path.realpath(path) not in (last, best):
                shutil.rmtree(path)
        if best != last and (self.best / STATE).exists():
            (self.best / STATE).unlink()

    def _folder(self, step: int) -> Path:
        return self._steps / f"step-{step:08d}"


def _with_new_settings(run: dict[str, Any]) -> dict[str, Any]:
    """Return the description of a training with what earlier versions did not have."""
    align = {"start": "random", **run["align"]}
    align["head"] = {"shortcut": False, **align["head"]}
    return {**run, "align": align}


def _described_sha256(metadata: dict[str, Any]) -> str:
    """Return the hash of what a checkpoint says of itself, but for what an export adds."""
    described = {name: value for name, value in metadata.items() if name not in NOT_DESCRIBED}
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
