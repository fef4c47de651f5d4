"""Heads in the layout of the paper's own code (lezhang7/SAIL): `sail import-head`, `export-head`.

Such a checkpoint is a dictionary with a `state_dict`, or that dictionary itself. Only tensors are
read from it; nothing in it is run.
"""

import hashlib
import io
import logging
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from align.checkpoint import Checkpoint, CheckpointFolder, Snapshot, load_head
from align.columns import Columns, describe
from align.config import AlignConfig, HeadConfig
from align.heads import AlignmentModel, build_model
from features.errors import CheckpointError
from features.storage.files import write
from features.storage.joined_column import BESIDE
from features.storage.reading import Expected, read_torch
from pipeline.card import CARD, export_model
from pipeline.run.config import RunConfig
from pipeline.run.folder import open_store, run_folder, stage_lock, start_run

logger = logging.getLogger(__name__)
Kind = Literal["star", "mlp", "linear"]
MODALITIES = {"vision": "image_head", "text": "text_head"}
# Their names of the layers of a mapping network, and ours, from the first to the last.
LAYERS: dict[Kind, dict[str, str]] = {
    "star": {"f1": "f1", "f2": "f2", "g": "g"},
    "mlp": {"proj.0": "up", "proj.2": "down"},
    "linear": {"": "linear"},
}
EXPECTED = Expected(
    "A PyTorch file with nothing but tensors and numbers", "Fetch it again.", CheckpointError
)
ONE = torch.Size([1])  # shape of scale and bias there


def load_released(
    path: Path, device: torch.device | str = "cpu"
) -> tuple[AlignmentModel, HeadConfig]:
    """Load a checkpoint in the released layout, with a star, an mlp or a linear head.

    The kind and the sizes are those of its tensors; each must be there, and no other.

    Args:
        path: A `.pt` file, such as `sail_dinov2l_nv2.pt`.
        device: Where to put the weights.

    Returns:
        The model, without gradients, and the settings of its head.

    Raises:
        CheckpointError: There is no such file, it holds more than tensors, or its tensors are not
            those of such a head.
    """
    weights = _read(path)
    try:
        kind = _kind(weights)
        image, text = (_sizes(weights, kind, modality) for modality in MODALITIES)
        if image._replace(features=0) != text._replace(features=0):
            raise ValueError(f"image and text heads of other forms: {image} and {text}")
        head = HeadConfig(kind=kind, dim=image.dim, expansion=image.expansion)
        model = build_model(dict(head), image_dim=image.features, text_dim=text.features)
        names, state = released_names(kind), model.state_dict()
        found = {theirs: tensor.shape or ONE for theirs, tensor in weights.items()}
        wanted = {theirs: state[ours].shape or ONE for theirs, ours in names.items()}
        if wrong := sorted(set(wanted.items()) ^ set(found.items())):
            name, shape = wrong[0]
            raise ValueError(f"{name} of shape {tuple(shape)} is missing or does not belong there")
    except ValueError as error:
        raise CheckpointError(
            f"{path} is not a released SAIL head: {error}. A star, an mlp or a linear head was "
            f"expected, with `vision_mapping_network`, `text_mapping_network`, their LayerNorms, "
            f"`logit_scale` and `logit_bias`. Heads trained by this program are folders: give "
            f"the folder."
        ) from error
    model.load_state_dict(
        {ours: weights[theirs].reshape(state[ours].shape) for theirs, ours in names.items()}
    )
    return model.requires_grad_(False).eval().to(device), head


def save_released(model: AlignmentModel, kind: str, path: Path, *, epoch: int) -> None:
    """Write a head in the released layout, all of the file or nothing.

    Args:
        model: The heads; `log_scale` becomes `logit_scale`, a logarithm there as well.
        kind: `star`, `mlp` or `linear`: those the released code has.
        path: A `.pt` file.
        epoch: Passes over the data, recorded beside the weights.

    Raises:
        CheckpointError: The released code has no head of this kind.
    """
    if kind not in LAYERS:
        raise CheckpointError(
            f"A head of kind {kind!r} has no place in the released layout. One of {list(LAYERS)} "
            f"was expected. Train one with `align.head.kind`, or use the folder of the checkpoint."
        )
    state = model.state_dict()
    weights = {
        theirs: state[ours].detach().cpu().clone().reshape(state[ours].shape or ONE)
        for theirs, ours in released_names(kind).items()
    }
    buffer = io.BytesIO()  # a full disk is an error of torch's own if it writes the file itself
    torch.save({"epoch": epoch, "name": "sail", "state_dict": weights}, buffer)
    write(path, buffer.getvalue())


def released_names(kind: Kind) -> dict[str, str]:
    """Return our name of each tensor of the released layout."""
    names = {"logit_scale": "log_scale", "logit_bias": "bias"}
    for modality, ours in MODALITIES.items():
        for part in ("weight", "bias"):
            names[f"{modality}_layer_norm.{part}"] = f"{ours}.norm.{part}"
            for theirs, layer in LAYERS[kind].items():
                names[_layer(modality, theirs, part)] = f"{ours}.{layer}.{part}"
    return names


def _read(path: Path) -> dict[str, Tensor]:
    loaded = read_torch(path, EXPECTED)
    weights = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else {}
    if not isinstance(weights, dict):
        weights = {}
    return {str(name): value for name, value in weights.items() if isinstance(value, Tensor)}


def _kind(weights: dict[str, Tensor]) -> Kind:
    for kind, layers in LAYERS.items():
        if _layer("vision", next(iter(layers))) in weights:
            return kind
    raise ValueError("it has no `vision_mapping_network` of a kind that is known here")


def _layer(modality: str, name: str, part: str = "weight") -> str:
    return ".".join(filter(None, [f"{modality}_mapping_network", name, part]))


class _Sizes(NamedTuple):
    features: int
    dim: int
    expansion: int | None
    """Hidden width as a multiple of the length of a feature."""


def _sizes(weights: dict[str, Tensor], kind: Kind, modality: str) -> _Sizes:
    def matrix(layer: str) -> tuple[int, int]:
        name = _layer(modality, layer)
        if name not in weights or weights[name].ndim != 2:
            raise ValueError(f"it has no matrix {name}")
        rows, columns = weights[name].shape
        return rows, columns

    layers = list(LAYERS[kind])
    hidden, features = matrix(layers[0])
    dim, _ = matrix(layers[-1])
    return _Sizes(features, dim, hidden // features if len(layers) > 1 else None)


def import_head(file: Path, config: RunConfig) -> Path:
    """Make a released head the checkpoint of a run, so that `sail eval` measures it.

    Args:
        file: A `.pt` file in the released layout.
        config: A recipe whose features are extracted; its encoders must be those of the head.

    Returns:
        The checkpoint.

    Raises:
        CheckpointError: The file is no such head, its lengths are not those of the recipe's
            columns, or the run has a head already.
        LockedError: Another process trains in this run folder.
    """
    model, head = load_released(file)
    folder = run_folder(config)
    settings = config.align.model_copy(update={"head": head})
    described = _described(file, model, config, settings)
    described["imported"] = {"file": file.name, "sha256": _sha256(file)}
    with stage_lock(config, "align"):
        checkpoints = CheckpointFolder(folder.align)
        if checkpoints.last.is_symlink():  # what failed in the middle is gone on with
            there = Checkpoint.open(checkpoints.last).run.get("imported")
            if (folder.model / CARD).is_file() or there != described["imported"]:
                raise CheckpointError(
                    f"{folder.align} has a head already. A run without one was expected. Give this "
                    f"run another `run.dir`, or delete {folder.align}."
                )
        start_run(config, "align")
        if checkpoints.resume(described) is None:
            checkpoints.save(_snapshot(model, described), {}, None)
        export_model(checkpoints.best, folder.model)
    logger.info("%s: a %s head, scale %.4g", file, head.kind, model.log_scale.exp().item())
    return checkpoints.best


def _described(
    file: Path, model: AlignmentModel, config: RunConfig, settings: AlignConfig
) -> dict[str, Any]:
    """Describe a training on the features of the run, of which the head takes their lengths."""
    folder, splits = run_folder(config), dict.fromkeys((*config.trained_splits, *config.data))
    image, text = config.aligned_encoder("image"), config.aligned_encoder("text")
    _check_single(image, text)
    stores = [open_store(config, folder, split) for split in splits]
    store = next((each for each in stores if each.fields), stores[0])
    of_image = store.column(f"image/{image}")
    _check_length(file, str(of_image.path), of_image.dim, model.image_head)
    if store.fields:
        columns = Columns.open(store, settings, image, text)
        first = columns.text[0]
        _check_length(file, str(first.path), first.dim, model.text_head)
        return describe([columns], [1.0], settings, config.run.seed)
    from features.encoders import load_text_encoder  # no split has captions: it is asked itself

    encoder = load_text_encoder(text, config.encoders.text_columns[text], torch.device("cpu"))
    _check_length(file, f"encoders.text.{text}", encoder.dim, model.text_head)
    columns = Columns(store, of_image, (of_image,), ())
    about = {"name": text, "dim": encoder.dim, "fingerprint": encoder.fingerprint}
    return describe([columns], [1.0], settings, config.run.seed) | {"text": about}


def export_head(checkpoint: Path, file: Path) -> Path:
    """Write the head of a checkpoint in the released layout.

    Args:
        checkpoint: Folder of a checkpoint, or of a run (its best one is taken).
        file: The `.pt` file to write.

    Raises:
        CheckpointError: There is no whole checkpoint, or the released code has no such head.
    """
    best = checkpoint / "align" / "best"
    model, found = load_head(best if best.exists() else checkpoint)
    _check_single(found.image["name"], found.text["name"])
    save_released(model, found.head.kind, file, epoch=int(found.metadata["epoch"]))
    return file


def _check_single(*names: str) -> None:
    for name in names:
        if BESIDE in name:
            raise CheckpointError(
                f"A released head reads one column of each kind, and this one would read {name}. "
                f"One was expected. Set align.image and align.text to one name each."
            )


def _check_length(file: Path, place: str, dim: int, network: torch.nn.Module) -> None:
    expected = int(network.get_parameter("norm.weight").shape[0])
    if dim != expected:
        raise CheckpointError(
            f"The head in {file} takes features of length {expected}, but {place} has {dim}. The "
            f"encoders that the head was trained on were expected. Choose them in the recipe "
            f"(model and pooling), and extract."
        )


def _snapshot(model: AlignmentModel, described: dict[str, Any]) -> Snapshot:
    metadata = {
        "step": 0,
        "total_steps": 0,
        "epoch": 0,
        "finished": True,
        "heldout": {},
        "best_step": 0,
        "best_score": None,
        "run": described,
    }
    return Snapshot(0, model.state_dict(), metadata)


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
