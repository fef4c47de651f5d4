"""Encoders that are functions of the user's own: `python:package.module:function`.

The module is imported because the run file names it; nothing else leads here. What a function must
have and give is in docs/encoders.md.
"""

import functools
import hashlib
import importlib
import importlib.util
import inspect
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Float32, Num
from PIL import Image
from torch import Tensor, nn

from features.config import OWN, ImageColumnConfig, ImageEncoderConfig, TextEncoderConfig
from features.encoders.checkpoint import EncoderFiles
from features.encoders.libraries import check_only
from features.encoders.packing import TokenBatch, Tokens
from features.encoders.plan import Decision, EncoderPlan, PlanBuilder
from features.encoders.text import TextEncoder, batch_budget
from features.encoders.weights import fenced
from features.errors import EncoderError

IMAGES = "`python:package.module:function` (your own function of pictures)"
TEXTS = "`python:package.module:function` (your own function of captions)"
WAY_OUT = (
    "A function with a `version`, of a list of pictures or of captions, that returns an array "
    "(items, dim) was expected. Correct it."
)
TRIAL = (64, 48)
MOST_BYTES = 4096


def find(model: str, revision: str | None, *, weights: bool = True) -> EncoderFiles | None:  # noqa: ARG001
    """Return None: only the function knows of files."""
    return None


def is_here(model: str, revision: str | None) -> bool:  # noqa: ARG001
    """Return True: whether it can be imported is seen when it is tried."""
    return True


def missing(model: str) -> tuple[bool, str, str]:
    """Never asked."""
    return False, f"{model} is not here", ""


@dataclass(frozen=True)
class OwnFunction:
    """A function, its version, and the file that it is in."""

    name: str
    call: Callable[[Any], Any]
    version: str
    file: Path

    def vectors(self, inputs: Any, count: int) -> Float32[Tensor, "inputs dim"]:
        """Call the function.

        Raises:
            EncoderError: It fails, or gives something other than one vector for each input.
        """
        with fenced(f"{self.name} fails", WAY_OUT):
            result = self.call(inputs)
            found = result if torch.is_tensor(result) else torch.from_numpy(np.asarray(result))
        if found.ndim != 2 or len(found) != count or found.shape[1] == 0 or found.is_complex():
            raise EncoderError(
                f"{self.name} gives {found.dtype} of shape {tuple(found.shape)} for {count} "
                f"inputs. Numbers of shape ({count}, dim) were expected. Correct it."
            )
        return found.float()


def own_function(model: str) -> OwnFunction:
    """Import a function.

    Args:
        model: `python:`, a module or the path of a file, `:` and the name of the function.

    Raises:
        EncoderError: It cannot be imported, is no function, or says no version.
    """
    place, _, name = model.removeprefix(OWN).rpartition(":")
    if not place or not name:
        raise EncoderError(
            f"model is {model!r}. `python:package.module:function` was expected. Correct it."
        )
    with fenced(f"{model} cannot be imported", "A module that Python finds was expected."):
        module = _module(place)
        function = functools.reduce(getattr, name.split("."), module)
    version = getattr(function, "version", None)
    if not callable(function) or not isinstance(version, str) or not version:
        raise EncoderError(
            f"{model} is {type(function).__name__} with the version {version!r}. A function with a "
            f"version was expected, since only that tells when its vectors change. Write "
            f"{name}.version = '1' behind it, and another when it changes."
        )
    file = inspect.getsourcefile(module)
    if file is None:
        raise EncoderError(
            f"The module of {model} has no file. One in Python was expected, whose sha256 is "
            f"recorded. Write a module that calls it."
        )
    called = f"{OWN}{Path(place).stem if place.endswith('.py') else place}:{name}"
    return OwnFunction(called, function, version, Path(file))


@functools.cache
def _module(place: str) -> ModuleType:
    """Import a module by its name, or by its file, beside which it finds others."""
    if not place.endswith(".py"):
        return importlib.import_module(place)
    path = Path(place).expanduser().resolve()
    called = f"sail_own_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}_{path.stem}"
    spec = importlib.util.spec_from_file_location(called, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no module")
    module = importlib.util.module_from_spec(spec)
    sys.modules[called] = module
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[called]
        raise
    return module


def resolve(config: ImageEncoderConfig | TextEncoderConfig) -> EncoderPlan:
    """Say how a function is used.

    Raises:
        EncoderError: It cannot be imported, says no version, or the recipe asks for more than it.
    """
    made, source = PlanBuilder(), Decision("its own", "the function")
    if isinstance(config, ImageEncoderConfig):
        columns: dict[str, ImageColumnConfig] = {"pooling": config}
        columns |= {f"pooling of {name}": each for name, each in config.also.items()}
        for name, column in columns.items():
            if column.pooling not in ("auto", "pooler") or column.layer != -1 or len(columns) > 1:
                raise EncoderError(
                    f"The recipe sets pooling, layer or `also` of {config.model}, but a function "
                    f"gives one vector. Leave them out."
                )
            made.decisions[name] = Decision("pooler", source.source)
    else:
        check_only(config, "a function of your own", pooling="its own")
        made.decisions["pooling"] = source
        made.decide("prompt", config.instruction, Decision("", "no file names one"))
    own = own_function(config.model)
    made.decisions["function"] = Decision(own.name, "the recipe")
    made.decisions["version"] = Decision(own.version, own.file.name)
    kind: Literal["image", "text"] = "image" if isinstance(config, ImageEncoderConfig) else "text"
    return EncoderPlan(kind, config.model, made.decisions, {own.file.name: own.file})


def _identity(own: OwnFunction, plan: EncoderPlan) -> dict[str, Any]:
    return {
        "model": own.name,
        "revision": None,
        "function_version": own.version,
        "licence": None,
        "supervision": None,
        "files": plan.digests(),
    }


class OwnProcessing:
    """Prepares pictures by the `prepare` of a function, or by the whole function, one by one.

    In the latter case a "picture" is the vector, filled up to three rows.
    """

    processor = "the function"
    in_float = True

    def __init__(self, own: OwnFunction) -> None:
        self.own = own
        self.prepare = getattr(own.call, "prepare", None)
        self._turn = threading.Lock()  # several workers prepare, and a function need not be ready
        self.dim = 0
        noise = np.random.default_rng(0).integers(0, 256, (*TRIAL, 3), dtype=np.uint8)
        self.output_size = (0, 0)
        height, width = self.apply(Image.fromarray(noise)).shape[1:]
        self.output_size = (height, width)

    def apply(self, image: Image.Image) -> Float32[np.ndarray, "3 height width"]:
        """Prepare an RGB image.

        Raises:
            EncoderError: The function fails, or what it gives has another shape than before.
        """
        if self.prepare is None:
            with self._turn:
                vector = self.own.vectors([image], 1)[0].cpu().numpy()
            self._check((len(vector),), (self.dim or len(vector),))
            self.dim = len(vector)
            made = np.zeros((3, 1, -(-self.dim // 3)), dtype=np.float32)
            made.reshape(-1)[: self.dim] = vector
            return made
        with fenced(f"{self.own.name}.prepare fails", WAY_OUT):
            result = self.prepare(image)
            made = np.asarray(result.cpu() if torch.is_tensor(result) else result)
        self._check(
            made.shape, (3, *self.output_size) if self.output_size[0] else (3, *made.shape[1:3])
        )
        return made.astype(np.float32)

    def _check(self, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
        if found != expected or 0 in found or len(found) not in (1, 3):
            raise EncoderError(
                f"{self.own.name} makes an array of shape {found} of a picture, where {expected} "
                f"was expected: three colours, and the same for all pictures. Correct it."
            )

    def normaliser(self, device: torch.device) -> Callable[[Tensor], Tensor]:  # noqa: ARG002
        """Return what is left to do on a device: nothing."""
        return lambda pixels: pixels

    def as_dict(self) -> dict[str, Any]:
        """Return what the fingerprint of a column says of it."""
        return {"processor": self.processor, "size": list(self.output_size)}


@dataclass(frozen=True)
class OwnOutput:
    """The vectors of a function, by the name of transformers."""

    pooler_output: Tensor


class OwnImages(nn.Module):
    """A function of prepared pictures."""

    config = None

    def __init__(self, processing: OwnProcessing) -> None:
        super().__init__()
        self.processing = processing

    def forward(self, pixels: Num[Tensor, "batch 3 height width"]) -> OwnOutput:
        """Return a vector for each picture."""
        if self.processing.prepare is None:
            return OwnOutput(pixels.flatten(1)[:, : self.processing.dim])
        with torch.autocast(pixels.device.type, enabled=False):  # what it computes in is its own
            return OwnOutput(self.processing.own.vectors(pixels, len(pixels)).to(pixels.device))


def load_image(
    config: ImageEncoderConfig,
    poolings: frozenset[str],  # noqa: ARG001 - there is one
) -> tuple[nn.Module, OwnProcessing, dict[str, Any]]:
    """Return a function as a model, what prepares its pictures, and what identifies it.

    Raises:
        EncoderError: It cannot be imported, or fails on a trial picture.
    """
    plan, own = resolve(config), own_function(config.model)
    processing = OwnProcessing(own)
    return OwnImages(processing), processing, _identity(own, plan)


@dataclass(frozen=True)
class BytesOfText:
    """Captions as their bytes in UTF-8, so that they pass where tokens do."""

    instruction: str = ""
    max_length: int = MOST_BYTES
    """Of a trial; no caption is cut."""

    def __call__(self, captions: Sequence[str]) -> list[Tokens]:
        """Return the bytes of each caption."""
        return [list((self.instruction + each).encode(errors="surrogatepass")) for each in captions]


def texts_of(batch: TokenBatch) -> list[str]:
    """Return the captions that `BytesOfText` made bytes of."""
    every, starts = bytes(batch.ids.tolist()), batch.starts.tolist()
    return [every[start:stop].decode(errors="surrogatepass") for start, stop in pairwise(starts)]


class OwnTexts(nn.Module):
    """A function of captions, which come as bytes."""

    def __init__(self, own: OwnFunction) -> None:
        super().__init__()
        self.own = own

    def forward(self, batch: TokenBatch) -> Float[Tensor, "sequences dim"]:
        """Return a vector for each caption."""
        texts = texts_of(batch)
        return self.own.vectors(texts, len(texts)).to(batch.ids.device)


def load_text(name: str, config: TextEncoderConfig, device: torch.device) -> TextEncoder:
    """Return a function as a text encoder.

    Raises:
        EncoderError: It cannot be imported, or fails on a trial caption.
    """
    plan, own = resolve(config), own_function(config.model)
    dim = own.vectors(["a"], 1).shape[1]
    return TextEncoder(
        name=name,
        model=OwnTexts(own),
        tokenise=BytesOfText(plan["prompt"]),
        tokens_per_batch=batch_budget(config, device),
        equal_lengths=False,
        first_position=0,
        device=device,
        dim=dim,
        fingerprint=_identity(own, plan)
        | {"instruction": plan["prompt"], "dtype": "float32", "dim": dim},
        plan=plan,
    )
