"""The base classes of all sections of a config."""

from __future__ import annotations

import os
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    ModelWrapValidatorHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from megalite.errors import ConfigError
from megalite.registry import Registry


class Section(BaseModel):
    """A frozen part of the config that refuses keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    # Of all fields in one place: no section can forget it for a path of its own.
    @field_validator("*", mode="before")
    @classmethod
    def _tilde_is_home(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[info.field_name or ""].annotation
        return at_home(value) if Path in (annotation, *typing.get_args(annotation)) else value

    # Before conversion: afterwards, true could not be told from 1.
    @model_validator(mode="before")
    @classmethod
    def _no_bool_for_a_number(cls, values: Any) -> Any:
        """Refuse true and false for numbers: pydantic takes true for 1, but in a config it is a
        mistake."""
        for name, field in cls.model_fields.items() if isinstance(values, dict) else ():
            # Looked at by types, not by names: settings of plugins are refused alike.
            types = set(_types_in(field.annotation))
            if types & {int, float} and bool not in types and _holds_bool(values.get(name)):
                raise ValueError(f"{name} = {values[name]}: should be a number")
        return values


def _types_in(annotation: Any) -> Iterator[Any]:
    """Yield the types that an annotation such as `int | None` or `tuple[float, ...]` is made of."""
    inner = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Literal:
        yield from map(type, inner)
    elif not inner:
        yield annotation
    else:
        for each in inner:
            yield from _types_in(each)


def _holds_bool(value: Any) -> bool:
    """Return whether a value is true or false, or holds one of these."""
    inner = value.values() if isinstance(value, dict) else value
    return isinstance(value, bool) or (
        isinstance(value, dict | list | tuple) and any(_holds_bool(each) for each in inner)
    )


class Choice(Section):
    """Section of which a registry has several kinds. `name` says which one is meant; each has
    settings of its own.

    A direct subclass names the registry and holds what all kinds have; the kinds are subclasses of
    it."""

    name: str

    KINDS: ClassVar[Registry[Any]]

    @classmethod
    def kind_of(cls, values: Any) -> type[Self]:
        """Return the class that `values` ask for. Raises ConfigError for a name that no kind
        has."""
        # A kind inherits KINDS; the choice between kinds defines it. A kind must not choose again.
        if "KINDS" not in vars(cls) or not isinstance(values, dict):
            return cls
        name = values.get("name", cls.model_fields["name"].default)
        # What is wrong with such a name, validation of the field says.
        if not isinstance(name, str):
            return cls
        kind = cls.KINDS.get(name)
        if not issubclass(kind, cls):
            raise ConfigError(
                f"{cls.KINDS.key} = {name!r} is registered by a class that is no {cls.__name__}"
            )
        return typing.cast("type[Self]", kind)

    @model_validator(mode="wrap")
    @classmethod
    def _by_its_name(cls, values: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            kind = cls.kind_of(values)
        except ConfigError as error:
            name = values["name"]
            # Raised for the key `name`: pydantic would report the whole section.
            raise _error_at(
                "name", name, str(error).removeprefix(f"{cls.KINDS.key} = {name!r} ")
            ) from None
        if kind is cls:
            return handler(values)
        # By the kind's own class: its settings, defaults and checks count, not the base's.
        return kind.model_validate(cls._without_other_kinds(values, kind))

    @classmethod
    def _without_other_kinds(cls, values: dict[str, Any], kind: type[Choice]) -> dict[str, Any]:
        """Drop settings that only other kinds have, as long as they are at their defaults: such
        configs were written once."""
        kept, own = dict(values), kind.model_fields["name"].default
        for key in values.keys() - kind.model_fields.keys():
            for other in cls.KINDS.names():
                field = cls.KINDS.get(other).model_fields.get(str(key))
                if field is None:
                    continue
                if values[key] != field.get_default(call_default_factory=True):
                    raise _error_at(
                        key, values[key], f"is a setting of name: {other}, not of {own}"
                    )
                kept.pop(key, None)
        return kept


def _error_at(key: str, value: Any, message: str) -> ValidationError:
    # Braces in the message would be taken for placeholders.
    kind = PydanticCustomError("choice", "{message}", {"message": message})
    return ValidationError.from_exception_data(
        "Choice", [InitErrorDetails(type=kind, loc=(key,), input=value)]
    )


def at_home(path: Any) -> Any:
    """Return a path with `~` and `~user` expanded as in shells. Raises ValueError for a user that
    does not exist, and for what can be no path."""
    if path == "":  # pathlib takes it for the folder at work
        raise ValueError("must not be empty; null stands for no path")
    if isinstance(path, str) and "\0" in path:
        raise ValueError("holds a NUL character, which no path has")
    if not (isinstance(path, str | Path) and str(path).startswith("~")):
        return path
    # It returns what it cannot expand as it was.
    found = os.path.expanduser(path)
    if str(found).startswith("~"):
        raise ValueError(f"there is no user of that name; ./{path} is a folder that is called so")
    return found
