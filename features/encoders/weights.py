"""Loads the weights of a model of transformers, and refuses those that are not whole or not its.

What other libraries raise on the way becomes one `EncoderError`.
"""

import json
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import logging as transformers_log

from features.encoders.checkpoint import WEIGHTS, first_line, read_json, read_settings
from features.errors import EncoderError, SailError

logger = logging.getLogger(__name__)
ADAPTER = "adapter_config.json"
POINTER = b"version https://git-lfs"
HEADER_BYTES = 8
MOST_HEADER_BYTES = 100_000_000
FLOAT16_MAX = float(torch.finfo(torch.float16).max)


@contextmanager
def fenced(what: str, way_out: str) -> Iterator[None]:
    """Turn whatever a library raises into one `EncoderError`; ours, and memory, pass.

    Args:
        what: What was being done, such as `The encoder x of type bert cannot be loaded`.
        way_out: What to do about it.
    """
    try:
        yield
    except (SailError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise EncoderError(f"{what}: {_reason(error)} {way_out}") from error


def check_files(folder: Path, weights: str = WEIGHTS) -> None:
    """Check the files of a checkpoint before anything is loaded: cheap, whatever their size.

    Args:
        folder: Where they are, with the config.json of the model if it has one.
        weights: Which of its files hold the weights.

    Raises:
        EncoderError: A weight file is a pointer, is cut short or missing; the weights are
            quantised; or an adapter lies beside them.
    """
    settings = read_settings(folder) if (folder / "config.json").is_file() else {}
    if quantised := settings.get("quantization_config"):
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise EncoderError(
            f"The weights in {folder} are quantised ({method}). Weights in float32, float16 or "
            f"bfloat16 were expected, which every machine reads alike. Choose the repository that "
            f"they were quantised from."
        )
    if (folder / ADAPTER).is_file():
        kind = read_json(folder / ADAPTER).get("peft_type")
        raise EncoderError(
            f"{folder / ADAPTER} says that an adapter ({kind}) belongs to the weights, and whether "
            f"they hold it already is not known. Weights alone were expected. Choose a checkpoint "
            f"with both in one (`merge_and_unload` of the package peft writes it), or move the "
            f"adapter away to use the weights without it."
        )
    for path in sorted(folder.glob(weights)):
        check_whole(path)
    for index in sorted(folder.glob(f"{weights}.index.json")):
        named = set(read_json(index).get("weight_map", {}).values())
        if missing := sorted(name for name in named if not (folder / name).is_file()):
            raise EncoderError(
                f"{index} names {len(named)} weight files, of which {len(missing)} are missing, "
                f"such as {missing[0]}. All were expected. Fetch them from where the others came "
                f"from."
            )


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
        EncoderError: Weights are missing, of another shape, not finite, or those of an adapter;
            transformers would fill them with random numbers, or leave them out.
    """
    check_files(folder)
    transformers_log.set_verbosity_error()  # what is missing is told by our own error, below
    transformers_log.disable_progress_bar()
    model_type = read_settings(folder).get("model_type")

    def load(**mapping: Any) -> Any:
        with fenced(
            f"The encoder in {folder} (type {model_type}) cannot be loaded",
            "A checkpoint of a model that transformers has was expected. Choose another model or "
            "revision.",
        ):
            return model_class.from_pretrained(
                folder,
                dtype=dtype,
                output_loading_info=True,
                trust_remote_code=False,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # so that all are named, below
                **mapping,
                **options,
            )

    model, info = load()
    missing = _missing(info, optional)
    if missing and (prefix := _prefix(missing, info["unexpected_keys"])):
        logger.info("%s: the weights are read without their prefix %r", folder, prefix)
        model, info = load(key_mapping={f"^{re.escape(prefix)}": ""})
        missing = _missing(info, optional)
    _check_fit(folder, model, info, missing)
    weights = model.state_dict()
    for key in info["missing_keys"]:  # not used, and random: copies of the model would differ
        if key in weights:
            weights[key].zero_()
    check_finite(folder, model)
    return model.eval().requires_grad_(False)


def check_finite(folder: Path, model: nn.Module) -> None:
    """Check that no weight is NaN or infinite.

    Raises:
        EncoderError: The first one is named.
    """
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and not bool(torch.isfinite(weight).all()):
            raise EncoderError(
                f"The weight {name!r} in {folder} is not finite (NaN or infinity). Finite numbers "
                f"were expected. Fetch the weights again, or choose another revision; in float16 "
                f"weights can overflow: set precision = 'float32' or 'bfloat16'."
            )


def check_storable(what: str, features: torch.Tensor) -> None:
    """Check that features of a trial are numbers that a column can hold.

    Raises:
        EncoderError: They are not finite, or greater than float16 holds.
    """
    if not bool(torch.isfinite(features).all()):
        raise EncoderError(
            f"The features of {what} are not finite (NaN or infinity) on a trial input. Finite "
            f"numbers were expected. Set precision = 'float32', or choose another checkpoint."
        )
    if (largest := float(features.abs().max())) > FLOAT16_MAX:
        raise EncoderError(
            f"The features of {what} reach {largest:,.0f} on a trial input, and a column holds "
            f"float16, up to {FLOAT16_MAX:.0f}. Smaller ones were expected. Choose another layer "
            f"or pooling."
        )


def check_whole(path: Path) -> None:
    """Check by its header that a safetensors file is whole.

    Raises:
        EncoderError: It is not, or it is a pointer of Git LFS.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(len(POINTER))
        if start == POINTER:
            raise EncoderError(
                f"{path} is a pointer of Git LFS ({size} bytes), not the weights. The file itself "
                f"was expected. Fetch it with `git lfs pull`, or download it from the hub."
            )
        file.seek(0)
        length = int.from_bytes(file.read(HEADER_BYTES), "little")
        if size < HEADER_BYTES or not 0 < length <= min(MOST_HEADER_BYTES, size - HEADER_BYTES):
            _raise_broken(path, size, "has no header of safetensors")
        try:
            header = json.loads(file.read(length))
            ends = [each["data_offsets"][1] for name, each in header.items() if name[:2] != "__"]
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            _raise_broken(path, size, "has a damaged header")
    expected = HEADER_BYTES + length + max(ends, default=0)
    if size != expected:
        _raise_broken(path, size, f"should have {expected} by its header")


def _raise_broken(path: Path, size: int, why: str) -> None:
    raise EncoderError(
        f"{path} has {size} bytes and {why}. A whole safetensors file was expected. Fetch it again "
        f"from where the weights came from."
    )


def _missing(info: dict[str, Any], optional: str) -> list[str]:
    return sorted(key for key in info["missing_keys"] if not re.search(optional, key))


def _prefix(missing: list[str], unexpected: Any) -> str | None:
    """Return what stands before the name of every missing weight in the file."""
    for name in unexpected:
        if name.endswith(f".{missing[0]}"):
            prefix: str = name.removesuffix(missing[0])
            return prefix if all(prefix + key in unexpected for key in missing) else None
    return None


def _check_fit(folder: Path, model: nn.Module, info: dict[str, Any], missing: list[str]) -> None:
    kind = type(model).__name__
    if mismatched := sorted(info["mismatched_keys"]):
        name, found, expected = mismatched[0]
        raise EncoderError(
            f"{len(mismatched)} weights in {folder} have not the shapes of {kind} by its "
            f"config.json, such as {name!r}: {tuple(found)}, where {tuple(expected)} was expected. "
            f"Fetch both from the same revision."
        )
    if missing:
        raise EncoderError(
            f"The checkpoint in {folder} lacks {len(missing)} weights of {kind}, such as "
            f"{missing[0]!r}{_instead(info['unexpected_keys'])}. All were expected: the rest would "
            f"be random numbers. Choose a checkpoint of this model, or another pooling."
        )
    if adapters := sorted(key for key in info["unexpected_keys"] if "lora_" in key):
        raise EncoderError(
            f"The checkpoint in {folder} holds {len(adapters)} weights of an adapter, such as "
            f"{adapters[0]!r}, which {kind} would leave out. Weights of the model alone were "
            f"expected. Choose a checkpoint with both in one (`merge_and_unload` of the package "
            f"peft writes it)."
        )


def _instead(unexpected: Any) -> str:
    names = sorted(unexpected)
    return f" (it has {len(names)} that are not used, such as {names[0]!r})" if names else ""


def _reason(error: Exception) -> str:
    words = first_line(error)
    return words if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: {words}"


def try_once(what: str, way_out: str, encode: Callable[[], list[torch.Tensor]]) -> None:
    """Run an encoder on a trial input, and check what comes out.

    Raises:
        EncoderError: It cannot be run, or its features cannot be stored.
    """
    with fenced(what, way_out):
        outputs = encode()
    for features in outputs:
        check_storable(what, features)
