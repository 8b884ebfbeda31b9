"""Compare two sets of settings: the keys that differ, and both values. A digest would say only that
something differs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

from megalite.utils.outside import shown

if TYPE_CHECKING:
    from pydantic import BaseModel

LONGEST = 120
"""Most characters of a value that are shown."""


@dataclass(frozen=True)
class Change:
    """A setting that is not what it was, or not what it is elsewhere."""

    key: str
    was: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.key} {spelled(self.was)} → {spelled(self.now)}"


def spelled(value: Any) -> str:
    """Return a value as a config spells it, cut where it is long."""
    bounded = "" if isinstance(value, str) else shown(value)
    is_long = len(bounded) > LONGEST or "a value of type" in bounded or bounded.endswith("bits")
    text = (
        value
        if isinstance(value, str)
        else bounded
        if is_long
        else json.dumps(value, ensure_ascii=False)
    )
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def changes(was: Mapping[str, Any], now: Mapping[str, Any], at: str = "") -> list[Change]:
    """List what differs between `was` and `now`, in the order of `now`, with sections and lists of
    sections by their own keys. What is left out counts as null. `at` is put before every key."""
    found: list[Change] = []
    # Keys of `now` in their order, then those that only `was` has.
    for name in dict.fromkeys((*now, *was)):
        before, value, key = was.get(name), now.get(name), f"{at}{name}"
        if isinstance(before, Mapping) and isinstance(value, Mapping):
            found += changes(before, value, f"{key}.")
        elif _are_sections(before) and _are_sections(value) and len(before) == len(value):
            for number, (old, new) in enumerate(zip(before, value, strict=True)):
                found += changes(old, new, f"{key}[{number}].")
        elif before != value:
            found.append(Change(key, before, value))
    return found


def flat(values: Mapping[str, Any], at: str = "") -> dict[str, Any]:
    """Return the settings of a config by their full keys; lists are one value."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{at}{name}"
        found |= flat(value, f"{key}.") if isinstance(value, Mapping) and value else {key: value}
    return found


def _are_sections(value: Any) -> TypeGuard[Sequence[Mapping[str, Any]]]:
    return (
        isinstance(value, Sequence)
        and bool(value)
        and all(isinstance(item, Mapping) for item in value)
    )


def with_defaults(values: Mapping[str, Any], section: BaseModel) -> dict[str, Any]:
    """Return values that were stored before some settings of a section existed, with the defaults
    of these."""
    # Here, since tools that compare plain settings start sooner without it.
    from pydantic import BaseModel
    from pydantic_core import PydanticUndefined, to_jsonable_python

    filled = dict(values)
    for name, field in type(section).model_fields.items():
        inner = getattr(section, name)
        if name not in values:
            default = field.get_default(call_default_factory=True)
            # A field that has none was what it is now.
            filled[name] = to_jsonable_python(inner if default is PydanticUndefined else default)
        elif isinstance(inner, BaseModel) and isinstance(values[name], Mapping):
            filled[name] = with_defaults(values[name], inner)
    return filled
