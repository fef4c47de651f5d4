"""Trains the bundled image encoder on drawn scenes: `python -m tests.demo_encoder.pretrain OUT`.

Supervised, without captions: the pooled features must tell shape, colour and texture of the main
object, and each cell of the last feature map shape and colour of what covers it. The combinations
of `HELD_OUT` are never drawn.
"""

import argparse
import json
import logging
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ResNetConfig, ResNetModel

from features.scenes.world import CLASS_NAMES, COLOURS, SHAPES, TEXTURES
from tests.demo_encoder.batches import INPUT, MEAN, STD, Batch, normalised, pretraining_batches
from tests.demo_encoder.probe import Encode, Probe, mean_max, random_vit, raw_pixels

logger = logging.getLogger(__name__)

SUPERVISION = (
    "Supervised: trained on the shape, colour and texture labels of drawn scenes (of the main "
    "object, and of the object at each place), without captions."
)
BATCH = 64


class Questions(nn.Module):
    """The network, and linear layers that answer from its features."""

    def __init__(self, model: ResNetModel) -> None:
        super().__init__()
        dim = model.config.hidden_sizes[-1]
        self.model = model
        self.main = nn.Linear(dim, len(SHAPES) + len(COLOURS) + len(TEXTURES))
        self.cell = nn.Conv2d(dim, len(SHAPES) + len(COLOURS) + 2, 1)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the loss, in nats summed over questions, and the share of main classes right."""
        output = self.model(normalised(torch.from_numpy(batch.pixels)))
        labels, textures = torch.from_numpy(batch.labels), torch.from_numpy(batch.textures)
        shapes, colours = labels // len(COLOURS), labels % len(COLOURS)
        answers = self.main(output.pooler_output.flatten(1))
        shape, colour, texture = answers.split((len(SHAPES), len(COLOURS), len(TEXTURES)), dim=1)
        right = (shape.argmax(1) == shapes) & (colour.argmax(1) == colours)
        loss = F.cross_entropy(shape, shapes) + F.cross_entropy(colour, colours)
        loss = loss + 0.5 * F.cross_entropy(texture, textures)
        return loss + self._cells(output.last_hidden_state, batch), right.float().mean()

    def _cells(self, maps: Float[Tensor, "batch dim rows columns"], batch: Batch) -> Tensor:
        cells = torch.from_numpy(batch.cells)
        bare, asked = cells == len(CLASS_NAMES), cells >= 0
        shapes = torch.where(bare, len(SHAPES), cells // len(COLOURS)).where(asked, -1)
        colours = torch.where(bare, len(COLOURS), cells % len(COLOURS)).where(asked, -1)
        shape, colour = self.cell(maps).split((len(SHAPES) + 1, len(COLOURS) + 1), dim=1)
        return F.cross_entropy(shape, shapes, ignore_index=-1) + F.cross_entropy(
            colour, colours, ignore_index=-1
        )


def pretrain(*, steps: int, seed: int) -> ResNetModel:
    """Train for a number of batches, every picture a new one."""
    torch.manual_seed(seed)
    model = network(SUPERVISION)
    asking = Questions(model)
    optimiser = torch.optim.AdamW(asking.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, max_lr=2e-3, total_steps=steps, pct_start=0.15
    )
    started, right = time.monotonic(), 0.0
    for step, batch in enumerate(pretraining_batches(seed, steps, BATCH), start=1):
        optimiser.zero_grad()
        loss, told = asking(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(asking.parameters(), 5.0)
        optimiser.step()
        schedule.step()
        right += 0.05 * (float(told) - right)
        if step % 50 == 0 or step == steps:
            seconds, pictures = time.monotonic() - started, step * BATCH
            progress = f"step {step} of {steps}, {pictures} pictures, {seconds:.0f} s"
            logger.info("%s: loss %.3f, main class right %.3f", progress, loss.item(), right)
    return model.eval()


def save(model: ResNetModel, folder: Path) -> None:
    """Write weights, configuration and preprocessing in the layout of Hugging Face."""
    model.save_pretrained(folder)
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": INPUT, "width": INPUT},
        "resample": int(Image.Resampling.BILINEAR),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [MEAN] * 3,
        "image_std": [STD] * 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")


def measure(last_map: Encode) -> None:
    """Log what nearest neighbours tell from the features, and from two baselines."""
    probe = Probe()
    encoders: dict[str, Encode] = {
        "raw pixels 32 × 32": raw_pixels,
        "random ViT, mean + max": random_vit(seed=0),
        "this encoder, mean": lambda pixels: last_map(pixels).mean((2, 3)),
        "this encoder, mean + max": lambda pixels: mean_max(last_map(pixels)),
    }
    logger.info("k-NN, per cent of 1,000 test scenes against 6,000 training scenes:")
    for name, encode in encoders.items():
        logger.info("%s: %s", name, probe.scores(encode))


def network(supervision: str) -> ResNetModel:
    """Return the untrained network; how it will be trained is noted in its configuration."""
    config = ResNetConfig(
        embedding_size=32,
        hidden_sizes=[48, 96, 256],
        depths=[1, 2, 1],
        layer_type="basic",
        downsample_in_first_stage=False,
        supervision=supervision,
    )
    return ResNetModel(config)


def log_to(folder: Path, first_line: str) -> None:
    """Log to the terminal, and to `training-log.txt` in a folder that is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    log = logging.FileHandler(folder / "training-log.txt", "w", encoding="utf-8")
    handlers: list[logging.Handler] = [logging.StreamHandler(), log]
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=handlers)
    logger.info("torch %s, %s. %s", torch.__version__, platform.machine(), first_line)


def command(pretrain: Callable[..., ResNetModel], supervision: str, *, steps: int) -> None:
    """Parse the command line, train, save and measure."""
    parser = argparse.ArgumentParser(description=supervision)
    parser.add_argument("out", type=Path, help="folder for weights, configuration and log")
    parser.add_argument("--steps", type=int, default=steps, help=f"batches of {BATCH} pictures")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    log_to(options.out, supervision)
    model = pretrain(steps=options.steps, seed=options.seed)
    save(model, options.out)
    measure(lambda pixels: model(normalised(pixels)).last_hidden_state)


if __name__ == "__main__":
    command(pretrain, SUPERVISION, steps=1500)
