"""From a YAML file and `a.b=c` overrides to a checked `Config`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megalite.config import Config, describe_errors
from megalite.errors import ConfigError
from megalite.models import model_config
from megalite.models.peft import with_adapter_fields
from megalite.resources import read_yaml, with_overrides


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply overrides such as `train.steps=100` (values are YAML too) and check everything.

    Raises ConfigError."""
    return parse_config(read_yaml(path), overrides, origin=str(path))


def parse_config(values: dict[str, Any], overrides: Sequence[str] = (), origin: str = "config") -> Config:
    """The same from values already read. `origin` is what messages call them. Raises ConfigError with every mistake."""
    values = with_overrides(values, overrides)
    mistakes = []
    model = values.get("model")
    if isinstance(model, dict):
        try:
            model = model_config(model)
        except ConfigError as error:
            mistakes = [line if line.startswith("model") else f"model: {line}" for line in str(error).split("\n  ")]
            model = None
    elif isinstance(model, str):
        mistakes = [f"model = {model!r}: must be a section; for a preset write `model: {{preset: {model}}}`"]
    values = values | {"model": model} if "model" in values else values
    if isinstance(values.get("lora"), dict):
        try:
            values = values | {"lora": with_adapter_fields(values["lora"])}
        except ConfigError as error:
            mistakes.append(f"lora: {error}")
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        found = describe_errors(error, Config).split("\n  ")
        mistakes += [line for line in found if not (mistakes and line.startswith("model ="))]
        raise ConfigError("\n  ".join([f"{origin}: {mistakes[0]}", *mistakes[1:]])) from None
    if mistakes:
        raise ConfigError("\n  ".join([f"{origin}: {mistakes[0]}", *mistakes[1:]]))
    return config
