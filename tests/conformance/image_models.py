"""Tiny image models of random weights, of the real classes of transformers, in their folders."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

VIT: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
}
SWIN: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 4,
    "embed_dim": 8,
    "depths": [1, 1],
    "num_heads": [2, 2],
    "window_size": 4,
}
RESNET: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
CONVNEXT: dict[str, Any] = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}
TOWERS: dict[str, Any] = {
    "vision_config": VIT | {"projection_dim": 12},
    "text_config": {
        "vocab_size": 30,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 12,
    },
    "projection_dim": 12,
}
PROCESSOR: dict[str, Any] = {
    "image_processor_type": "ViTImageProcessor",
    "size": {"height": 32, "width": 32},
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.2, 0.3, 0.4],
    "resample": 3,
}


@dataclass(frozen=True)
class ImageModel:
    """A model, and what it should give by its name alone."""

    kind: str
    """Class in transformers."""
    settings: dict[str, Any]
    pooling: str
    """Which pooling `auto` is."""
    config: str = ""
    """Class of its configuration; that of the model if not given."""
    processor: dict[str, Any] = field(default_factory=lambda: PROCESSOR)
    also: tuple[str, ...] = ()
    """Poolings that it has too."""
    refused: tuple[str, ...] = ()
    """Poolings that it has not."""

    def write(self, folder: Path) -> Path:
        """Write its folder."""
        model_class = getattr(transformers, self.kind)
        config_class = getattr(transformers, self.config) if self.config else None
        config = (config_class or model_class.config_class)(**self.settings)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = model_class(config).eval()
            for name, weight in model.named_parameters():
                if weight.ndim < 2 and "embed" not in name:  # norms and biases that matter
                    torch.nn.init.normal_(weight, mean=float("norm" in name), std=0.1)
            model.save_pretrained(folder)
        (folder / "preprocessor_config.json").write_text(json.dumps(self.processor))
        return folder


def _cls(kind: str, settings: dict[str, Any] = VIT, **others: Any) -> ImageModel:
    also = others.pop("also", ("mean", "cls+mean", "mean+max"))
    return ImageModel(kind, settings, others.pop("pooling", "cls"), also=also, **others)


def _map(kind: str, settings: dict[str, Any], pooling: str = "pooler", **others: Any) -> ImageModel:
    also = others.pop("also", ("mean", "mean+max"))
    return ImageModel(kind, settings, pooling, also=also, refused=("cls", "cls+mean"), **others)


OWN = {"size": {"height": 32, "width": 32}, "crop_size": {"height": 32, "width": 32}}
IMAGE_MODELS: dict[str, ImageModel] = {
    "vit": _cls("ViTModel"),
    "deit": _cls("DeiTModel"),
    "vit_msn": _cls("ViTMSNModel"),
    "vit_mae": _cls("ViTMAEModel", VIT | {"decoder_hidden_size": 16}),
    "dinov2": _cls("Dinov2Model", VIT | {"mlp_ratio": 2}),
    "dinov2_with_registers": _cls(
        "Dinov2WithRegistersModel", VIT | {"mlp_ratio": 2, "num_register_tokens": 3}
    ),
    "dinov3_vit": _cls("DINOv3ViTModel", VIT | {"num_register_tokens": 2}),
    "beit": _cls("BeitModel", VIT, pooling="pooler", also=("cls", "mean")),
    "data2vec_vision": _cls("Data2VecVisionModel", VIT, pooling="cls", also=("mean",)),
    "pixio": ImageModel(
        "PixioModel",
        VIT | {"mlp_ratio": 2, "n_cls_tokens": 3},
        "pooler",
        also=("mean",),
        refused=("cls",),
    ),
    "ijepa": _map("IJepaModel", VIT, "mean"),
    "aimv2": _map("Aimv2VisionModel", VIT, config="Aimv2VisionConfig"),
    "siglip_vision": _map("SiglipVisionModel", VIT, config="SiglipVisionConfig"),
    "clip_vision": _cls("CLIPVisionModel", VIT, pooling="pooler", config="CLIPVisionConfig"),
    "clip_vision_projection": ImageModel(
        "CLIPVisionModelWithProjection",
        VIT | {"projection_dim": 12},
        "projection",
        config="CLIPVisionConfig",
        also=("cls", "mean"),
    ),
    "clip": ImageModel("CLIPModel", TOWERS, "projection", also=("cls", "mean")),
    "metaclip_2": ImageModel("MetaClip2Model", TOWERS, "projection", also=("cls", "mean")),
    "siglip": _map("SiglipModel", TOWERS),
    "swin": _map("SwinModel", SWIN),
    "swinv2": _map("Swinv2Model", SWIN),
    "donut_swin": _map("DonutSwinModel", SWIN),
    "focalnet": _map("FocalNetModel", SWIN | {"focal_levels": [1, 1], "focal_windows": [3, 3]}),
    "hiera": _map(
        "HieraModel",
        {"image_size": [32, 32], "patch_size": [7, 7], "patch_stride": [4, 4], "embed_dim": 8}
        | {"depths": [1, 1], "num_heads": [1, 2], "num_query_pool": 1, "mlp_ratio": 2.0}
        | {"masked_unit_size": [2, 2], "query_stride": [2, 2]},
    ),
    "convnext": _map("ConvNextModel", CONVNEXT),
    "convnextv2": _map("ConvNextV2Model", CONVNEXT),
    "dinov3_convnext": ImageModel(
        "DINOv3ConvNextModel", {"hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1]}, "pooler"
    ),
    "resnet": _map("ResNetModel", RESNET),
    "regnet": _map("RegNetModel", RESNET | {"groups_width": 8}),
    "mobilenet_v1": _map("MobileNetV1Model", {"depth_multiplier": 0.25, "image_size": 32}),
    "mobilenet_v2": _map("MobileNetV2Model", {"depth_multiplier": 0.25, "image_size": 32}),
    "efficientnet": _map(
        "EfficientNetModel", {"image_size": 32, "width_coefficient": 0.25, "hidden_dim": 320}
    ),
    "mobilevit": _map(
        "MobileViTModel",
        {"hidden_sizes": [8, 8, 8], "neck_hidden_sizes": [4, 4, 4, 4, 8, 8, 16]}
        | {"num_attention_heads": 2, "image_size": 64, "patch_size": 2},
        processor=PROCESSOR | {"size": {"height": 64, "width": 64}},
    ),
    "mobilevitv2": _map(
        "MobileViTV2Model",
        {"image_size": 64, "width_multiplier": 0.25, "n_attn_blocks": [1, 1, 1]},
        processor=PROCESSOR | {"size": {"height": 64, "width": 64}},
    ),
    "poolformer": _map(
        "PoolFormerModel", {"hidden_sizes": [8, 8, 8, 16], "depths": [1, 1, 1, 1]}, "mean"
    ),
    "segformer": _map(
        "SegformerModel",
        {"hidden_sizes": [8, 8, 8, 16], "depths": [1, 1, 1, 1]}
        | {"num_attention_heads": [1, 1, 2, 2]},
        "mean",
    ),
    "pvt_v2": _map(
        "PvtV2Model",
        {"hidden_sizes": [8, 8, 8, 16], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2]}
        | {"image_size": 32},
        "mean",
    ),
    "swiftformer": _map(
        "SwiftFormerModel",
        {"embed_dims": [8, 8, 8, 16], "depths": [1, 1, 1, 1], "image_size": 32},
        "mean",
        also=(),
    ),
    "vitdet": _map("VitDetModel", VIT | {"mlp_ratio": 2}, "mean"),
    "levit": ImageModel(
        "LevitModel",
        {"image_size": 64, "hidden_sizes": [16, 16, 16], "num_attention_heads": [2, 2, 2]}
        | {"depths": [1, 1, 1], "key_dim": [8, 8, 8]},
        "pooler",
        processor=PROCESSOR | {"size": {"height": 64, "width": 64}},
    ),
    "mlcd": _cls("MLCDVisionModel", VIT, config="MLCDVisionConfig"),
    "chinese_clip_vision": _cls(
        "ChineseCLIPVisionModel", VIT, config="ChineseCLIPVisionConfig", pooling="cls"
    ),
    "clip_own_processor": _cls(
        "CLIPVisionModel",
        VIT,
        pooling="pooler",
        config="CLIPVisionConfig",
        processor=PROCESSOR
        | {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 40}}
        | {"crop_size": {"height": 32, "width": 32}, "do_center_crop": True},
    ),
    **{
        f"vit_{name}": _cls(
            "ViTModel", VIT, processor=PROCESSOR | OWN | {"image_processor_type": kind}
        )
        for name, kind in {
            "beit_processor": "BeitImageProcessor",
            "efficientnet_processor": "EfficientNetImageProcessor",
            "blip_processor": "BlipImageProcessor",
            "chinese_clip_processor": "ChineseCLIPImageProcessor",
            "segformer_processor": "SegformerImageProcessor",
            "pvt_processor": "PvtImageProcessor",
            "flava_processor": "FlavaImageProcessor",
        }.items()
    },
}
POOLED: dict[str, Callable[[Any, int], torch.Tensor]] = {
    "cls": lambda output, _: output.last_hidden_state[:, 0],
    "pooler": lambda output, _: output.pooler_output.flatten(1),
    "projection": lambda output, _: output.image_embeds,
    "mean": lambda output, prefix: _tokens(output)[:, prefix:].mean(1),
}


def _tokens(output: Any) -> torch.Tensor:
    last: torch.Tensor = output.last_hidden_state
    return last.flatten(2).transpose(1, 2) if last.ndim == 4 else last
