"""NV-Embed of random weights at any size, and the way the released SAIL code runs it."""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import MistralModel
from transformers.models.mistral.modeling_mistral import MistralRotaryEmbedding

from features.encoders.nvembed import NVEmbed
from features.encoders.packing import Tokens
from features.encoders.text import TextEncoder
from features.encoders.tokenizer import CaptionTokenizer

REAL: dict[str, Any] = {
    "text_config": {
        "vocab_size": 32_000,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-5,
    },
    "latent_attention_config": {},
}
# All widths by 16, half the layers and half the latents: so the latents' keys and values still cost
# as much as 20 tokens of the trunk.
SCALED: dict[str, Any] = {
    "text_config": REAL["text_config"]
    | {
        "vocab_size": 4000,
        "hidden_size": 256,
        "intermediate_size": 896,
        "num_hidden_layers": 16,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
    },
    "latent_attention_config": {
        "num_latents_value": 256,
        "latent_dim": 256,
        "hidden_dim": 256,
        "cross_dim_head": 256,
    },
}


def random_encoder(
    config: dict[str, Any], device: torch.device, dtype: torch.dtype, tokens_per_batch: int
) -> TextEncoder:
    """Make an encoder of random weights on the device, at no time larger than they are."""
    with torch.device("meta"):
        model = NVEmbed(config).to(dtype)
    model = model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            weight.data.normal_(0, 0.02, generator=generator)
        else:
            weight.data.fill_(0.0 if name.endswith("bias") else 1.0)
    model.trunk.rotary_emb = MistralRotaryEmbedding(model.trunk.config).to(device)
    model.latent.prepare()
    return TextEncoder(
        name="nv-embed",
        model=model.eval().requires_grad_(False),
        tokenise=CaptionTokenizer(None, 512),
        tokens_per_batch=tokens_per_batch,
        equal_lengths=False,
        first_position=0,
        device=device,
        dim=model.trunk.config.hidden_size,
        fingerprint={},
    )


def captions(count: int, mean: float, vocabulary: int, seed: int = 0) -> list[Tokens]:
    """Draw token sequences whose lengths are lognormal (sigma 0.5), from 3 to 512."""
    random = np.random.default_rng(seed)
    lengths = random.lognormal(np.log(mean) - 0.125, 0.5, count).round().clip(3, 512)
    return [random.integers(3, vocabulary, int(length)).tolist() for length in lengths]


def operations(model: NVEmbed, length: int) -> float:
    """Count the floating-point operations of the matrix products for one sequence."""
    linear = [part.weight.numel() for part in model.modules() if isinstance(part, torch.nn.Linear)]
    per_token: float = sum(linear) - model.latent.to_key_value.weight.numel()
    per_token += model.latent.key.numel() + model.latent.value.numel()
    trunk = model.trunk.config
    per_token += 2 * length * trunk.hidden_size * trunk.num_hidden_layers
    return 2.0 * per_token * length


class ReleasedWay:
    """The same weights as the released SAIL code runs them.

    An unsorted list in batches, padded to the longest of the batch, with a mask in every layer;
    and the keys and values of the latents computed anew for every sequence. Its batches have 128
    captions here; the released code runs all that it reads at once as one batch, which pads more.
    """

    def __init__(self, model: NVEmbed, captions_per_batch: int = 128) -> None:
        config = copy.deepcopy(model.trunk.config)
        config._attn_implementation = "sdpa"
        self.trunk = MistralModel(config).eval().requires_grad_(False)
        self.trunk.load_state_dict(model.trunk.state_dict())
        self.latent = model.latent
        self.captions_per_batch = captions_per_batch

    @torch.inference_mode()
    def encode_tokens(self, ids: Sequence[Tokens]) -> np.ndarray:
        """Return one vector of length 1 per sequence."""
        starts = range(0, len(ids), self.captions_per_batch)
        return np.concatenate([self._batch(ids[i : i + self.captions_per_batch]) for i in starts])

    def _batch(self, ids: Sequence[Tokens]) -> np.ndarray:
        longest = max(map(len, ids))
        padded = torch.tensor([tokens + [2] * (longest - len(tokens)) for tokens in ids])
        mask = torch.tensor([[1] * len(t) + [0] * (longest - len(t)) for t in ids])
        states = self.trunk(input_ids=padded, attention_mask=mask).last_hidden_state
        tokens = self._latent_attention(states) * mask.unsqueeze(-1)
        pooled: np.ndarray = F.normalize(tokens.sum(1) / mask.sum(1, keepdim=True), dim=-1).numpy()
        return pooled

    def _latent_attention(self, states: Tensor) -> Tensor:
        latent = self.latent
        repeated = latent.latents.expand(len(states), -1, -1).contiguous()
        keys_values = latent.to_key_value(latent.latent_norm(repeated)).chunk(2, dim=-1)
        query = latent.to_query(latent.query_norm(states))
        q, k, v = (
            tensor.unflatten(-1, (latent.heads, -1)).transpose(1, 2)
            for tensor in (query, *keys_values)
        )
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        states = latent.to_out(attended) + states
        wide, gate = latent.widen(latent.gate_norm(states)).chunk(2, dim=-1)
        result: Tensor = latent.narrow(wide * F.gelu(gate)) + states
        return result
