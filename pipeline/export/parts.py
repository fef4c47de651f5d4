"""What a trained run hands over: its head, its numbers, and the frozen encoders it stands on."""

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from evaluate.results import STAMP, read_evaluation
from features.config import ImageEncoderConfig, TextEncoderConfig
from features.encoders import pretrained
from features.encoders.backends import backend_of
from features.encoders.checkpoint import (
    WEIGHTS,
    EncoderFiles,
    is_on_hub,
    read_settings,
    weights_sha256,
)
from features.errors import EncoderError
from pipeline.card import model_card
from pipeline.python import load_aligned
from pipeline.run.aligned import Aligned

logger = logging.getLogger(__name__)

# Licences that let anyone pass the files on, if the notice goes along; README.md carries it.
FREE_LICENCES = frozenset(
    {
        *("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "isc", "unlicense"),
        *("cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0"),
    }
)
# What describes an encoder, of all that may lie in its folder.
DESCRIPTION = (
    *("config.json", "preprocessor_config.json", "tokenizer*.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.*", "merges.txt", "*.model", "README.md", "LICENSE*", "NOTICE*"),
)
DECIDED = ("pooling", "instruction", "max_length")
"""Settings of a text encoder that its files may have decided; its fingerprint has their values."""
UNUSUAL = ("behind", "layer", "include_prompt", "normalise", "padded", "lower_case", "attention")
"""Facts that a fingerprint has only where an encoder does more than encode, pool and cut."""
Settings = TypeVar("Settings", ImageEncoderConfig, TextEncoderConfig)


@dataclass(frozen=True)
class EncoderPart(Generic[Settings]):
    """A frozen encoder that a head was trained on."""

    name: str
    """Of its column in the stores."""
    settings: Settings
    fingerprint: dict[str, Any]
    """Of the features that the head was trained on."""
    files: EncoderFiles
    on_hub: bool
    with_weights: bool
    """Whether its weights are handed over too, or only what describes it."""

    @property
    def licence(self) -> str | None:
        """Short name of its licence, where that is known."""
        licence: str | None = self.fingerprint.get("licence")
        return licence

    @property
    def model_settings(self) -> dict[str, Any]:
        """Its config.json."""
        return read_settings(self.files.trunk)

    @property
    def unusual(self) -> list[str]:
        """What it does that a plain model with a pooling does not."""
        return [name for name in UNUSUAL if self.fingerprint.get(name) not in (None, -1)]

    def check_copyable(self, what: str) -> None:
        """Check that its weights may be handed over.

        Args:
            what: What would hold them, for the message.

        Raises:
            EncoderError: Its licence is not known to allow that, and nobody asked for it.
        """
        if not self.with_weights:
            raise EncoderError(
                f"{what} holds the weights of {self.settings.model}, whose licence is "
                f"{self.licence or 'not known'}. Leave to copy them was expected. Use "
                f"--with-encoders if you have it."
            )

    def copy_to(self, folder: Path) -> None:
        """Copy its files into a new folder.

        Raises:
            EncoderError: The weights are not those that the head was trained on.
        """
        folder.mkdir()
        root: Path = self.files.folder
        trunk: Path = self.files.trunk
        copied = {path for pattern in DESCRIPTION for path in root.glob(pattern)}
        copied |= {path for name in self.fingerprint.get("files", ()) if (path := root / name)}
        if self.with_weights:
            copied |= {*trunk.glob(WEIGHTS), *trunk.glob(f"{WEIGHTS}.index.json")}
        for path in sorted(each for each in copied if each.is_file()):
            place = folder / path.relative_to(root)
            if path.suffix == ".safetensors" and not self.with_weights:
                continue
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)
        if self.with_weights:
            self._check_weights(folder / trunk.relative_to(root))

    def _check_weights(self, folder: Path) -> None:
        found, expected = weights_sha256(folder), self.fingerprint["weights_sha256"]
        if found != expected:
            raise EncoderError(
                f"The weights in {self.files.folder} have sha256 {found}. Those that the head was "
                f"trained on, {expected}, were expected. Put them back, or extract and align again."
            )


@dataclass(frozen=True)
class Parts:
    """All that can be handed over of a run."""

    aligned: Aligned
    image: EncoderPart[ImageEncoderConfig]
    text: EncoderPart[TextEncoderConfig]
    results: Path | None
    """The results.json of `sail eval`, if it is of this head."""

    def card(self, use: str) -> str:
        """Return the README.md of a folder with the head, which is used as Markdown tells."""
        run = self.aligned.run_config
        return model_card(
            self.aligned.checkpoint,
            use,
            name=run.run.name if run else "aligned",
            base_models=[p.settings.model for p in (self.image, self.text) if p.on_hub],
            results=self.results,
        )


def parts_of(run: Path, *, with_encoders: bool = False) -> Parts:
    """Gather what a trained run hands over. No encoder is loaded.

    Args:
        run: Folder of the run.
        with_encoders: Hand over the weights of the encoders whatever their licence, and also those
            that the hub has. Otherwise those of local and bundled encoders under a free licence.

    Raises:
        ConfigError: There is no run.
        CheckpointError: There is no trained head.
        EncoderError: An encoder is untrained, or its files are not to be found.
    """
    aligned = load_aligned(run, device="cpu")
    aligned.check_single("A folder for other programs holds")
    _, image = aligned.image_settings
    column = image.also.get(str(aligned.checkpoint.image["name"]), image)
    pooling = aligned.checkpoint.image["fingerprint"].get("pooling", column.pooling)
    image = image.model_copy(
        update={"pooling": pooling, "layer": column.layer, "also": {}, "compile": False}
    )
    (_, text), known = aligned.text_settings, aligned.checkpoint.text["fingerprint"]
    decided = {name: known[name] for name in DECIDED if name in known} | {"prompt": None}
    return Parts(
        aligned=aligned,
        image=_part(image, aligned.checkpoint.image, with_encoders),
        text=_part(
            text.model_copy(update=decided),
            aligned.checkpoint.text,
            with_encoders,
        ),
        results=_results(run / "eval" / "results.json", aligned.checkpoint.sha256),
    )


def _part(
    settings: Settings, trained_on: dict[str, Any], everything: bool
) -> EncoderPart[Settings]:
    model, fingerprint = settings.model, trained_on["fingerprint"]
    on_hub = is_on_hub(model)
    with_weights = everything or (not on_hub and fingerprint.get("licence") in FREE_LICENCES)
    revision = fingerprint.get("revision") if on_hub else None
    backend = backend_of(model)
    files = backend.find(model, revision, weights=with_weights)
    if files is None or backend is not pretrained:
        which = "has no files" if files is None else "is no model of transformers"
        raise EncoderError(
            f"The head was trained on {model}, which {which}. An encoder that transformers loads "
            f"was expected, to be handed over. Train a head on another encoder."
        )
    if not with_weights and not on_hub:
        logger.warning(
            "The weights of %s stay here: their licence is %s. The folder says which they are. Use "
            "--with-encoders if you may pass them on.",
            model,
            fingerprint.get("licence") or "not known",
        )
    return EncoderPart(str(trained_on["name"]), settings, fingerprint, files, on_hub, with_weights)


def _results(path: Path, checkpoint_sha256: str) -> Path | None:
    if not (path.exists() or (path.parent / STAMP).exists()):  # which is written last
        return None
    if read_evaluation(path).checkpoint_sha256 != checkpoint_sha256:
        logger.warning("%s is of another head: the numbers are left out. Use `sail eval`.", path)
        return None
    return path
