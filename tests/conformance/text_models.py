"""Tiny text models of random weights, of the real classes of transformers, as their folders lie."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.conformance.sentences import change
from tests.text_models import GROUPED, SMALL, llama_tokenizer

DECODER: dict[str, Any] = GROUPED | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TOWER: dict[str, Any] = {
    "vocab_size": 80,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 16,
    "patch_size": 8,
}
TOWERS: dict[str, Any] = {"text_config": TOWER, "vision_config": VISION, "projection_dim": 12}
T5: dict[str, Any] = {"vocab_size": 80, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2}
GPT: dict[str, Any] = {
    "vocab_size": 80,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 200,
}


@dataclass(frozen=True)
class TextModel:
    """A model, and what it should give by its name alone, or with some settings."""

    kind: str
    """Class in transformers that its folder is saved by."""
    config: dict[str, Any]
    use: dict[str, Any] = field(default_factory=dict)
    """Settings of the recipe."""
    reference: str = ""
    """Class in transformers that the reference runs; that of the folder if not given."""
    options: dict[str, Any] = field(default_factory=dict)
    """What the reference is told."""
    pooled: Callable[[Any], torch.Tensor] = lambda output: output.last_hidden_state.mean(1)
    files: dict[str, Any] = field(default_factory=dict)
    """Changes of config.json after it is saved."""
    padded: int = 0
    """Tokens that the reference pads every text to."""
    lower: bool = False

    def write(self, folder: Path) -> Path:
        """Write its folder, with a tokenizer of letters that adds `<s>`."""
        model_class = getattr(transformers, self.kind)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model_class(model_class.config_class(**self.config)).save_pretrained(folder)
        llama_tokenizer(folder)
        change(folder / "tokenizer_config.json", pad_token="<unk>")
        if self.files:
            change(folder / "config.json", **self.files)
        return folder


def _last(output: Any) -> torch.Tensor:
    states: torch.Tensor = output.last_hidden_state
    return states[:, -1]


def _auto_map(code: str) -> dict[str, Any]:
    return {"auto_map": {"AutoModel": code}}


BIDIRECTIONAL = {"is_causal": False}
MEAN, LAST = {"pooling": "mean"}, {"pooling": "last"}
ENCODERS = {
    name: TextModel(kind, SMALL | {"pad_token_id": 0} | config)
    for name, kind, config in (
        ("bert", "BertModel", {}),
        ("roberta", "RobertaModel", {}),
        ("xlm_roberta", "XLMRobertaModel", {}),
        ("camembert", "CamembertModel", {}),
        ("electra", "ElectraModel", {"embedding_size": 16}),
        ("albert", "AlbertModel", {"embedding_size": 16}),
        ("mpnet", "MPNetModel", {"pad_token_id": 1}),
        ("deberta_v2", "DebertaV2Model", {"relative_attention": True, "pos_att_type": ["p2c"]}),
        ("deberta", "DebertaModel", {"relative_attention": True, "pos_att_type": ["p2c"]}),
        ("ernie", "ErnieModel", {}),
        ("rembert", "RemBertModel", {"input_embedding_size": 16}),
        ("roformer", "RoFormerModel", {"embedding_size": 32}),
        ("roberta_prelayernorm", "RobertaPreLayerNormModel", {}),
        ("squeezebert", "SqueezeBertModel", {"embedding_size": 32}),
        ("data2vec_text", "Data2VecTextModel", {}),
        ("megatron_bert", "MegatronBertModel", {}),
        ("gte", "GteModel", {}),
        ("nomic_bert", "NomicBertModel", {}),
        ("modernbert", "ModernBertModel", {"bos_token_id": 1, "eos_token_id": 2}),
        ("eurobert", "EuroBertModel", {}),
    )
}
DECODERS = {
    f"{name}_{way}": TextModel(kind, config, use, pooled=pooled)
    for name, kind, config in (
        ("llama", "LlamaModel", DECODER),
        ("mistral", "MistralModel", DECODER),
        ("qwen2", "Qwen2Model", DECODER),
        ("qwen3", "Qwen3Model", DECODER),
        ("gemma", "GemmaModel", DECODER),
        ("gemma2", "Gemma2Model", DECODER | {"sliding_window": 8}),
        ("phi", "PhiModel", SMALL | {"pad_token_id": 0}),
        ("phi3", "Phi3Model", DECODER),
        ("olmo2", "Olmo2Model", DECODER),
        ("gpt2", "GPT2Model", GPT),
        ("gptj", "GPTJModel", GPT | {"rotary_dim": 4}),
        ("gpt_neox", "GPTNeoXModel", SMALL),
        ("opt", "OPTModel", SMALL | {"ffn_dim": 48, "word_embed_proj_dim": 32, "pad_token_id": 0}),
        ("bloom", "BloomModel", {"vocab_size": 80, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
        ("falcon", "FalconModel", SMALL | {"alibi": True}),
        ("qwen2_moe", "Qwen2MoeModel", DECODER | {"num_experts": 2, "num_experts_per_tok": 1}),
    )
    for way, use, pooled in (
        ("mean", MEAN, lambda output: output.last_hidden_state.mean(1)),
        ("last", LAST, _last),
    )
}
TOLD = {
    "is_causal_false": TextModel(
        "LlamaModel", DECODER, MEAN, options=BIDIRECTIONAL, files=BIDIRECTIONAL
    ),
    "told_bidirectional": TextModel(
        "MistralModel", DECODER, MEAN | {"attention": "bidirectional"}, options=BIDIRECTIONAL
    ),
    **{
        f"auto_map_{name}": TextModel(
            kind, DECODER, MEAN, options=BIDIRECTIONAL, files=_auto_map(code)
        )
        for name, kind, code in (
            ("gte_qwen2", "Qwen2Model", "modeling_qwen.Qwen2Model"),
            ("stella", "Qwen2Model", "NovaSearch/stella_en_1.5B_v5--modeling_qwen.Qwen2Model"),
            ("llm2vec", "LlamaModel", "modeling_llama_encoder.LlamaEncoderModel"),
            ("gritlm", "MistralModel", "modeling_gritlm7b.MistralModel"),
        )
    },
    "middle_layer": TextModel(
        "LlamaModel",
        DECODER,
        MEAN | {"layer": 1},
        options={"output_hidden_states": True},
        pooled=lambda output: output.hidden_states[1].mean(1),
    ),
    "weightedmean": TextModel(
        "GPT2Model",
        GPT,
        {"pooling": "weightedmean"},
        pooled=lambda output: (
            (
                output.last_hidden_state
                * (w := torch.arange(1, output.last_hidden_state.shape[1] + 1.0)[:, None])
            ).sum(1)
            / w.sum()
        ),
    ),
}
OTHERS = {
    "clip_text": TextModel("CLIPTextModel", TOWER, pooled=lambda output: output.pooler_output),
    "clip_text_projection": TextModel(
        "CLIPTextModelWithProjection",
        TOWER | {"projection_dim": 12},
        pooled=lambda output: output.text_embeds,
    ),
    "clip": TextModel(
        "CLIPModel",
        TOWERS,
        reference="CLIPTextModelWithProjection",
        pooled=lambda output: output.text_embeds,
    ),
    "metaclip_2": TextModel(
        "MetaClip2Model",
        TOWERS,
        reference="MetaClip2TextModelWithProjection",
        pooled=lambda output: output.text_embeds,
    ),
    "siglip": TextModel(
        "SiglipModel",
        TOWERS,
        reference="SiglipTextModel",
        pooled=lambda output: output.pooler_output,
        padded=40,
        lower=True,
    ),
    "siglip_text": TextModel(
        "SiglipTextModel", TOWER, pooled=lambda output: output.pooler_output, padded=40, lower=True
    ),
    "t5": TextModel("T5EncoderModel", T5 | {"num_heads": 4}),
    "mt5": TextModel("MT5EncoderModel", T5 | {"num_heads": 4}),
    "umt5": TextModel("UMT5EncoderModel", T5 | {"num_heads": 4}),
    "t5_whole": TextModel("T5Model", T5 | {"num_heads": 4}, reference="T5EncoderModel"),
    "distilbert": TextModel(
        "DistilBertModel",
        {"vocab_size": 80, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}
        | {"max_position_embeddings": 200},
    ),
    "xlnet": TextModel(
        "XLNetModel", {"vocab_size": 80, "d_model": 32, "n_layer": 2, "n_head": 4}, MEAN
    ),
}
TEXT_MODELS: dict[str, TextModel] = ENCODERS | DECODERS | TOLD | OTHERS
