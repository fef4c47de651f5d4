"""Figures of a CUDA device: encoder, training step and loss at their real shapes.

Random-weight models and synthetic features; nothing is installed or fetched. The shapes are
arguments, so that a test can run the same code small on a CPU.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from transformers import Dinov2Config, Dinov2Model

from align.config import HeadConfig, OptimizerConfig
from align.heads import AlignmentModel, build_model
from align.loss import LossOptions, Pairs, contrastive_loss
from align.optimizer import build_optimizer
from features.encoders.nvembed import NVEmbed
from tests.benchmarks import extraction
from tests.benchmarks.captions import drift
from tests.benchmarks.figure import Figure, figure_of, machine
from tests.benchmarks.nvembed import REAL, captions, operations, random_encoder
from tests.pairs import pairs_of

LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}


def seconds_each(work: Callable[[], object], device: torch.device, *, repeats: int) -> float:
    """Time some calls, after two that are not counted; the device is waited for."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for _ in range(2):
        work()
    wait()
    started = time.perf_counter()
    for _ in range(repeats):
        work()
    wait()
    return (time.perf_counter() - started) / repeats


def matrix_peak(device: torch.device, dtype: torch.dtype, size: int, repeats: int) -> float:
    """Measure the FLOP/s of one large square matrix product: the limit that is quoted here."""
    a = torch.randn(size, size, device=device, dtype=dtype)
    return 2 * size**3 / seconds_each(lambda: a @ a, device, repeats=repeats)


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
    rate = batch / seconds
    return [
        _figure("DINOv2-L images/s, 224 px", rate, "images/s", repeats, device, goal=2500.0),
        _figure("DINOv2-L share of the matrix peak", rate * flops / peak, "share", repeats, device),
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
            _figure(f"{name}: captions/s", count / seconds, "captions/s", repeats, device),
            _figure(f"{name}: tokens/s", tokens / seconds, "tokens/s", repeats, device),
            _figure(
                f"{name}: share of the matrix peak",
                flops / seconds / peak,
                "share",
                repeats,
                device,
                goal=0.5,
            ),
        ]
    greatest = drift(encoder, captions(min(count, 256), 20, vocabulary))
    name = f"NV-Embed-v2 shape, {str(dtype).removeprefix('torch.')}: drift with the batch"
    return [*figures, _figure(name, greatest, "difference", 1, device)]


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
    device: torch.device, dtype: torch.dtype, *, batch: int, repeats: int, scale: int = 1
) -> list[Figure]:
    """A whole training step on features that lie on the device, for both heads.

    All widths are divided by `scale`.
    """
    heads = {
        "glu of sail": (HeadConfig(kind="glu", dim=768 // scale, depth=8), 1024 // scale),
        "star as released": (HeadConfig(kind="star", dim=1024 // scale), 2048 // scale),
    }
    text_dim = 4096 // scale
    figures = []
    for name, (head, image_dim) in heads.items():
        model = build_model(dict(head), image_dim=image_dim, text_dim=text_dim).to(device)
        optimizer = build_optimizer(model, OptimizerConfig())
        image = torch.randn(batch, image_dim, device=device, dtype=torch.float16)
        text = torch.randn(2 * batch, text_dim, device=device, dtype=torch.float16)
        pairs = pairs_of(torch.ones(batch, 2, device=device))

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)  # noqa: B023
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                images = model.embed_image(image)  # noqa: B023
                texts = model.embed_text(text)  # noqa: B023
            _loss(images, texts.unflatten(0, (batch, 2)), model, pairs).backward()  # noqa: B023
            optimizer.step()  # noqa: B023

        seconds = seconds_each(step, device, repeats=repeats)
        figures.append(
            _figure(f"training step, {name}, batch {batch}", seconds, "s", repeats, device)
        )
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
        try:
            ratio = ours / seconds_each(dense, device, repeats=repeats)
        except torch.OutOfMemoryError:
            figures.append(
                _figure(f"blocked loss alone, batch {batch}", ours, "s", repeats, device)
            )
            continue
        name = f"blocked loss / dense loss, batch {batch}"
        figures.append(_figure(name, ratio, "ratio of time", repeats, device))
    return figures


def measure() -> list[Figure]:
    """Measure everything at its real shape.

    Raises:
        SystemExit: There is no CUDA device.
    """
    if not torch.cuda.is_available():
        raise SystemExit("make figures-gpu needs a CUDA device; none is here. Nothing was changed.")
    device, dtype = torch.device("cuda"), torch.bfloat16
    peak = matrix_peak(device, dtype, 8192, 20)
    with tempfile.TemporaryDirectory() as name:
        model = extraction.random_dinov2(Path(name) / "dino", **LARGE)
        task = extraction.Task(
            Path(name), model, device, images=32_768, distinct=1024, batch_size=256
        )
        extracted = extraction_figures(task, rounds=3)
    return [
        _figure("bf16 matrix peak, 8192 square", peak / 1e12, "TFLOP/s", 20, device),
        *encoder_figures(device, dtype, batch=256, peak=peak, repeats=10),
        *_text_figures_in_float16(device),
        *extracted,
        *step_figures(device, dtype, batch=16_384, repeats=10),
        *loss_figures(device, batches=[16_384, 65_536, 131_072], repeats=3),
    ]


def _text_figures_in_float16(device: torch.device) -> list[Figure]:
    """Measure NV-Embed in the type that its reference computes in."""
    half = torch.float16
    peak = matrix_peak(device, half, 8192, 20)
    return text_figures(device, half, config=REAL, count=8192, peak=peak, repeats=3)


def _loss(
    image: torch.Tensor, text: torch.Tensor, model: AlignmentModel, pairs: Pairs
) -> torch.Tensor:
    return contrastive_loss(
        image, text, log_scale=model.log_scale, bias=model.bias, pairs=pairs, options=LossOptions()
    )


def _figure(
    name: str,
    value: float,
    unit: str,
    repeats: int,
    device: torch.device,
    goal: float | None = None,
) -> Figure:
    return Figure(
        figure=name,
        value=float(f"{value:.5g}"),
        unit=unit,
        goal=goal,
        direction="min",
        n=repeats,
        spread=0.0,
        command="python -m tests.benchmarks.gpu",
        machine=machine(device.type),
    )


if __name__ == "__main__":
    for figure in measure():
        print(json.dumps(figure.as_dict()) if "--json" in sys.argv else figure)
