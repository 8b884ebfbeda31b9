"""Describe what is wrong with a config, in the config's words instead of pydantic's."""

from __future__ import annotations

import contextlib
import re
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from megalite.config import Choice, Config, ModelConfig
from megalite.config.aliases import FOLLOWS, key_of
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
    strange = [item["loc"] for item in items if item["type"] == "extra_forbidden"]
    if isinstance(values, dict) and len(values) > 2 and {(key,) for key in values} <= {*strange}:
        return (
            f"none of its keys ({', '.join(list(values)[:3])}, …) is one of {', '.join(root.model_fields)}: "
            "is it another kind of file?"
        )
    inner = [item["loc"] for item in items if item["type"] != "too_short"]
    told = [
        i
        for i in items
        if i["type"] != "too_short" or not any(loc[: len(i["loc"])] == i["loc"] for loc in inner)
    ]
    return "\n  ".join(_describe(item, root, values) for item in told)


def refusal(mistakes: Sequence[str], origin: str, overrides: Sequence[str] = ()) -> ConfigError:
    """Return the error that lists `mistakes` in a file, `origin`, to which `overrides` were applied:
    those in a setting that an override gave name the command line instead."""
    # Overrides are applied last: a key that the file has as well is at fault as typed.
    given = [override.partition("=")[0] for override in overrides]
    typed = [line for line in mistakes if any(_is_about(line, key) for key in given)]
    filed = [line for line in mistakes if line not in typed]
    if filed:
        filed[0] = f"{origin}: {filed[0]}"
    typed = [f"command line: {line}" for line in typed]
    return ConfigError("\n  ".join([*filed, *typed]))


def _is_about(mistake: str, key: str) -> bool:
    """Return whether a mistake names `key`, or something within it: by all of the key, or by its
    section before a colon and the rest behind."""
    parts = key.split(".")
    for cut in range(1, len(parts)):  # a section that is not known, such as trian in trian.steps
        if mistake.startswith(f"unknown key {'.'.join(parts[:cut])} ("):
            return True
    for cut in range(len(parts)):
        section, rest = ".".join(parts[:cut]), ".".join(parts[cut:])
        if mistake.startswith(f"{section}:" if section else "") and re.search(
            # As a whole word: `steps` is neither in `warmup_steps` nor in `steps_per_epoch`.
            rf"(?<![\w.]){re.escape(rest)}(?!\w)",
            mistake,
        ):
            return True
    return False


_PLAINLY = {
    "model_type": "must be a section of `key: value` lines",
    "dict_type": "must be a section of `key: value` lines",
    "tuple_type": "must be a list: [a, b]",
    "path_type": "must be a path",
    "string_pattern_mismatch": "must start with a letter or digit and hold only letters, digits, `.`, `_` and `-`",
}
"""Plain words for what pydantic says in terms of Python's types."""
_BARE_WORDS = "; YAML reads a bare yes, no, on or off as true or false"


def _describe(item: Any, root: type[BaseModel], values: Any) -> str:
    """Return the line for one of pydantic's errors: key, value, what is allowed, and the nearest
    right spelling."""
    path, known = _walk(item["loc"], root, values)
    key, value = ".".join(map(str, path)), item["input"]
    # Messages go to logs of launchers, which more people read than the config.
    told = "not shown" if path and names_a_secret(str(path[-1])) else shown(value)
    if item["type"] == "extra_forbidden":
        meant = _key_meant(path, root)
        hint = (
            f"did you mean {meant!r}?"
            if meant
            else (root is Config and FOLLOWS.get(str(path[-1]).lower()))
            or did_you_mean(path[-1], known, f"known keys: {', '.join(sorted(known))}")
        )
        return f"unknown key {key} (value {told}); {hint}"
    if item["type"] == "missing":
        last = path[-1]
        # A missing item of a tuple has a number in place of a key.
        if known or not isinstance(last, int):
            asked = ".".join(part for part in path if isinstance(part, str))
            hint = f"; `megalite config keys {asked}` describes it" if root is Config else ""
            return f"{key} is required{hint}"
        return f"{'.'.join(map(str, path[:-1]))}: value number {last + 1} of its list is missing"
    if item["type"] == "invalid_key":
        section = ".".join(map(str, path[:-1])) or "the config"
        return f"{section}: the key {told} must be text{_BARE_WORDS if isinstance(value, bool) else ''}"
    message = item["msg"].removeprefix("Value error, ").removeprefix("Input ")
    # Raised by a validator of a section, whose message names the key: the section itself is not
    # shown.
    if item["type"] == "value_error" and isinstance(value, dict):
        return f"{key}: {message}" if key else message
    message = _PLAINLY.get(item["type"], message)
    # pydantic's message is about a Python tuple.
    if item["type"] == "too_short":
        message = f"must have at least {item['ctx']['min_length']} of them"
    # As most trainers have it: a path alone in the place of a list of sources.
    if key in ("data.train", "data.valid", "data.test") and isinstance(value, str):
        message += f", here [{{path: {value}}}]"
    if item["type"] == "literal_error":
        allowed = [
            word.strip("'") for word in item["ctx"]["expected"].replace(" or ", ", ").split(", ")
        ]
        close = nearest(value, allowed)
        if close and close != value:
            message += f"; did you mean {close!r}?"
    if isinstance(value, bool) and item["type"] in ("literal_error", "string_type"):
        message += _BARE_WORDS
    return f"{key}: {message}" if isinstance(value, dict) else f"{key} = {told}: {message}"


def _key_meant(path: Sequence[str | int], root: type[BaseModel]) -> str | None:
    """Return the key of a config that the unknown key at `path` stands for: another trainer's name
    of it, or its own in another section. None if it is neither."""
    # Other files, such as recipes of corpora, have words of their own.
    is_model = issubclass(root, ModelConfig)
    if not (is_model or root is Config):
        return None
    meant = key_of(path[-1], _keys(Config))
    # A family has some of the fields of models only.
    section, _, last = (meant or "").rpartition(".")
    return None if is_model and section == "model" and last not in root.model_fields else meant


def _keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield the full keys of a section's settings, those in items of lists left out."""
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}"
        inner = _section_in(field.annotation)
        if inner and typing.get_origin(field.annotation) is not tuple:
            yield from _keys(inner, f"{prefix}{name}.")


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
        given = isinstance(values, dict) and part in values
        if isinstance(part, int) or part in known or given or number == len(loc) - 1:
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
