"""What `sail encoders` shows: how a model would be used for images, for texts, or for both."""

import tomllib
from collections.abc import Sequence
from typing import Any, NamedTuple

from pydantic import ValidationError

from features.config import ImageEncoderConfig, TextEncoderConfig
from features.encoders.backends import EncoderBackend, backend_of
from features.encoders.plan import EncoderPlan
from features.encoders.processors import processor_file
from features.errors import ConfigError, EncoderError, EncoderMissingError

KINDS: dict[str, type[ImageEncoderConfig] | type[TextEncoderConfig]] = {
    "image": ImageEncoderConfig,
    "text": TextEncoderConfig,
}


class PlannedEncoder(NamedTuple):
    """An encoder of one kind of input, and how it is used."""

    config: ImageEncoderConfig | TextEncoderConfig
    plan: EncoderPlan


def plans_of(
    model: str, revision: str | None, settings: Sequence[str] = ()
) -> list[PlannedEncoder]:
    """Return the plans of a model, one for each kind of input that it takes.

    Args:
        model: As in a recipe.
        revision: Of the hub repository.
        settings: `key=value` of the encoder's section, the value as in TOML or a bare word.

    Raises:
        ConfigError: No kind of encoder has such a setting.
        EncoderError: It is no encoder of either kind, or nothing says how it is used.
    """
    given = dict(map(_setting, settings)) | {"model": model, "revision": revision}
    backend = backend_of(model)
    plans, faults = [], dict[str, EncoderError | ConfigError]()
    for kind, config_class in KINDS.items():
        try:
            config = config_class.model_validate(given)
            plans.append(PlannedEncoder(config, backend.resolve(config)))
        except EncoderMissingError:
            raise
        except EncoderError as fault:
            faults[kind] = fault
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            faults[kind] = ConfigError(
                f"{where} of an {kind} encoder: {first['msg']}. Correct --set; `sail settings "
                f"encoders` lists all settings."
            )
    if plans:
        return plans
    raise faults["image" if _is_of_images(backend, model, revision) else "text"]


def _is_of_images(backend: EncoderBackend, model: str, revision: str | None) -> bool:
    if backend.TEXTS is None:
        return True
    files = backend.find(model, revision, weights=False)
    return files is None or processor_file(files.folder).is_file()


def _setting(text: str) -> tuple[str, Any]:
    name, separator, value = text.partition("=")
    if not separator:
        raise ConfigError(f"--set {text!r} has no value. Write it as in `--set pooling=last`.")
    try:
        return name.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return name.strip(), value.strip()
