"""Read a checked `Config` from a YAML file and `a.b=c` overrides."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megalite.config import Config
from megalite.config.errors import describe_errors, refusal
from megalite.errors import ConfigError
from megalite.models import model_config
from megalite.models.peft import with_adapter_fields
from megalite.utils.hub import with_local_folders
from megalite.utils.resources import read_yaml, with_overrides
from megalite.utils.secrecy import hide_secrets
from megalite.utils.urls import check_no_secret


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read the YAML file `path`, apply `overrides` such as `train.steps=100` (values are YAML too)
    and check everything.

    Raise ConfigError."""
    return parse_config(read_yaml(path), overrides, origin=str(path))


def parse_config(
    values: dict[str, Any], overrides: Sequence[str] = (), origin: str = "config"
) -> Config:
    """Return the config of `values` already read, with `overrides` applied. `origin` names the source
    of `values` in messages. Raise ConfigError that lists every mistake."""
    values = with_local_folders(with_overrides(values, overrides))
    _refuse_secrets(values, origin)
    # The model is read first, since its fields depend on its family; its mistakes join those of the
    # rest.
    mistakes = []
    model = values.get("model")
    if isinstance(model, dict):
        try:
            model = model_config(model)
        except ConfigError as error:
            mistakes = [
                line if line.startswith("model") else f"model: {line}"
                for line in str(error).split("\n  ")
            ]
            model = None
    elif isinstance(model, str):
        mistakes = [
            f"model = {model!r}: must be a section; for a preset write `model: {{preset: {model}}}`"
        ]
    values = values | {"model": model} if "model" in values else values
    if isinstance(values.get("lora"), dict):
        try:
            values = values | {"lora": with_adapter_fields(values["lora"])}
        except ConfigError as error:
            mistakes.append(f"lora: {error}")
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        found = describe_errors(error, Config, values).split("\n  ")
        mistakes += [line for line in found if not (mistakes and line.startswith("model ="))]
        raise refusal(mistakes, origin, overrides) from None
    if mistakes:
        raise refusal(mistakes, origin, overrides)
    return config


def _refuse_secrets(values: dict[str, Any], origin: str) -> None:
    """Raise ConfigError for a value that holds a secret, because the config is written to the run's
    folder and to its checkpoints. The message does not repeat it."""
    for key, text in _texts(values, ""):
        try:
            check_no_secret(text)
        except ValueError as error:
            raise ConfigError(f"{origin}: {key}: {error}") from None
        if hide_secrets(text) != text:
            raise ConfigError(
                f"{origin}: {key} holds a key, a token or a password, which would be written to logs and checkpoints; "
                "leave it out and give it through the environment"
            )


def _texts(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """Yield (key, text) for every text in nested values, keys included."""
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, (list, tuple))
        else ()
    )
    for name, inner in items:
        yield key or "a key", str(name)
        yield from _texts(inner, f"{key}.{name}" if key else str(name))
    if isinstance(value, str):
        yield key, value
