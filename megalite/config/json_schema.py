"""JSON schema of a config, by which editors complete keys, show what they mean, and mark mistakes.

It is wider than the schema itself: a section that has several kinds, such as `optimizer`, has the
settings of all of them, and `model` those of all families. What goes with what, `megalite train`
tells."""

from __future__ import annotations

import types
import typing
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from megalite import registry
from megalite.config import Choice, Config, ModelConfig
from megalite.config.catalog import default_of, names_of, plain

Schema = dict[str, Any]
_PLAIN = {bool: "boolean", int: "integer", float: "number", str: "string", Path: "string"}
_LIMITS = {"gt": "exclusiveMinimum", "ge": "minimum", "lt": "exclusiveMaximum", "le": "maximum"}


def json_schema() -> Schema:
    """Return the schema of a config. Imports all families."""
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "A config of megalite",
        **_section(Config, ""),
    }


def _section(section: type[BaseModel], prefix: str) -> Schema:
    """Return the schema of a section, whose keys begin with `prefix`, with the settings of all its
    kinds."""
    kinds: list[type[BaseModel]] = []
    if issubclass(section, Choice) and "KINDS" in vars(section):
        kinds = [section.KINDS.get(name) for name in section.KINDS.names()]
    if section is ModelConfig:
        kinds = [registry.families.get(name).CONFIG for name in registry.families.names()]
    fields: dict[str, FieldInfo] = {}
    for each in (section, *kinds):
        # The first that has a key describes it: the section itself, then its kinds in their order.
        fields = dict(each.model_fields) | fields
    return {
        "type": "object",
        "description": plain(section.__doc__ or ""),
        "properties": {name: _field(f"{prefix}{name}", field) for name, field in fields.items()},
        # A preset or a model of Hugging Face gives what a model needs.
        "required": []
        if section is ModelConfig
        else [name for name, field in section.model_fields.items() if field.is_required()],
        # A plugin's hook has settings of its own.
        "additionalProperties": prefix == "hooks.",
    }


def _field(key: str, field: FieldInfo) -> Schema:
    found = _type(field.annotation, f"{key}.")
    limits = {
        word: getattr(item, name)
        for item in field.metadata
        for name, word in _LIMITS.items()
        if getattr(item, name, None) is not None
    }
    # Of `int | None` a limit is the number's: null has none.
    for member in found.get("anyOf", [found]):
        if member.get("type") in ("integer", "number"):
            member |= limits
    if key in WIDER:
        found = {"anyOf": [found, WIDER[key]]}
    if names := names_of(key):
        found = {"enum": list(names)}
    if field.description:
        # Most editors show the description only, and not the default.
        told = (
            field.description
            if field.is_required()
            else f"{field.description} Default: {default_of(field)}"
        )
        found = found | {"description": plain(told)}
    return found


WIDER: dict[str, Schema] = {
    "train.tokens": {"type": "string"},
    "train.steps": {"type": "null"},
    "lora.targets": {"type": "string"},
}
"""What else validators take: 300B for tokens, null for steps, one name for a list of them."""


def _type(annotation: Any, prefix: str) -> Schema:
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type(inner[0], prefix)
    if origin is Literal:
        return {"enum": list(inner)}
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [_type(each, prefix) for each in inner]}
    if origin is tuple and inner[-1] is Ellipsis:
        return {"type": "array", "items": _type(inner[0], prefix)}
    if origin is tuple:
        items = [_type(each, prefix) for each in inner]
        return {"type": "array", "items": items, "minItems": len(items), "maxItems": len(items)}
    if origin is dict:
        return {"type": "object", "additionalProperties": _type(inner[1], prefix)}
    if annotation is type(None):
        return {"type": "null"}
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return _section(annotation, prefix)
    return {"type": _PLAIN[annotation]} if annotation in _PLAIN else {}
