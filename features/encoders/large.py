"""Text models too large for one GPU: layers in 8 or 4 bits, or laid over several GPUs."""

import warnings
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from features.config import TextEncoderConfig
from features.encoders.libraries import library
from features.encoders.packing import TokenBatch
from features.encoders.weights import fenced
from features.errors import EncoderError

LIBRARY, EXTRA = "bitsandbytes", "quantised"


def is_large(config: TextEncoderConfig) -> bool:
    """Return whether a model is loaded on the CPU first, and then laid out."""
    return config.quantise != "none" or bool(config.devices)


def first_device(config: TextEncoderConfig, device: torch.device) -> torch.device:
    """Return where tokens go in and vectors come out: `devices[0]` of the recipe, else a device.

    Raises:
        EncoderError: The machine has not all devices that the recipe names.
    """
    for name in config.devices:
        with fenced(
            f"devices of {config.model} has {name!r}",
            "Devices of this machine were expected, such as ['cuda:0', 'cuda:1']. Correct them.",
        ):
            torch.empty(1, device=name)
    return torch.device(config.devices[0]) if config.devices else device


def lay_out(model: Any, config: TextEncoderConfig, device: torch.device, dtype: torch.dtype) -> Any:
    """Bring a model from the CPU to where it computes, its layers in few bits if that is set.

    Args:
        model: In its compute type.
        config: Says how.
        device: Of what is no layer, such as the embeddings, and of what the model is given.
        dtype: The compute type.

    Raises:
        EncoderError: The model has no layers, or a library is missing.
    """
    if not is_large(config):
        return model.to(device)
    path, layers = _layers(model, config.model)
    owner, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(owner), leaf, nn.ModuleList())
    model.to(device)
    setattr(model.get_submodule(owner), leaf, layers)
    places = _places(layers, [torch.device(name) for name in config.devices] or [device])
    for layer, place in zip(layers, places, strict=True):
        if config.quantise != "none":
            _quantise(layer, config.quantise, dtype)
        layer.to(place)
        if place != device:
            layer.register_forward_pre_hook(_bring_to(place), with_kwargs=True)
    last = layers[len(layers) - 1]
    last.register_forward_hook(lambda _layer, _inputs, output: _moved(output, device))
    return model


def quantised_by(config: TextEncoderConfig) -> dict[str, str]:
    """Return what a fingerprint says of layers in few bits; nothing where they are whole."""
    if config.quantise == "none":
        return {}
    return {"quantised": f"{config.quantise}, {LIBRARY} {library(LIBRARY, EXTRA).__version__}"}


def _layers(model: nn.Module, name: str) -> tuple[str, nn.ModuleList]:
    """Return the list of modules that holds most of the weights, and its path."""
    lists = {path: each for path, each in model.named_modules() if isinstance(each, nn.ModuleList)}
    if not lists:
        raise EncoderError(
            f"{name} is a {type(model).__name__}, which has no list of layers. A transformer was "
            f"expected for `quantise` and `devices`. Leave them out, or choose another model."
        )
    path = max(lists, key=lambda path: _bytes(lists[path]))
    return path, lists[path]


def _places(layers: nn.ModuleList, devices: list[torch.device]) -> list[torch.device]:
    """Return the device of each layer: neighbours together, and of equal size."""
    ends = list(accumulate(_bytes(layer) for layer in layers))
    return [
        devices[min(int((end - _bytes(layer) / 2) / ends[-1] * len(devices)), len(devices) - 1)]
        for layer, end in zip(layers, ends, strict=True)
    ]


def _bytes(module: nn.Module) -> int:
    return sum(each.nbytes for each in module.parameters())


def _quantise(layer: nn.Module, form: str, dtype: torch.dtype) -> None:
    """Put linear layers in few bits in place of those of a layer; `.to(device)` rounds them.

    Reference:
        Dettmers et al. 2022, LLM.int8(), arXiv:2208.07339; Dettmers et al. 2023, QLoRA (NF4),
        arXiv:2305.14314.
    """
    nn_bits = library(LIBRARY, EXTRA).nn
    warnings.filterwarnings("ignore", "MatMul8bitLt: inputs will be cast")  # once a layer and run
    for path, linear in list(layer.named_modules()):
        if type(linear) is not nn.Linear:
            continue
        shape = (linear.in_features, linear.out_features, linear.bias is not None)
        made: Any
        if form == "8bit":
            made = nn_bits.Linear8bitLt(*shape, has_fp16_weights=False, threshold=6.0)
            made.weight = nn_bits.Int8Params(
                linear.weight.data, requires_grad=False, has_fp16_weights=False
            )
        else:
            made = nn_bits.Linear4bit(*shape, compute_dtype=dtype, quant_type="nf4")
            made.weight = nn_bits.Params4bit(
                linear.weight.data, requires_grad=False, quant_type="nf4"
            )
        made.bias = linear.bias
        owner, _, leaf = path.rpartition(".")
        setattr(layer.get_submodule(owner), leaf, made.requires_grad_(False))


def _bring_to(place: torch.device) -> Any:
    def bring(_layer: nn.Module, inputs: Any, options: Any) -> tuple[Any, Any]:
        return _moved(inputs, place), _moved(options, place)

    return bring


def _moved(values: Any, device: torch.device) -> Any:
    """Return tensors, and batches, of any structure on a device."""

    def move(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor | TokenBatch) else value

    return tree_map(move, values)
