"""NV-Embed (v1 and v2) over the Mistral of transformers, without code from the hub.

A Mistral trunk in which every token sees every other, then an attention of its tokens over a small
trained dictionary of latents, then the mean over the tokens behind the instruction. The
checkpoint's licence is CC-BY-NC-4.0: what is made with it is for non-commercial use.

Reference:
    Lee et al. 2024, NV-Embed: Improved Techniques for Training LLMs as Generalist Embedding Models,
    arXiv:2405.17428, section 3. The names of the weights are those of the hub's checkpoint.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Float32
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import MistralConfig, MistralModel
from transformers.models.mistral.modeling_mistral import MistralRotaryEmbedding

from features.encoders.packing import PACKED_ATTENTION, TokenBatch, pool_tokens, split_runs
from features.errors import EncoderError

LICENCE = "cc-by-nc-4.0"
TOKENS_AT_ONCE = 4096  # of the latent attention, whose inner width is eight times that of the trunk
TRUNK_SETTINGS = (
    *("vocab_size", "hidden_size", "intermediate_size", "hidden_act", "max_position_embeddings"),
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("rms_norm_eps", "rope_theta"),
)
LATENT_DEFAULTS = {
    "num_latents_value": 512,
    "latent_dim": 4096,
    "hidden_dim": 4096,
    "num_cross_heads": 8,
    "cross_dim_head": 4096,
    "output_normalize": True,
}
# What the modules below are called in the checkpoint.
HUB_NAMES = {
    "trunk": "embedding_model",
    "latent.latents": "latent_attention_model.latents",
    "latent.query_norm": "latent_attention_model.cross_attend_blocks.0.norm",
    "latent.latent_norm": "latent_attention_model.cross_attend_blocks.0.norm_context",
    "latent.to_query": "latent_attention_model.cross_attend_blocks.0.fn.to_q",
    "latent.to_key_value": "latent_attention_model.cross_attend_blocks.0.fn.to_kv",
    "latent.to_out": "latent_attention_model.cross_attend_blocks.0.fn.to_out",
    "latent.gate_norm": "latent_attention_model.cross_attend_blocks.1.norm",
    "latent.widen": "latent_attention_model.cross_attend_blocks.1.fn.net.0",
    "latent.narrow": "latent_attention_model.cross_attend_blocks.1.fn.net.2",
}


class NVEmbed(nn.Module):
    """The whole model: a batch of tokens in, one vector per sequence out.

    Args:
        config: What is in the checkpoint's config.json.
        instruction_tokens: Tokens at the head of every sequence that are not pooled.
    """

    def __init__(self, config: dict[str, Any], *, instruction_tokens: int = 0) -> None:
        super().__init__()
        latent = LATENT_DEFAULTS | config["latent_attention_config"]
        self.instruction_tokens = instruction_tokens
        self.output_normalize = bool(latent["output_normalize"])
        self.trunk = MistralModel(_trunk_config(config["text_config"]))
        self.latent = LatentAttention(latent)

    def forward(self, batch: TokenBatch) -> Float32[Tensor, "sequences dim"]:
        """Return one vector per sequence, of length 1 where the checkpoint says so.

        Raises:
            EncoderError: A sequence has no token behind the instruction.
        """
        if batch.shortest <= self.instruction_tokens:
            raise EncoderError(
                f"A caption has {batch.shortest} tokens after cutting at max_length, and the "
                f"{self.instruction_tokens} of the instruction are not pooled. At least one token "
                f"behind the instruction was expected. Raise max_length, or shorten the "
                f"instruction."
            )
        states = self.trunk(
            input_ids=batch.ids[None], position_ids=batch.positions[None], token_batch=batch
        ).last_hidden_state[0]
        runs = batch.runs
        if skip := self.instruction_tokens:
            states = torch.cat([run[:, skip:].flatten(0, 1) for run in split_runs(states, runs)])
            runs = tuple((count, length - skip) for count, length in runs)
        tokens = torch.cat([self.latent(rows) for rows in states.split(TOKENS_AT_ONCE)])
        pooled = pool_tokens(tokens, runs, "mean")
        return F.normalize(pooled, dim=-1) if self.output_normalize else pooled


class LatentAttention(nn.Module):
    """Each token attends over the latents, then passes a gated layer; tokens never meet.

    The keys and values of the latents do not depend on the input: `prepare` computes them once.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width, self.heads = config["latent_dim"], config["num_cross_heads"]
        inner = self.heads * config["cross_dim_head"]
        self.latents = nn.Parameter(torch.empty(config["num_latents_value"], width))
        self.query_norm = nn.LayerNorm(width)
        self.latent_norm = nn.LayerNorm(config["hidden_dim"])
        self.to_query = nn.Linear(width, inner, bias=False)
        self.to_key_value = nn.Linear(config["hidden_dim"], 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)
        self.gate_norm = nn.LayerNorm(width)
        self.widen = nn.Linear(width, 8 * width)
        self.narrow = nn.Linear(4 * width, width)

    @torch.no_grad()
    def prepare(self) -> None:
        """Compute the keys and values; call this once the weights are there."""
        key, value = self.to_key_value(self.latent_norm(self.latents)).chunk(2, dim=-1)
        key, value = (tensor.unflatten(-1, (self.heads, -1)) for tensor in (key, value))
        scale = key.shape[-1] ** -0.5
        self.key = (key * scale).permute(1, 2, 0).contiguous()  # heads, head_dim, latents
        self.value = value.transpose(0, 1).contiguous()  # heads, latents, head_dim

    def forward(self, states: Float[Tensor, "tokens dim"]) -> Float[Tensor, "tokens dim"]:
        """Return what becomes of each token."""
        query = self.to_query(self.query_norm(states)).unflatten(-1, (self.heads, -1))
        scores = query.transpose(0, 1) @ self.key  # heads, tokens, latents
        weights = scores.softmax(-1, dtype=torch.float32).to(states.dtype)
        attended = (weights @ self.value).transpose(0, 1).flatten(1)
        states = self.to_out(attended) + states
        wide, gate = self.widen(self.gate_norm(states)).chunk(2, dim=-1)
        result: Tensor = self.narrow(wide * F.gelu(gate)) + states
        return result


def load_nvembed(
    folder: Path,
    config: dict[str, Any],
    *,
    instruction_tokens: int,
    device: torch.device,
    dtype: torch.dtype,
) -> NVEmbed:
    """Load a checkpoint straight to its device and type, one tensor at a time.

    Args:
        folder: Holds the safetensors, in one file or in shards.
        config: What is in its config.json.
        instruction_tokens: Tokens at the head of every sequence that are not pooled.
        device: Where the weights go.
        dtype: What they are turned into.

    Raises:
        EncoderError: The settings or the weights are not those of this model.
    """
    try:
        with torch.device("meta"):  # no memory is taken until the weights are read
            model = NVEmbed(config, instruction_tokens=instruction_tokens)
    except (KeyError, TypeError, ValueError) as error:
        raise EncoderError(
            f"{folder / 'config.json'} does not describe an NV-Embed model: "
            f"{type(error).__name__} {error}. The `text_config` and `latent_attention_config` of "
            f"the hub's checkpoint were expected. Fetch the file from where the weights came from."
        ) from error
    _read_weights(model, folder, device, dtype)
    # Its table of frequencies is no weight; it stays float32, whatever the type of the weights.
    model.trunk.rotary_emb = MistralRotaryEmbedding(model.trunk.config).to(device)
    model.latent.prepare()
    return model.eval().requires_grad_(False)


def _trunk_config(text_config: dict[str, Any]) -> MistralConfig:
    given = {name: text_config[name] for name in TRUNK_SETTINGS if name in text_config}
    # The checkpoint's sliding window is not applied by the reference, and nothing is causal.
    return MistralConfig(
        **given,
        sliding_window=None,
        use_cache=False,
        is_causal=False,
        attn_implementation=PACKED_ATTENTION,
    )


def _read_weights(model: NVEmbed, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
    files: dict[str, Path] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as file:
            files |= dict.fromkeys(file.keys(), path)
    ours = {_hub_name(name): (name, weight) for name, weight in model.named_parameters()}
    _check_same(folder, files.keys(), ours.keys())
    for path in sorted(set(files.values())):
        with safe_open(path, framework="pt", device=str(device)) as file:
            for hub_name in file.keys():  # noqa: SIM118 - it is no dict
                name, expected = ours[hub_name]
                weight = file.get_tensor(hub_name)
                if weight.shape != expected.shape:
                    raise EncoderError(
                        f"{path} has {hub_name} of shape {tuple(weight.shape)}. By the config.json "
                        f"beside it {tuple(expected.shape)} was expected. Fetch both from the same "
                        f"revision."
                    )
                owner, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(owner), leaf, nn.Parameter(weight.to(dtype), False))


def _hub_name(name: str) -> str:
    for ours, theirs in HUB_NAMES.items():
        if name == ours or name.startswith(ours + "."):
            return theirs + name.removeprefix(ours)
    raise KeyError(name)


def _check_same(folder: Path, found: Iterable[str], expected: Iterable[str]) -> None:
    missing, unexpected = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or unexpected:
        raise EncoderError(
            f"The weights in {folder} are not those of an NV-Embed model: {len(missing)} are "
            f"missing ({_some(missing)}), {len(unexpected)} are unexpected ({_some(unexpected)}). "
            f"All shards of the hub's checkpoint were expected. Fetch those that are missing, or "
            f"choose another model."
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "") if names else "none"
