"""Read a checked `Config` from a YAML file and `a.b=c` overrides."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import to_jsonable_python

from megalite.config import Choice, Config
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


def short_yaml(config: Config) -> str:
    """Return a config as YAML with only what is not the default anyway, or the preset's: for a person
    to read. All of it where that would mean another config."""
    values = _without(config.model_dump(mode="json"), _defaults(config))
    if config.model.preset:
        preset = model_config({"preset": config.model.preset}).model_dump(mode="json")
        values["model"] = {"preset": config.model.preset} | _without(
            config.model.model_dump(mode="json"), preset
        )
    elif config.model.hf is None:
        # It is each family's own default, but says which family this is.
        values["model"] = {"family": config.model.family} | values.get("model", {})
    with contextlib.suppress(ConfigError):
        if parse_config(values) == config:
            return yaml.safe_dump(values, sort_keys=False)
    return config.to_yaml()


def _defaults(section: BaseModel) -> dict[str, Any]:
    """Return the defaults of a section's settings, those of its sections by their own keys."""
    found: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        inner = getattr(section, name)
        default = field.get_default(call_default_factory=True)
        if isinstance(inner, BaseModel):
            # A kind's own defaults; its name is kept where it is not the usual one.
            usual = default.name if isinstance(default, Choice) else None
            found[name] = _defaults(inner) | ({"name": usual} if isinstance(inner, Choice) else {})
        else:
            found[name] = to_jsonable_python(default, serialize_unknown=True)
    return found


def _without(values: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    """Return the values that are not those of `others`, by the keys of sections."""
    kept: dict[str, Any] = {}
    for name, value in values.items():
        other = others.get(name)
        if isinstance(value, dict) and isinstance(other, dict):
            if inner := _without(value, other):
                kept[name] = inner
        elif name not in others or value != other:
            kept[name] = value
    return kept


def _refuse_secrets(values: dict[str, Any], origin: str) -> None:
    """Raise ConfigError for a value that holds a secret, because the config is written to the run's
    folder and to its checkpoints. The message does not repeat it."""
    texts = [*_texts(values, "")]
    # All at once first: each look goes through the whole environment.
    together = "\n".join(text for _, text in texts)
    is_clean = hide_secrets(together) == together
    for key, text in texts:
        try:
            check_no_secret(text)
        except ValueError as error:
            raise ConfigError(f"{origin}: {key}: {error}") from None
        if not is_clean and hide_secrets(text) != text:
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
