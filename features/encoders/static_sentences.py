"""Folders of sentence-transformers whose first module is a table: the mean of a text's vectors.

Tokens and table are read here, as StaticEmbedding of that library does (whole texts, no special
tokens); nothing of it, and nothing of model2vec, is needed.
"""

from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from features.config import TextEncoderConfig
from features.encoders.checkpoint import EncoderFiles, read_modules, versions
from features.encoders.libraries import check_only
from features.encoders.own_functions import BytesOfText, texts_of
from features.encoders.packing import TokenBatch
from features.encoders.plan import Decision, EncoderPlan, PlanBuilder
from features.encoders.sentence_modules import (
    STATIC,
    Behind,
    SentenceModules,
    read_sentence_modules,
)
from features.encoders.text import TextEncoder, batch_budget
from features.encoders.text_plan import decide_prompt
from features.encoders.weights import check_files, fenced
from features.errors import EncoderError

TOKENS, WEIGHTS = "tokenizer.json", "model.safetensors"
WAY_OUT = (
    "tokenizer.json and model.safetensors as sentence-transformers writes them were expected. "
    "Fetch them again."
)


def is_static(files: EncoderFiles) -> bool:
    """Return whether the first module of a folder is a table of vectors."""
    modules = read_modules(files.folder)
    return bool(modules) and str(modules[0].get("type")).rpartition(".")[2] == STATIC


def resolve_static(
    config: TextEncoderConfig, files: EncoderFiles
) -> tuple[EncoderPlan, SentenceModules]:
    """Decide how a table is used; its weights are not read.

    Raises:
        EncoderError: Its files ask for what is not there, or the recipe for more than it does.
    """
    check_only(config, "a table of vectors", pooling="mean", others=("dim", "normalise", "prompt"))
    modules = read_sentence_modules(files.folder)
    made = PlanBuilder()
    made.decisions["trunk"] = Decision("static embeddings", "modules.json")
    made.decisions["pooling"] = Decision("mean", f"{STATIC} in modules.json")
    made.decisions["max_length"] = Decision(None, f"{STATIC} reads whole texts")
    decide_prompt(made, config, modules)
    named = [f"{kind} ({place})" for kind, place in modules.behind]
    made.decisions["behind"] = Decision(named, "modules.json")
    made.decide("dim", config.dim, Decision("all", "no file"))
    made.decide("normalise", config.normalise or None, Decision(False, "the store's format"))
    own = str((files.trunk / TOKENS).relative_to(files.folder))
    plan = EncoderPlan(
        "text",
        config.model,
        made.decisions,
        modules.files | {own: files.trunk / TOKENS},
        tuple(made.contradictions),
    )
    return plan, modules


def load_static(
    name: str, files: EncoderFiles, config: TextEncoderConfig, device: torch.device
) -> TextEncoder:
    """Load a table as a text encoder, in float32.

    Raises:
        EncoderError: Its files are damaged or do not fit each other, or it has fewer numbers than
            `dim` asks for.
    """
    plan, modules = resolve_static(config, files)
    check_files(files.trunk, WEIGHTS)
    with fenced(f"The tokens and the table in {files.trunk} cannot be read", WAY_OUT):
        tokenizer = Tokenizer.from_file(str(files.trunk / TOKENS))
        tokenizer.no_padding()
        table = _table(load_file(files.trunk / WEIGHTS))
    ids = tokenizer.get_vocab(with_added_tokens=True).values()
    if max(ids, default=0) >= len(table):
        raise EncoderError(
            f"{files.trunk / TOKENS} has the token {max(ids)}, but the table in {WEIGHTS} has "
            f"{len(table)} vectors. One for each token was expected. Fetch both again from one "
            f"revision."
        )
    if table.ndim != 2 or not table.isfinite().all():
        raise EncoderError(
            f"The weights in {files.trunk}, of shape {tuple(table.shape)}, are not finite or no "
            f"table. Finite vectors of one length were expected. Fetch them again."
        )
    behind = Behind(files.folder, modules.behind)
    model = StaticSentences(tokenizer, table, behind, config).to(device)
    with fenced(f"{config.model} cannot encode a text", WAY_OUT):
        whole = behind.to("cpu")(torch.zeros(1, table.shape[1])).shape[1]
    behind.to(device)
    if config.dim is not None and config.dim > whole:
        raise EncoderError(
            f"dim = {config.dim}, but {config.model} gives {whole} numbers. At most as many were "
            f"expected. Lower dim."
        )
    dim = config.dim or whole
    fingerprint = files.fingerprint() | {
        "pooling": plan["pooling"],
        "instruction": plan["prompt"],
        "dtype": "float32",
        "dim": dim,
        "files": plan.digests(),
        "versions": versions("torch", "tokenizers"),
    }
    return TextEncoder(
        name=name,
        model=model,
        tokenise=BytesOfText(plan["prompt"]),
        tokens_per_batch=batch_budget(config, device),
        equal_lengths=False,
        first_position=0,
        device=device,
        dim=dim,
        fingerprint=fingerprint | ({"normalise": True} if config.normalise else {}),
        plan=plan,
    )


def _table(weights: dict[str, Tensor]) -> Tensor:
    """Return one vector for each token; files of model2vec keep shared ones and their weights."""
    if "embedding.weight" in weights:
        return weights["embedding.weight"].float()
    table = weights["embeddings"].float()
    if "mapping" in weights:
        table = table[weights["mapping"].long()]
    return table * weights["weights"].float()[:, None] if "weights" in weights else table


class StaticSentences(nn.Module):
    """A table, and what follows it; captions come as bytes."""

    def __init__(
        self, tokenizer: Any, table: Tensor, behind: nn.Module, config: TextEncoderConfig
    ) -> None:
        super().__init__()
        self.tokenizer, self.behind = tokenizer, behind
        self.embedding = nn.EmbeddingBag.from_pretrained(table)
        self.dim, self.normalise = config.dim, config.normalise

    def forward(self, batch: TokenBatch) -> Float[Tensor, "sequences dim"]:
        """Return a vector for each caption; NaN for one without any token."""
        made = self.tokenizer.encode_batch(texts_of(batch), add_special_tokens=False)
        ids = [torch.tensor(each.ids, dtype=torch.long) for each in made]
        lengths = torch.tensor([len(each) for each in ids])
        device = self.embedding.weight.device
        starts = (lengths.cumsum(0) - lengths).to(device)
        vectors: Tensor = self.behind(self.embedding(torch.cat(ids).to(device), starts))[
            :, : self.dim
        ]
        if self.normalise:
            vectors = F.normalize(vectors, dim=-1)
        return vectors.masked_fill((lengths == 0).to(device)[:, None], torch.nan)
