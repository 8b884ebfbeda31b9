"""From a YAML file and `a.b=c` overrides to a checked `Config`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megalite.config import Config, ConfigError, describe_errors
from megalite.models import model_config
from megalite.resources import parse_yaml, read_yaml


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
    try:
        config = Config.model_validate(values | {"model": model} if "model" in values else values)
    except ValidationError as error:
        found = describe_errors(error, Config).split("\n  ")
        mistakes += [line for line in found if not (mistakes and line.startswith("model ="))]
        raise ConfigError("\n  ".join([f"{origin}: {mistakes[0]}", *mistakes[1:]])) from None
    return config


def with_overrides(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`values`, itself left alone, with overrides such as `train.steps=100` applied. Raises ConfigError."""
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not all(key.split(".")):
            raise ConfigError(f"override {override!r} is not of the form section.key=value")
        values = _with(values, key.split("."), parse_yaml(text, f"override {override!r}"), override)
    return values


def _with(values: dict[str, Any], keys: Sequence[str], value: Any, override: str) -> dict[str, Any]:
    """`values` with one more value, `values` itself left alone."""
    head, rest = keys[0], keys[1:]
    if not rest:
        return {**values, head: value}
    inner = values.get(head)
    if inner is not None and not isinstance(inner, dict):
        raise ConfigError(f"override {override!r}: {head} is {inner!r}, not a section")
    return {**values, head: _with(inner or {}, rest, value, override)}
