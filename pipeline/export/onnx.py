"""`--to onnx`: both heads as ONNX, for programs without torch."""

import importlib.util
import json
import logging
import warnings
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from features.errors import CheckpointError, ConfigError
from pipeline.card import TEMPLATES
from pipeline.export.parts import Parts

logger = logging.getLogger(__name__)
Side = Literal["image", "text"]
ROWS_TRIED = (1, 7)
"""Rows of the batches that onnxruntime is tried with; the graph was traced with another number."""
LARGEST_DIFFERENCE = 1e-4


def write(parts: Parts, folder: Path) -> str:
    """Write `image_head.onnx` and `text_head.onnx`, each from features to vectors of length 1.

    Where onnxruntime is installed, what it computes is compared to torch, and the card says how
    far it is off. Returned is how they are used.

    Raises:
        ConfigError: What writes ONNX is not installed.
        CheckpointError: onnxruntime gives other embeddings.
    """
    if any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript")):
        raise ConfigError(
            "--to onnx is asked for, and the packages that write ONNX are not installed. The extra "
            "`onnx` was expected. Use pip install -c constraints.txt -e '.[onnx]'."
        )
    checkpoint = parts.aligned.checkpoint
    sizes: dict[Side, int] = {"image": checkpoint.image["dim"], "text": checkpoint.text["dim"]}
    found = [_write_head(parts, side, dim, folder) for side, dim in sizes.items()]
    difference = max((each for each in found if each is not None), default=None)
    told = "not compared: no onnxruntime" if difference is None else f"off by {difference:.1e}"
    logger.info("onnxruntime beside torch: %s", told)
    scale, bias = parts.aligned.model.scale_and_bias
    return TEMPLATES.get_template("onnx.md.j2").render(
        sizes=sizes,
        dim=parts.aligned.dim,
        scale=scale,
        bias=bias,
        difference=difference,
    )


class _UnitHead(nn.Module):
    """A head whose embeddings have length 1."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, features: Float[Tensor, "rows feature"]) -> Float[Tensor, "rows dim"]:
        return F.normalize(self.head(features), dim=-1)


def _write_head(parts: Parts, side: Side, feature_size: int, folder: Path) -> float | None:
    """Write one head; return the largest difference to torch, or None if it cannot be measured."""
    model = parts.aligned.model
    head = _UnitHead(model.image_head if side == "image" else model.text_head).eval()
    program = _traced(head, torch.zeros(3, feature_size))
    part = parts.image if side == "image" else parts.text
    program.model.metadata_props["sail"] = json.dumps(
        {
            "encoder": part.fingerprint["model"],
            "weights_sha256": part.fingerprint.get("weights_sha256"),
            "pooling": part.settings.pooling,
            "head_sha256": parts.aligned.checkpoint.sha256,
        }
    )
    path = folder / f"{side}_head.onnx"
    program.save(path)
    difference = _difference(head, path, feature_size)
    if difference is not None and difference > LARGEST_DIFFERENCE:
        raise CheckpointError(
            f"onnxruntime gives other embeddings than torch for the {side} head: they are off by "
            f"{difference:.1e}. At most {LARGEST_DIFFERENCE} was expected. Use the versions in "
            f"constraints.txt, or --to hf."
        )
    return difference


def _traced(head: nn.Module, features: Float[Tensor, "rows feature"]) -> Any:
    """Return the program of a head, for any number of rows."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)  # it says that there is no torchvision, which nothing here needs
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore", FutureWarning)  # of torch, about torch
            return torch.onnx.export(
                head,
                (features,),
                input_names=["features"],
                output_names=["embedding"],
                dynamic_shapes={"features": {0: torch.export.Dim("rows")}},
                dynamo=True,
                verbose=False,
            )
    finally:
        log.setLevel(level)


@torch.no_grad()
def _difference(head: nn.Module, path: Path, feature_size: int) -> float | None:
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    random = torch.Generator().manual_seed(0)
    largest = 0.0
    for rows in ROWS_TRIED:
        features = torch.randn(rows, feature_size, generator=random)
        (found,) = session.run(None, {"features": features.numpy()})
        largest = max(largest, float(np.abs(found - head(features).numpy()).max()))
    return largest
