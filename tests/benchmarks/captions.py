"""Captions through NV-Embed: tokens computed, speed beside the released way, drift with the batch.

Random weights; captions of lognormal length, mean 20 and mean 90 tokens.
"""

import json
import sys
import time
from typing import cast

import numpy as np
import torch

from features.config import TextEncoderConfig
from features.encoders import TextEncoder, load_text_encoder
from features.encoders.nvembed import NVEmbed
from features.encoders.packing import Tokens
from pipeline.run.cpu import keep_freed_memory
from tests import text_models
from tests.benchmarks.figure import Figure, figure_of
from tests.benchmarks.nvembed import SCALED, ReleasedWay, captions, random_encoder

CPU = torch.device("cpu")
SMALL = {
    "text_config": text_models.GROUPED | {"max_position_embeddings": 512},
    "latent_attention_config": text_models.NVEMBED["latent_attention_config"],
}


def computed_over_real(encoder: TextEncoder, ids: list[Tokens]) -> float:
    """Return the tokens that went into the model over those of the captions."""
    computed = 0

    def count(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        nonlocal computed
        computed += inputs[0].numel()

    embedding = encoder.model.get_submodule("trunk.embed_tokens")
    with embedding.register_forward_pre_hook(count):
        encoder.encode_tokens(ids)
    return computed / sum(map(len, ids))


def seconds(encoder: TextEncoder | ReleasedWay, ids: list[Tokens]) -> float:
    """Time one pass."""
    started = time.perf_counter()
    encoder.encode_tokens(ids)
    return time.perf_counter() - started


def drift(encoder: TextEncoder, ids: list[Tokens]) -> float:
    """Return the greatest difference of a value of a caption's vector in a batch and alone."""
    together = encoder.encode_tokens(ids)
    alone = np.concatenate([encoder.encode_tokens([tokens]) for tokens in ids])
    return float(np.abs(together - alone).max())


def padding_figures(count: int) -> list[Figure]:
    """Tokens computed over real tokens, for one chunk of captions."""
    encoder = random_encoder(SMALL, CPU, torch.float32, 2048)
    return [
        figure_of(
            f"caption tokens computed / real, mean {mean}",
            [computed_over_real(encoder, captions(count, mean, 80))],
            unit="ratio of tokens",
            goal=1.03,
            direction="max",
            module="captions",
        )
        for mean in (20, 90)
    ]


def speed_figures(counts: dict[int, int], rounds: int) -> list[Figure]:
    """Captions/s over those of the released way, on the same scaled weights.

    Args:
        counts: How many captions of each mean length.
        rounds: Measurements; the two are timed in turn.

    Raises:
        RuntimeError: The two do not give the same vectors.
    """
    encoder = random_encoder(SCALED, CPU, torch.float32, 2048)
    released = ReleasedWay(cast(NVEmbed, encoder.model))
    figures = []
    for mean, count in counts.items():
        ids = captions(count, mean, 4000)
        difference = np.abs(encoder.encode_tokens(ids[:64]) - released.encode_tokens(ids[:64]))
        if difference.max() > 1e-5:
            raise RuntimeError(f"the two ways differ by {difference.max():.2g}")
        ratios = [seconds(released, ids) / seconds(encoder, ids) for _ in range(rounds)]
        figures.append(
            figure_of(
                f"captions/s / released way, NV-Embed shape, mean {mean}",
                ratios,
                unit="ratio of captions/s",
                goal=2.5,
                direction="min",
                module="captions",
            )
        )
    return figures


def drift_figures(count: int) -> list[Figure]:
    """How much a caption's vector depends on what shares its batch, in MiniLM (values up to 2)."""
    figures = []
    for precision, goal in (("float32", 1e-5), ("bfloat16", None), ("float16", None)):
        settings = TextEncoderConfig.model_validate(
            {"model": "bundled:minilm", "precision": precision}
        )
        encoder = load_text_encoder("minilm", settings, CPU)
        figures.append(
            Figure(
                figure=f"drift of a caption's vector with its batch, MiniLM, {precision}",
                value=float(f"{drift(encoder, captions(count, 20, 29_000)):.2g}"),
                unit="difference",
                goal=goal,
                direction="max",
                n=count,
                spread=0.0,
                command="python -m tests.benchmarks.captions",
            )
        )
    return figures


def measure(count: int = 4096, rounds: int = 3) -> list[Figure]:
    """Measure all; `count` captions for the padding, fewer for what takes longer."""
    keep_freed_memory()
    return [
        *padding_figures(count),
        *speed_figures({20: max(count // 21, 2), 90: max(count // 42, 2)}, rounds),
        *drift_figures(max(count // 64, 2)),
    ]


if __name__ == "__main__":
    for figure in measure():
        print(json.dumps(figure.as_dict()) if "--json" in sys.argv else figure)
