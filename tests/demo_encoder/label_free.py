"""Trains an image encoder without any label: `python -m tests.demo_encoder.label_free OUT`.

Contrast between two views of the same salient spot. From the pixels alone: where a picture differs
from its surroundings there may be an object; a crop around that spot, turned, scaled and shifted,
is one view. What stands out from the border of a crop is laid over the ground of another crop, so
that the background tells nothing and the network has to look at the object.
"""

import logging
import time

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ResNetModel

from tests.demo_encoder.batches import INPUT, pretraining_batches, standardised
from tests.demo_encoder.pretrain import BATCH, command, network

logger = logging.getLogger(__name__)

SUPERVISION = (
    "Label-free: trained on drawn scenes without labels, masks or captions, by contrast between "
    "two views of the same salient spot."
)
SPOTS = 2
"""Crops from each picture."""
CROP = 36
"""Side of a crop, in pixels of the network's input."""
TEMPERATURE = 0.15

Pictures = Float[Tensor, "batch 3 height width"]
Points = Float[Tensor, "batch spots 2"]


class Contrast(nn.Module):
    """The network, and a small projection that is thrown away after training."""

    def __init__(self, model: ResNetModel) -> None:
        super().__init__()
        dim = 2 * model.config.hidden_sizes[-1]
        self.model = model
        self.project = nn.Sequential(
            nn.Linear(dim, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 64)
        )

    def forward(self, first: Pictures, second: Pictures) -> tuple[Tensor, Tensor]:
        """Return the loss, in nats, and the share of crops whose other view is the nearest."""
        map_ = self.model(standardised(torch.cat([first, second]))).last_hidden_state.flatten(2)
        features = self.project(torch.cat([map_.mean(2), map_.amax(2)], dim=1))
        features = F.normalize(features)  # (2 crops, 64)
        crops = len(first)
        logits = features @ features.T / TEMPERATURE
        logits = logits.masked_fill(torch.eye(2 * crops, dtype=torch.bool), -torch.inf)
        other = torch.arange(2 * crops).roll(crops)
        return F.cross_entropy(logits, other), (logits.argmax(1) == other).float().mean()


def pretrain(*, steps: int, seed: int) -> ResNetModel:
    """Train for a number of batches, every picture a new one."""
    torch.manual_seed(seed)
    model = network(SUPERVISION)
    contrast = Contrast(model)
    optimiser = torch.optim.AdamW(contrast.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, max_lr=2e-3, total_steps=steps, pct_start=0.08
    )
    started = time.monotonic()
    for step, batch in enumerate(pretraining_batches(seed, steps, BATCH), start=1):
        pictures = torch.from_numpy(batch.pixels).float() / 255  # its labels are not used
        spots = salient_spots(pictures)
        optimiser.zero_grad()
        loss, found = contrast(view(pictures, spots), view(pictures, spots))
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % 50 == 0 or step == steps:
            seconds, drawn = time.monotonic() - started, step * BATCH
            progress = f"step {step} of {steps}, {drawn} pictures, {seconds:.0f} s"
            logger.info("%s: loss %.3f, other view found %.3f", progress, loss.item(), float(found))
    return model.eval()


def salient_spots(pictures: Pictures) -> Points:
    """Return the places (x, y in pixels) that differ most from their wider surroundings.

    Of two such places in a picture the second is at least 14 pixels away from the first.
    """
    wide = F.pad(pictures, (12, 12, 12, 12), mode="reflect")
    near = _blurred(_blurred(wide, 5), 5)[..., 12:-12, 12:-12]
    far = _blurred(_blurred(wide, 19), 11)[..., 12:-12, 12:-12]
    salience = _blurred((near - far).abs().sum(1, keepdim=True), 9)[:, 0]
    place = torch.arange(float(INPUT))
    spots = []
    for _ in range(SPOTS):
        best = salience.flatten(1).argmax(1)
        x, y = (best % INPUT).float(), best.div(INPUT, rounding_mode="floor").float()
        spots.append(torch.stack([x, y], dim=1))
        away = (place - x[:, None])[:, None, :] ** 2 + (place - y[:, None])[:, :, None] ** 2
        salience = salience * (away > 14**2)
    return torch.stack(spots, dim=1)


def view(pictures: Pictures, spots: Points) -> Pictures:
    """Return one crop for each spot, changed at random in place, ground and brightness."""
    crops = _cut(pictures, spots)
    ground = _border(crops).median(2).values[..., None, None]
    smooth = F.avg_pool2d(F.pad(crops, (1, 1, 1, 1), mode="replicate"), 3, 1)
    stands_out = (smooth - ground).pow(2).sum(1, keepdim=True).sqrt()
    cover = torch.sigmoid((stands_out - 0.22) * 25)
    order = torch.randperm(len(crops))
    bare = ground + (crops - ground) * (1 - cover)  # the crop where nothing stands out
    moved = cover * crops + (1 - cover) * bare[order]
    changed = torch.where(torch.rand(len(crops), 1, 1, 1) < 0.8, moved, crops)
    gain = 1 + _around(0.25, len(crops), 1, 1, 1) + _around(0.08, len(crops), 3, 1, 1)
    changed = changed * gain + _around(0.1, len(crops), 1, 1, 1)
    return (changed + 0.02 * torch.randn(changed.shape)).clamp(0, 1)


def _cut(pictures: Pictures, spots: Points) -> Pictures:
    """Cut a crop around each spot, turned by up to 26 degrees, scaled by up to 1.4."""
    crops = spots.shape[0] * spots.shape[1]
    angle, scale = _around(0.45, crops), torch.exp(_around(0.35, crops))
    centre = spots.flatten(0, 1) + _around(3.0, crops, 2)
    line = torch.arange(CROP) - (CROP - 1) / 2
    y, x = torch.meshgrid(line, line, indexing="ij")
    cosine = (angle.cos() * scale)[:, None, None]
    sine = (angle.sin() * scale)[:, None, None]
    right = centre[:, 0, None, None] + cosine * x - sine * y
    down = centre[:, 1, None, None] + sine * x + cosine * y
    grid = (torch.stack([right, down], dim=-1) + 0.5) * (2 / INPUT) - 1
    sources = pictures.repeat_interleave(spots.shape[1], dim=0)
    return F.grid_sample(sources, grid, padding_mode="reflection", align_corners=False)


def _border(crops: Pictures) -> Float[Tensor, "batch 3 pixels"]:
    """Return the outermost three pixels of each side."""
    sides = (crops[:, :, :3], crops[:, :, -3:], crops[..., :3], crops[..., -3:])
    return torch.cat([side.flatten(2) for side in sides], dim=2)


def _blurred(pictures: Tensor, side: int) -> Tensor:
    return F.avg_pool2d(pictures, side, stride=1, padding=side // 2)


def _around(spread: float, *shape: int) -> Tensor:
    """Return random numbers between `-spread` and `spread`."""
    return (2 * torch.rand(shape) - 1) * spread


if __name__ == "__main__":
    command(pretrain, SUPERVISION, steps=800)
