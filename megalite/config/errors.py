"""Describe what is wrong with a config, in the config's words instead of pydantic's."""

from __future__ import annotations

import contextlib
import typing
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from megalite.config import Choice
from megalite.errors import ConfigError
from megalite.utils.outside import shown
from megalite.utils.secrecy import names_a_secret
from megalite.utils.spelling import did_you_mean, nearest


def describe_errors(error: ValidationError, root: type[BaseModel], values: Any = None) -> str:
    """Return one line per mistake in pydantic's `error`. `root` is the class that was validated,
    `values` its input: the keys of some sections follow from their `name`."""
    items = error.errors(include_url=False)
    # If every item of a list is wrong, pydantic also calls the list "too short"; the items' own
    # errors say it better.
    inner = [item["loc"] for item in items if item["type"] != "too_short"]
    told = [
        i
        for i in items
        if i["type"] != "too_short" or not any(loc[: len(i["loc"])] == i["loc"] for loc in inner)
    ]
    return "\n  ".join(_describe(item, root, values) for item in told)


_PLAINLY = {
    "model_type": "must be a section of `key: value` lines",
    "dict_type": "must be a section of `key: value` lines",
    "tuple_type": "must be a list: [a, b]",
    "path_type": "must be a path",
    "string_pattern_mismatch": "must start with a letter or digit and hold only letters, digits, `.`, `_` and `-`",
}
"""Plain words for what pydantic says in terms of Python's types."""


def _describe(item: Any, root: type[BaseModel], values: Any) -> str:
    """Return the line for one of pydantic's errors: key, value, what is allowed, and the nearest
    right spelling."""
    path, known = _walk(item["loc"], root, values)
    key, value = ".".join(map(str, path)), item["input"]
    if item["type"] == "extra_forbidden":
        hint = did_you_mean(path[-1], known, f"known keys: {', '.join(sorted(known))}")
        told = "not shown" if names_a_secret(str(path[-1])) else shown(value)
        return f"unknown key {key} (value {told}); {hint}"
    if item["type"] == "missing":
        last = path[-1]
        # A missing item of a tuple has a number in place of a key.
        if known or not isinstance(last, int):
            return f"{key} is required"
        return f"{'.'.join(map(str, path[:-1]))}: value number {last + 1} of its list is missing"
    message = item["msg"].removeprefix("Value error, ").removeprefix("Input ")
    # Raised by a validator of a section, whose message names the key: the section itself is not
    # shown.
    if item["type"] == "value_error" and isinstance(value, dict):
        return f"{key}: {message}" if key else message
    message = _PLAINLY.get(item["type"], message)
    if item["type"] == "literal_error":
        allowed = [
            word.strip("'") for word in item["ctx"]["expected"].replace(" or ", ", ").split(", ")
        ]
        close = nearest(value, allowed)
        if isinstance(value, bool):
            message += "; YAML reads a bare yes, no, on or off as true or false"
        elif close and close != value:
            message += f"; did you mean {close!r}?"
    return f"{key}: {message}" if isinstance(value, dict) else f"{key} = {shown(value)}: {message}"


def _walk(
    loc: Sequence[str | int], model: type[BaseModel] | None, values: Any
) -> tuple[list[str | int], list[str]]:
    """Return the key that pydantic's `loc` stands for, without its marks for unions, and the keys
    known beside the last one."""
    model = _kind_of(model, values)
    path: list[str | int] = []
    known: list[str] = []
    for number, part in enumerate(loc):
        known = list(model.model_fields) if model else []
        # Other parts are pydantic's marks for the members of a union, which no config has.
        if isinstance(part, int) or part in known or number == len(loc) - 1:
            path.append(part)
        if isinstance(part, int) and isinstance(values, (list, tuple)) and part < len(values):
            values = values[part]
            model = _kind_of(model, values)
        if part in known and number < len(loc) - 1 and model is not None:
            values = values.get(part) if isinstance(values, dict) else None
            model = _kind_of(_section_in(model.model_fields[str(part)].annotation), values)
    return path, known


def _kind_of(section: type[BaseModel] | None, values: Any) -> type[BaseModel] | None:
    """Return the class of a section; for a choice, the class of the kind that `values` ask for."""
    if section is None or not issubclass(section, Choice):
        return section
    with contextlib.suppress(ConfigError):
        return section.kind_of(values)
    return section


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """Return the section that an annotation such as `tuple[Source, ...]` or `Section | None`
    contains; of several, the first."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (_section_in(inner) for inner in typing.get_args(annotation))
    return next((section for section in found if section), None)
