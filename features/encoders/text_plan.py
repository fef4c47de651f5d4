"""Decides how a text encoder of transformers is used: what its files say, then what is known of it.

The order is: the recipe; the files of the model; `REMOTE_CODE`, for what only code from the hub
would say; the type. Where none of them says how tokens become a vector, it is refused.
"""

from pathlib import Path
from typing import Any, NamedTuple

from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES,
)

from features.config import TextColumnConfig, TextEncoderConfig
from features.encoders.checkpoint import EncoderFiles, read_config, read_json, read_settings
from features.encoders.plan import Decision, EncoderPlan, PlanBuilder
from features.encoders.remote_code import REMOTE_CODE, check_remote_code
from features.encoders.sentence_modules import SETTINGS, SentenceModules, read_sentence_modules
from features.encoders.tokenizer import (
    TOKENIZER_SETTINGS,
    adds_end,
    read_tokenizer,
    tokenizer_files,
)
from features.encoders.towers import TEXT_TOWERS, own_pooling, tower_config
from features.errors import EncoderError

# Positions begin behind that of padding.
OFFSET_TYPES = frozenset(
    {"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet", "longformer"}
    | {"data2vec-text", "ibert", "luke", "xmod", "roberta-prelayernorm", "mobilebert-roberta"}
)
# Captions must be padded to all positions, since the model was trained so and has no mask.
PADDED_TYPES = frozenset({"siglip", "siglip_text_model"})
STRIPPING_TOKENIZERS = ("SiglipTokenizer",)
MOST_TOKENS = 4096
"""Where no file limits a caption, and the model could read whole books."""
CHOICES = "`mean`, `last`, `cls` or `max`"


class TextResolution(NamedTuple):
    """A plan, and what was read on the way to it."""

    plan: EncoderPlan
    config: Any
    """Of the model, or of its text tower."""
    tokenizer: Any
    modules: SentenceModules
    strips_punctuation: bool
    """Whether its tokenizer class leaves out punctuation, which tokenizer.json does not say."""


def resolve_text(config: TextEncoderConfig, files: EncoderFiles) -> TextResolution:
    """Decide how a text encoder is used.

    Raises:
        EncoderError: Its files cannot be read, ask for what is not there, or do not say how tokens
            become a vector.
    """
    folder = files.folder
    whole = read_config(files.trunk)
    modules = read_sentence_modules(folder)
    trunk = _text_config(config.model, whole)
    tokenizer = read_tokenizer(files.trunk)
    made = PlanBuilder()
    inside = files.trunk.relative_to(folder)
    made.decisions["trunk"] = Decision(trunk.model_type, str(inside / "config.json"))
    _decide_attention(made, config, files.trunk, whole)
    for name, column in config.columns("").items():
        _decide_column(made, config.model, whole, modules, (name, column))
    _decide_tokens(made, config, files.trunk, modules, (tokenizer, trunk))
    decide_prompt(made, config, modules)
    behind = [f"{kind} ({place})" if place else kind for kind, place in modules.behind]
    made.decisions["behind"] = Decision(
        behind, "modules.json" if modules.pooling is not None else "no modules.json"
    )
    made.decide("dim", config.dim, Decision("all", "no file"))
    made.decisions["normalise"] = Decision(
        config.normalise,
        "the store's format: lengths are kept, the head normalises"
        if not config.normalise
        else "the recipe",
    )
    named = modules.files | tokenizer_files(files.trunk)
    named |= {"config.json": files.trunk / "config.json"}
    plan = EncoderPlan(
        kind="text",
        model=config.model,
        decisions=made.decisions,
        files={str(path.relative_to(folder)): path for path in named.values()},
        contradictions=tuple(made.contradictions),
        notes=tuple(made.notes),
    )
    own = files.trunk / TOKENIZER_SETTINGS
    kind = read_json(own).get("tokenizer_class") if own.is_file() else None
    return TextResolution(plan, trunk, tokenizer, modules, kind in STRIPPING_TOKENIZERS)


def _text_config(model: str, config: Any) -> Any:
    """Return the configuration of what reads text."""
    kind = config.model_type
    if kind in TEXT_TOWERS:
        return tower_config(config, "text")
    if hasattr(config, "text_config") or hasattr(config, "vision_config"):
        raise EncoderError(
            f"{model} is a model of several inputs ({kind}), of which no text tower is known here. "
            f"A text encoder, or one of {', '.join(sorted(TEXT_TOWERS))}, was expected. Choose "
            f"another, or bring its vectors with `sail import-store`."
        )
    if getattr(config, "is_encoder_decoder", False) and not is_half(kind):
        raise EncoderError(
            f"{model} is an encoder–decoder ({kind}). An encoder or a decoder was expected. Choose "
            f"another text encoder."
        )
    if getattr(config, "hidden_size", None) is None:
        raise EncoderError(
            f"{model} is of type {kind}, whose configuration has no hidden_size. A text encoder "
            f"was expected. Choose another."
        )
    return config


def is_half(model_type: str) -> bool:
    """Return whether transformers has a class for the encoder of an encoder–decoder alone."""
    name = MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES.get(model_type, "")
    return str(name).endswith("EncoderModel")


def is_decoder(model_type: str) -> bool:
    """Return whether models of a type were made to go on with a text: a token sees those before."""
    return (
        model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        and model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    )


def _decide_attention(
    made: PlanBuilder, config: TextEncoderConfig, folder: Path, whole: Any
) -> None:
    """Decide whether a token sees those behind it."""
    settings = read_settings(folder)
    stated = Decision(None, "config.json")
    for key, when in (("is_causal", False), ("use_bidirectional_attention", True)):
        if key in settings and settings[key] is not None:
            way = "bidirectional" if bool(settings[key]) is when else "causal"
            stated = Decision(way, f"{key} in config.json")
    code = check_remote_code(settings, folder, told=config.attention != "auto" or stated.value)
    known = Decision(REMOTE_CODE.get(code or ""), f"what {code} is known to do")
    by_type = "causal" if is_decoder(whole.model_type) else "bidirectional"
    if whole.model_type in TEXT_TOWERS:
        by_type = "its own"
    made.decide("attention", config.attention, stated, known, Decision(by_type, "its type"))


def _decide_column(
    made: PlanBuilder,
    model: str,
    whole: Any,
    modules: SentenceModules,
    named: tuple[str, TextColumnConfig],
) -> None:
    """Decide pooling and layer of an encoder's own column, or of one of its `also`."""
    name, column = named
    of = f" of {name}" if name else ""
    kind = whole.model_type
    stated = Decision(modules.pooling, modules.pooling_file)
    if kind in TEXT_TOWERS:
        by_type = Decision(own_pooling(TEXT_TOWERS[kind], whole), f"its type, {kind}")
    elif is_decoder(kind):
        by_type = Decision(None, kind)
    else:
        by_type = Decision("mean", f"its type, {kind}: no file says it")
    if column.pooling == "auto" and stated.value is None and by_type.value is None:
        raise EncoderError(
            f"No file of {model} says how its tokens become one vector, and its type, {kind}, was "
            f"not made for that. A pooling was expected. Set `pooling` of the text encoder{of} to "
            f"{CHOICES}; with `last` also end_token."
        )
    pooling = made.decide(f"pooling{of}", column.pooling, stated, by_type)
    layer = None if column.layer == -1 else column.layer
    made.decide(f"layer{of}", layer, Decision(-1, "no file: the last"))
    if pooling in ("pooler", "projection") and column.layer != -1:
        raise EncoderError(
            f"pooling = {pooling!r}{of} is what {model} makes of its last layer, but layer = "
            f"{column.layer}. -1 was expected. Take layer out, or use another pooling."
        )


def _decide_tokens(
    made: PlanBuilder,
    config: TextEncoderConfig,
    folder: Path,
    modules: SentenceModules,
    read: tuple[Any, Any],
) -> None:
    """Decide what a caption becomes: its case, its end, and how much of it is kept."""
    tokenizer, trunk = read
    settings = read_json(path) if (path := folder / TOKENIZER_SETTINGS).is_file() else {}
    is_padded = trunk.model_type in PADDED_TYPES
    lowers = Decision(True, modules.transformer_file) if modules.lower_case else Decision(None, "")
    if lowers.value is None and settings.get("do_lower_case") is not None:
        lowers = Decision(bool(settings["do_lower_case"]), TOKENIZER_SETTINGS)
    if lowers.value is None and is_padded:
        lowers = Decision(True, f"its type, {trunk.model_type}")
    made.decide("lower_case", None, lowers, Decision("its own", "tokenizer"))
    _decide_end(made, config, settings, tokenizer)
    _decide_length(made, config, settings, modules, trunk)
    made.decisions["padded"] = Decision(is_padded, f"its type, {trunk.model_type}")


def _decide_end(
    made: PlanBuilder, config: TextEncoderConfig, settings: dict[str, Any], tokenizer: Any
) -> None:
    """Decide whether a token is put behind every caption that the tokenizer does not put there."""
    if adds_end(tokenizer):
        if config.end_token is False:
            raise EncoderError(
                f"end_token is false, but the tokenizer of {config.model} ends every text by a "
                f"special token. `auto` or true was expected. Take end_token out."
            )
        made.decisions["end_token"] = Decision("its own", "tokenizer")
        return
    asked = Decision(
        True if settings.get("add_eos_token") else None, f"add_eos_token in {TOKENIZER_SETTINGS}"
    )
    wanted = made.decide("end_token", config.end_token, asked, Decision(False, "no file asks"))
    if wanted and tokenizer.eos_token_id is None:
        raise EncoderError(
            f"An end token is to follow every caption, but the tokenizer of {config.model} has no "
            f"eos_token. One was expected. Set end_token = false, or name it in "
            f"{TOKENIZER_SETTINGS}."
        )


def _decide_length(
    made: PlanBuilder,
    config: TextEncoderConfig,
    settings: dict[str, Any],
    modules: SentenceModules,
    trunk: Any,
) -> None:
    positions = positions_of(trunk)
    recipe = None if config.max_length == "auto" else config.max_length
    own = settings.get("model_max_length")
    limits = [each for each in (own, positions, MOST_TOKENS) if isinstance(each, int) and each > 0]
    shortest = min(limits)
    sources = {own: TOKENIZER_SETTINGS, positions: "positions in config.json"}
    stated = Decision(modules.max_length, modules.transformer_file)
    by_limit = Decision(shortest, sources.get(shortest, "no file: a limit of this program"))
    if recipe is not None and (stated.value or 0) >= recipe:
        stated = Decision(None, "")  # to cut captions shorter contradicts nothing
    length = made.decide("max_length", recipe, stated, by_limit)
    if positions is not None and length > positions:
        source = made.decisions["max_length"].source
        made.decisions["max_length"] = Decision(positions, "positions in config.json")
        made.notes.append(
            f"max_length is lowered from {length} ({source}) to {positions}, for which "
            f"{config.model} has positions"
        )


def positions_of(config: Any) -> int | None:
    """Return how many tokens a model has positions for; None where its config does not say."""
    found = getattr(config, "max_position_embeddings", None)
    if not isinstance(found, int) or found <= 0:
        return None
    if config.model_type in OFFSET_TYPES:
        return found - (int(config.pad_token_id) + 1)
    return found


def decide_prompt(made: PlanBuilder, config: TextEncoderConfig, modules: SentenceModules) -> None:
    """Decide what stands before every text.

    Raises:
        EncoderError: The recipe names a prompt that the files have not.
    """
    default = modules.default_prompt
    stated = Decision(None if default is None else modules.prompts[default], f"{SETTINGS}")
    told = config.instruction
    if config.prompt is not None:
        if config.prompt not in modules.prompts:
            raise EncoderError(
                f"prompt = {config.prompt!r}, but {config.model} has the prompts "
                f"{', '.join(map(repr, modules.prompts)) or 'none'}. One of these was expected. "
                f"Set `instruction` to the words."
            )
        told = modules.prompts[config.prompt]
    made.decide("prompt", told, stated, Decision("", "no file names one"))
    made.decisions["include_prompt"] = Decision(
        modules.include_prompt, modules.pooling_file or "no file"
    )
