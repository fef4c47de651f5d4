"""A LLaVA of random weights learns questions on scenes: `python -m tests.benchmarks.llava RUN`.

RUN is a trained run of the demo. Its image encoder is the vision tower, once with its trained head
behind it and once without; the tower is frozen, the projector and a language model of two layers
are trained from the same seeds, on the same pictures and questions, for the same steps. Asked is
the colour or the shape of the largest object, of pictures that were not trained on. Printed with
it is what the answer commonest in training would have got, which needs no picture.
"""

import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from transformers import AutoConfig, AutoModel, LlamaConfig, LlavaForConditionalGeneration

from features.scenes.shards import SPLITS
from features.scenes.world import COLOURS, SHAPES
from pipeline.export.exports import export_run
from pipeline.export.llava import AlignedVisionConfig, AlignedVisionModel, llava_config
from tests.demo_encoder.batches import draw_batch, normalised, standardised

START, IMAGE, ASK_COLOUR, ASK_SHAPE, FIRST_ANSWER = range(5)
BATCH = 64
PICTURES = 2_000
ASKED = 500
STEPS = 400
SEEDS = 3


@dataclass(frozen=True)
class Questions:
    """Pictures, with a question about each and its one-word answer."""

    pixels: Float[Tensor, "pictures 3 height width"]
    asks: Int64[Tensor, "pictures"]
    answers: Int64[Tensor, "pictures"]

    @classmethod
    def draw(cls, split: str, count: int, seed: int) -> "Questions":
        """Draw scenes of a split of the demo world; every second question is of the shape."""
        batch = draw_batch((seed, SPLITS[split]), 0, count)
        labels = torch.from_numpy(batch.labels)
        of_shape = torch.arange(count) % 2 == 1
        colours, shapes = labels % len(COLOURS), labels // len(COLOURS)
        return cls(
            pixels=standardised(normalised(torch.from_numpy(batch.pixels))),
            asks=torch.where(of_shape, ASK_SHAPE, ASK_COLOUR),
            answers=FIRST_ANSWER + torch.where(of_shape, len(COLOURS) + shapes, colours),
        )

    def tokens(self, chosen: Tensor, pieces: int) -> Int64[Tensor, "batch tokens"]:
        """Return start, the pieces of the image, the question, the answer."""
        start = torch.full((len(chosen), 1), START)
        image = torch.full((len(chosen), pieces), IMAGE)
        return torch.cat([start, image, self.asks[chosen, None], self.answers[chosen, None]], dim=1)


def build(folder: Path, *, aligned: bool) -> Any:
    """Return a LLaVA on the exported tower, with its head or without."""
    config = AutoConfig.from_pretrained(folder)
    tower = AutoModel.from_pretrained(folder)
    if not aligned:
        bare = AlignedVisionConfig(
            **config.to_dict() | {"head": None, "hidden_size": config.feature_size}
        )
        encoder = tower.encoder
        tower = AlignedVisionModel(bare)
        tower.encoder.load_state_dict(encoder.state_dict())
        config = bare
    language_model = LlamaConfig(
        vocab_size=FIRST_ANSWER + len(COLOURS) + len(SHAPES),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    model = LlavaForConditionalGeneration(llava_config(config, language_model, image_token=IMAGE))
    model.model.vision_tower = tower.eval().requires_grad_(False)
    return model


def train(model: Any, questions: Questions, seed: int, steps: int) -> list[float]:
    """Train what is not frozen; return the loss of every step, in nats for the answer's word."""
    random = torch.Generator().manual_seed(seed)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=2e-3)
    losses = []
    for _ in range(steps):
        chosen = torch.randint(len(questions.asks), (BATCH,), generator=random)
        ids = questions.tokens(chosen, model.config.image_seq_length)
        labels = ids.clone()
        labels[:, :-1] = -100  # only the answer counts
        loss = model(input_ids=ids, pixel_values=questions.pixels[chosen], labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    return losses


@torch.no_grad()
def accuracy(model: Any, questions: Questions) -> float:
    """Return the share of questions whose answer is the likeliest of all words."""
    right = 0
    for chosen in torch.arange(len(questions.asks)).split(BATCH):
        ids = questions.tokens(chosen, model.config.image_seq_length)[:, :-1]
        logits = model(input_ids=ids, pixel_values=questions.pixels[chosen]).logits[:, -1]
        right += int((logits.argmax(1) == questions.answers[chosen]).sum())
    return right / len(questions.asks)


def without_looking(known: Questions, asked: Questions) -> float:
    """Return the share of questions right if each gets the answer commonest in training."""
    right = 0
    for kind in (ASK_COLOUR, ASK_SHAPE):
        commonest = known.answers[known.asks == kind].mode().values
        right += int((asked.answers[asked.asks == kind] == commonest).sum())
    return right / len(asked.asks)


def compare(
    folder: Path, known: Questions, asked: Questions, *, steps: int, seeds: int
) -> Iterator[tuple[str, list[list[float]], list[float]]]:
    """Yield a tower's name, the losses of each seed, and the share of right answers of each."""
    for name, aligned in (("with the trained head", True), ("encoder alone", False)):
        losses, right = [], []
        for seed in range(seeds):
            torch.manual_seed(seed)
            model = build(folder, aligned=aligned)
            losses.append(train(model, known, seed, steps))
            right.append(accuracy(model, asked))
        yield name, losses, right


def main(run: Path) -> None:
    """Compare the two towers, and print a table."""
    asked = Questions.draw("test", ASKED, seed=0)
    known = Questions.draw("train", PICTURES, seed=0)
    print(f"the commonest answers, without a picture: {without_looking(known, asked):.3f}")
    print("| tower | loss, first 10 steps | loss, last 10 steps | right of those not seen |")
    print("| --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as name:
        folder = export_run(run, "llava", Path(name) / "tower")
        rows = compare(folder, known, asked, steps=STEPS, seeds=SEEDS)
        for tower, losses, right in rows:
            first = [statistics.mean(each[:10]) for each in losses]
            last = [statistics.mean(each[-10:]) for each in losses]
            print(f"| {tower} | {_said(first)} | {_said(last)} | {_said(right)} |", flush=True)


def _said(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
