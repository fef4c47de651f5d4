"""Figures of a CUDA device: encoder, training step and loss at their real shapes.

Random-weight models and synthetic features; nothing is installed or fetched. The shapes are
arguments, so that a test can run the same code small on a CPU.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from transformers import Dinov2Config, Dinov2Model

from align.config import HeadConfig
from align.heads import AlignmentModel, build_model
from align.loader import Batch
from align.loss import LossOptions, Pairs, contrastive_loss
from align.optimizer import GPU_BLOCK_ROWS, Gradients, build_optimizer, set_learning_rate
from features.encoders.nvembed import NVEmbed
from pipeline.planning.step_memory import step_memory
from pipeline.run.config import load_config
from tests.benchmarks import extraction
from tests.benchmarks.captions import drift
from tests.benchmarks.figure import Figure, figure_of
from tests.benchmarks.nvembed import REAL, captions, operations, random_encoder
from tests.pairs import pairs_of

LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}


def seconds_each(
    work: Callable[[], object], device: torch.device, *, repeats: int, rounds: int = 3
) -> list[float]:
    """Time some calls in each of some rounds, after two calls that are not counted.

    The device is waited for.

    Returns:
        The seconds of a call, of each round.
    """

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for _ in range(2):
        work()
    found = []
    for _ in range(rounds):
        wait()
        started = time.perf_counter()
        for _ in range(repeats):
            work()
        wait()
        found.append((time.perf_counter() - started) / repeats)
    return found


def matrix_peak(device: torch.device, dtype: torch.dtype, size: int, repeats: int) -> float:
    """Measure the FLOP/s of one large square matrix product: the limit that is quoted here."""
    a = torch.randn(size, size, device=device, dtype=dtype)
    return 2 * size**3 / statistics.median(seconds_each(lambda: a @ a, device, repeats=repeats))


def encoder_figures(
    device: torch.device, dtype: torch.dtype, *, batch: int, peak: float, repeats: int
) -> list[Figure]:
    """DINOv2-L images/s at 224 pixels, and the share of the measured matrix peak."""
    config = Dinov2Config(**LARGE, image_size=518, patch_size=14)
    model = Dinov2Model(config).eval().to(device, dtype)
    pixels = torch.randn(batch, 3, 224, 224, device=device, dtype=dtype)
    with torch.inference_mode():
        seconds = seconds_each(lambda: model(pixels), device, repeats=repeats)
    width, layers, tokens = config.hidden_size, config.num_hidden_layers, 257
    flops = layers * (24 * tokens * width**2 + 4 * tokens**2 * width)  # products alone
    rates = [batch / each for each in seconds]
    shares = [rate * flops / peak for rate in rates]
    return [
        _figure("DINOv2-L images/s, 224 px", rates, "images/s", device, goal=2500.0),
        _figure("DINOv2-L share of the matrix peak", shares, "share", device),
    ]


def text_figures(
    device: torch.device,
    dtype: torch.dtype,
    *,
    config: dict[str, Any],
    count: int,
    peak: float,
    repeats: int,
) -> list[Figure]:
    """NV-Embed captions/s, packed, mean 20 and 90 tokens, and the share of the matrix peak.

    Tokenising is not counted: it runs beside the encoder. Captions share one budget of 32,768
    tokens, and there are `count` of them of each mean length.
    """
    encoder = random_encoder(config, device, dtype, 32_768)
    vocabulary = config["text_config"]["vocab_size"]
    figures = []
    for mean in (20, 90):
        ids = captions(count, mean, vocabulary)
        tokens = sum(map(len, ids))
        flops = sum(operations(cast(NVEmbed, encoder.model), len(i)) for i in ids)
        seconds = seconds_each(lambda: encoder.encode_tokens(ids), device, repeats=repeats)  # noqa: B023
        name = f"NV-Embed-v2 shape, {str(dtype).removeprefix('torch.')}, mean {mean} tokens"
        figures += [
            _figure(f"{name}: captions/s", [count / s for s in seconds], "captions/s", device),
            _figure(f"{name}: tokens/s", [tokens / s for s in seconds], "tokens/s", device),
            _figure(
                f"{name}: share of the matrix peak",
                [flops / s / peak for s in seconds],
                "share",
                device,
                goal=0.5,
            ),
        ]
    greatest = drift(encoder, captions(min(count, 256), 20, vocabulary))
    name = f"NV-Embed-v2 shape, {str(dtype).removeprefix('torch.')}: drift with the batch"
    return [*figures, _figure(name, [greatest], "difference", device)]


def extraction_figures(
    task: extraction.Task, *, rounds: int, compiled: bool = True
) -> list[Figure]:
    """Stage one end to end against the bare encoder, and that encoder alone, also compiled."""
    figures = extraction.ratio_figures(task, "DINOv2-L", goal=0.95, rounds=rounds, module="gpu")
    for words, settings in [("eager", {}), ("compiled", {"compile": True})][: 1 + compiled]:
        seconds = task.bare(task.encoder("exact", **settings))
        figures.append(
            figure_of(
                f"DINOv2-L as extraction runs it, {words}",
                [task.images / seconds() for _ in range(rounds)],
                unit="images/s",
                goal=None,
                direction="min",
                module="gpu",
                device=task.device.type,
            )
        )
    return figures


def step_figures(
    device: torch.device,
    recipe: str,
    dims: tuple[int, int],
    *,
    overrides: Sequence[str] = (),
    repeats: int,
) -> list[Figure]:
    """The product's own training step of a recipe, on features that lie on the device.

    Args:
        device: Where.
        recipe: Whose head, loss, optimizer and batch.
        dims: Lengths of the features of an image and of a caption.
        overrides: Of its settings.
        repeats: Steps of a round.
    """
    config = load_config(recipe, overrides).align
    model = build_model(
        dict(config.head),
        image_dim=dims[0],
        text_dim=dims[1],
        initial_scale=config.loss.initial_scale,
        initial_bias=config.loss.initial_bias,
    ).to(device)
    optimizer, rows = build_optimizer(model, config.optimizer), config.batch_size
    gradients = Gradients(model, config, ("short", "long"), seed=0, device=device)
    batch = Batch(
        rows=np.arange(rows),
        image=torch.randn(rows, dims[0], device=device).half(),
        text=torch.randn(rows, 2, dims[1], device=device).half(),
        fields=torch.arange(2, device=device).expand(rows, 2).contiguous(),
        caption_ids=None,
    )

    def step() -> None:
        gradients.backward(batch, 0)
        set_learning_rate(optimizer, 1e-6)
        optimizer.step()
        model.clamp_scale()

    seconds = seconds_each(step, device, repeats=repeats)
    name = f"training step of {recipe}, batch {rows}"
    figures = [_figure(name, seconds, "s", device, direction="max")]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        step()
        counted = step_memory(
            config.model_copy(update={"precision": "bfloat16"}),
            image_dim=dims[0],
            text_dim=dims[1],
            captions=2,
            rows_at_once=rows,
        )
        ratio = torch.cuda.max_memory_allocated(device) / counted.peak
        words = f"peak memory of a step of {recipe} / what `sail plan` counts"
        figures.append(_figure(words, [ratio], "ratio", device, goal=1.1, direction="max"))
    return figures


def loss_figures(device: torch.device, *, batches: list[int], repeats: int) -> list[Figure]:
    """The blocked loss with its gradients against the dense one, as long as that fits."""
    figures = []
    for batch in batches:
        image = torch.randn(batch, 768, device=device, requires_grad=True)
        text = torch.randn(batch, 1, 768, device=device, requires_grad=True)
        model = build_model(dict(HeadConfig(dim=8, depth=1)), image_dim=8, text_dim=8)
        model = model.to(device)
        pairs = pairs_of(torch.ones(batch, 1, device=device))

        def blocked() -> None:
            _loss(image, text, model, pairs).backward()  # noqa: B023

        def dense() -> None:
            images = torch.nn.functional.normalize(image, dim=-1)  # noqa: B023
            texts = torch.nn.functional.normalize(text[:, 0], dim=-1)  # noqa: B023
            logits = model.log_scale.exp() * images @ texts.T + model.bias  # noqa: B023
            signs = 2 * torch.eye(len(images), device=device) - 1
            (-torch.nn.functional.logsigmoid(signs * logits).sum() / len(images)).backward()

        ours = seconds_each(blocked, device, repeats=repeats)
        figures.append(_figure(f"blocked loss, batch {batch}", ours, "s", device, direction="max"))
        try:
            theirs = seconds_each(dense, device, repeats=repeats)
        except torch.OutOfMemoryError:
            continue
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        name = f"blocked loss / dense loss, batch {batch}"
        figures.append(_figure(name, ratios, "ratio of time", device, direction="max"))
    return figures


DEVICE, BFLOAT16 = torch.device("cuda"), torch.bfloat16


def _encoder() -> list[Figure]:
    peak = matrix_peak(DEVICE, BFLOAT16, 8192, 20)
    return [
        _figure("bf16 matrix peak, 8192 square", [peak / 1e12], "TFLOP/s", DEVICE),
        *encoder_figures(DEVICE, BFLOAT16, batch=256, peak=peak, repeats=10),
    ]


def _text() -> list[Figure]:
    half = torch.float16  # in which its reference computes
    peak = matrix_peak(DEVICE, half, 8192, 20)
    return text_figures(DEVICE, half, config=REAL, count=8192, peak=peak, repeats=1)


def _extraction() -> list[Figure]:
    with tempfile.TemporaryDirectory() as name:
        model = extraction.random_dinov2(Path(name) / "dino", **LARGE)
        task = extraction.Task(
            Path(name), model, DEVICE, images=32_768, distinct=1024, batch_size=256
        )
        return extraction_figures(task, rounds=3)


def _step() -> list[Figure]:
    return [
        *step_figures(DEVICE, "sail", (1024, 4096), repeats=10),
        *step_figures(DEVICE, "sail-paper", (2048, 4096), repeats=3),
    ]


def _loss_alone() -> list[Figure]:
    return loss_figures(DEVICE, batches=[16_384, 65_536, 131_072], repeats=3)


GROUPS = {
    "encoder": _encoder,
    "step": _step,
    "loss": _loss_alone,
    "text": _text,
    "extraction": _extraction,
}
"""What is measured and recorded together, each in a few minutes."""


def check_device() -> None:
    """Refuse to measure where there is no GPU.

    Raises:
        SystemExit: There is no CUDA device.
    """
    if not torch.cuda.is_available():
        raise SystemExit("make figures-gpu needs a CUDA device; none is here. Nothing was changed.")


def _loss(
    image: torch.Tensor, text: torch.Tensor, model: AlignmentModel, pairs: Pairs
) -> torch.Tensor:
    return contrastive_loss(
        image,
        text,
        log_scale=model.log_scale,
        bias=model.bias,
        pairs=pairs,
        options=LossOptions(block_rows=GPU_BLOCK_ROWS),
    )


def _figure(
    name: str,
    values: Sequence[float],
    unit: str,
    device: torch.device,
    *,
    goal: float | None = None,
    direction: str = "min",
) -> Figure:
    return figure_of(
        name,
        values,
        unit=unit,
        goal=goal,
        direction=direction,
        module="gpu",
        device=device.type,
    )


if __name__ == "__main__":
    check_device()
    for group in GROUPS.values():
        for figure in group():
            print(json.dumps(figure.as_dict()) if "--json" in sys.argv else figure, flush=True)
