"""Every key of a config: its type, its default and what it means, as the schema says. `megalite
config`, docs/config.md and the JSON schema for editors are made of it."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from megalite import registry
from megalite.config import Choice, Config
from megalite.utils.resources import presets

REQUIRED = "required"


class Key(NamedTuple):
    """A setting of a config, or a section that can be left out."""

    name: str
    """Such as `optimizer.schedule.name`; `[]` stands for each item of a list."""
    kinds: tuple[str, ...]
    """Names of the kinds of the section that have it, such as optimizers. Empty: all."""
    type: str
    default: str
    """As YAML, or REQUIRED."""
    description: str


def catalog() -> dict[str, list[Key]]:
    """Return the keys of each section of a config, in the schema's order. Imports all families."""
    by_section: dict[str, list[Key]] = {}
    for name, field in Config.model_fields.items():
        by_section[name] = list(_of_field(name, field, ()))
    by_section["model"] += _of_families()
    return by_section


def _of_section(section: type[BaseModel], prefix: str, kinds: tuple[str, ...]) -> Iterator[Key]:
    for name, field in section.model_fields.items():
        for key in _of_field(f"{prefix}{name}", field, kinds):
            # What tells the members of a union apart is told by what each of them does.
            yield key if key.description else key._replace(description=plain(section.__doc__ or ""))
    if issubclass(section, Choice) and "KINDS" in vars(section):
        for kind in section.KINDS.names():
            yield from _of_kind(section, section.KINDS.get(kind), prefix, kind)


def _of_kind(
    section: type[BaseModel], kind: type[BaseModel], prefix: str, name: str
) -> Iterator[Key]:
    """Yield the settings that a kind has beside those of all kinds, or with another default."""
    for key, field in kind.model_fields.items():
        shared = section.model_fields.get(key)
        # What all kinds have is listed once, unless a kind has another default.
        if key != "name" and (shared is None or default_of(shared) != default_of(field)):
            yield from _of_field(f"{prefix}{key}", field, (name,))


def _of_field(key: str, field: FieldInfo, kinds: tuple[str, ...]) -> Iterator[Key]:
    """Yield a setting; of a section, its settings, after itself where it can be left out."""
    inner = sections_in(field.annotation)
    # The default of these is their settings' defaults.
    whole = len(inner) == 1 and isinstance(field.get_default(call_default_factory=True), BaseModel)
    whole = whole or field.annotation in inner
    if not whole:
        described = field.description or (inner[0].__doc__ or "" if inner else "")
        yield Key(key, kinds, type_of(field, key), default_of(field), plain(described))
    is_list = typing.get_origin(field.annotation) is tuple
    for section in inner:
        # The members of a union, such as of rope_scaling, are told apart by their `type`.
        own = typing.get_args(section.model_fields["type"].annotation) if len(inner) > 1 else ()
        yield from _of_section(section, f"{key}{'[]' * is_list}.", own or kinds)


def _of_families() -> Iterator[Key]:
    """Yield the settings that only some families have, each once with the families that have it."""
    found: dict[str, tuple[FieldInfo, list[str]]] = {}
    # What every family has is listed with the section itself.
    shared = Config.model_fields["model"].annotation
    assert isinstance(shared, type)
    for family in registry.families.names():
        for name, field in registry.families.get(family).CONFIG.model_fields.items():
            if name not in shared.model_fields:
                # A family may only narrow what another one describes.
                known, families = found.get(name, (field, []))
                found[name] = (known if known.description else field, [*families, family])
    for name, (field, families) in found.items():
        yield from _of_field(f"model.{name}", field, tuple(families))


def sections_in(annotation: Any) -> list[type[BaseModel]]:
    """Return the sections that an annotation such as `tuple[Source, ...]` contains."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for inner in typing.get_args(annotation) for section in sections_in(inner)]


_PLAIN = {bool: "true | false", int: "integer", float: "number", str: "text", Path: "path"}
_LIMITS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}


def type_of(field: FieldInfo, key: str = "") -> str:
    """Return the type of a setting in words, with its limits."""
    # Registered kinds stand in no annotation: there may be some of plugins.
    if names := names_of(key):
        return " | ".join(names)
    limits = [
        f"{sign} {getattr(item, name)}"
        for item in field.metadata
        for name, sign in _LIMITS.items()
        if getattr(item, name, None) is not None
    ]
    return ", ".join([_type(field.annotation), *limits])


def names_of(key: str) -> tuple[str, ...]:
    """Return what there is to choose from by the setting `key`: kinds of a section, or presets."""
    choices = {
        each.key: each
        for each in (
            registry.families, registry.optimizers, registry.schedules, registry.objectives,
        )
    }  # fmt: skip
    if key == "model.preset":
        return presets()
    return choices[key].names() if key in choices else ()


def _type(annotation: Any) -> str:
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type(inner[0])
    if origin is Literal:
        return " | ".join(map(str, inner))
    if origin in (typing.Union, types.UnionType):
        # Each once: several members may read alike, as sections do.
        return " | ".join(dict.fromkeys(map(_type, inner)))
    if origin is tuple:
        return (
            f"list of {_type(inner[0])}"
            if inner[-1] is Ellipsis
            else f"[{', '.join(map(_type, inner))}]"
        )
    if origin is dict:
        return f"{_type(inner[0])}: {_type(inner[1])}"
    if annotation is type(None):
        return "null"
    return _PLAIN.get(annotation, "section")


def default_of(field: FieldInfo) -> str:
    """Return the default of a setting, as YAML."""
    if field.is_required():
        return REQUIRED
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    # JSON of a value is its YAML on one line: null, true, [1, 2].
    return str(value) if isinstance(value, str | Path) else json.dumps(value, default=str)


def plain(text: str) -> str:
    """Return a docstring or a description as one line."""
    return " ".join(text.split())
