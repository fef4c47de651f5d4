"""Models that ask for code from the hub beside a type of transformers: what that code does."""

from pathlib import Path
from typing import Any

from features.errors import EncoderError

# What code from the hub does with a type that transformers has too; None: nothing else.
REMOTE_CODE: dict[str, str | None] = {
    "modeling_qwen.Qwen2Model": "bidirectional",  # gte-Qwen2, stella_en_1.5B
    "modeling_gritlm7b.MistralModel": "bidirectional",
    "modeling_llama_encoder.LlamaEncoderModel": "bidirectional",  # LLM2Vec
    "modeling_mistral_encoder.MistralEncoderModel": "bidirectional",
    "modeling_qwen2_encoder.Qwen2EncoderModel": "bidirectional",
    "modeling_gemma_encoder.GemmaEncoderModel": "bidirectional",
    "modeling_hf_nomic_bert.NomicBertModel": None,
}


def check_remote_code(settings: dict[str, Any], folder: Path, *, told: Any) -> str | None:
    """Return the class of the hub's code that a model asks for, beside a type of transformers.

    Args:
        settings: Its config.json.
        folder: Where that lies.
        told: Whether it is said elsewhere what that code does.

    Raises:
        EncoderError: It is not known here what that code does, and nothing says it.
    """
    own = (settings.get("auto_map") or {}).get("AutoModel")
    if own is None:
        return None
    code = str(own[0] if isinstance(own, list) else own).rpartition("--")[2]
    if code not in REMOTE_CODE and not told:
        raise EncoderError(
            f"{folder / 'config.json'} asks for code of its own, {own!r} (auto_map), which is "
            f"never run, and what it does otherwise than transformers' "
            f"{settings.get('model_type')} is not known. A model without it was expected. For a "
            f"text encoder of which you know it, set attention = 'bidirectional' or 'causal'; or "
            f"bring its vectors with `sail import-store`."
        )
    return code
