"""Files: those that come with megalite, YAML, and writes that survive a power cut."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from megalite.errors import ConfigError
from megalite.utils.outside import reading, shown
from megalite.utils.spelling import instead_of

LONGEST_YAML = 1 << 19
"""Limit on the characters of a config; this many are read in some seconds."""
MOST_VALUES = 100_000
"""Limit on the values of a config, where those that aliases repeat count as often as they are
repeated."""


def configs_dir() -> Path:
    """Return the `configs/` of the checkout the package is in, else the one the wheel installed
    inside the package.

    Raises FileNotFoundError."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package.parent / "configs", package / "configs"):
        # Recognised by one of its files: beside an installed package there may be somebody else's
        # `configs`.
        if (folder / "chips.yaml").is_file():
            return folder
    raise FileNotFoundError(f"no configs/ beside or inside {package}: reinstall megalite")


def presets() -> tuple[str, ...]:
    """Return the names of the presets of models, those of the files in `configs/model`."""
    return tuple(sorted(path.stem for path in (configs_dir() / "model").glob("*.yaml")))


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice instead of taking the last one."""

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            _check_size(node)
        return node

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        # YAML 1.1 reads 010 as octal and 1:30 as minutes and seconds, which nobody means here.
        digits = node.value.lstrip("+-")
        if ":" in digits or re.fullmatch("0[0-9_]+", digits):
            raise yaml.constructor.ConstructorError(
                None,
                None,
                f"{node.value} is {super().construct_yaml_int(node)} in YAML; write {node.value!r} in quotes, or the "
                "number that is meant without leading zeros and colons",
                node.start_mark,
            )
        return super().construct_yaml_int(node)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key.value!r} is given twice", key.start_mark
                )
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return super().construct_mapping(node, deep)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def _check_size(root: yaml.Node) -> None:
    """Refuse a text whose aliases (`*name`) expand to more than MOST_VALUES values, or stand within
    what they name."""
    # Without recursion, which deep nesting would exhaust: a node is pushed twice, and counted when
    # it comes up again behind all that is within it.
    sizes: dict[int, int] = {}
    begun: set[int] = set()
    pending = [(root, False)]
    while pending:
        node, is_done = pending.pop()
        inner = [
            item for pair in node.value for item in (pair if isinstance(pair, tuple) else (pair,))
        ]
        inner = inner if isinstance(node, yaml.CollectionNode) else []
        if is_done:
            sizes[id(node)] = 1 + sum(sizes[id(item)] for item in inner)
            if sizes[id(node)] > MOST_VALUES:
                raise yaml.YAMLError(
                    f"it has more than {MOST_VALUES:,} values, its aliases written out"
                )
        elif id(node) not in sizes:
            if id(node) in begun:
                raise yaml.MarkedYAMLError(
                    None, None, "an alias stands within what it names", node.start_mark
                )
            begun.add(id(node))
            pending.append((node, True))
            pending += [(item, False) for item in inner]


def parse_yaml(text: str, origin: str) -> Any:
    """Return the value of a YAML text. Raises ConfigError, whose message calls the text
    `origin`."""
    if len(text) > LONGEST_YAML:
        raise ConfigError(
            f"{origin} is longer than {LONGEST_YAML:,} characters, which no config is"
        )
    with reading(origin, ConfigError):  # also a date that is none, or a number that is too long
        try:
            return yaml.load(text, _Loader)
        except yaml.YAMLError as error:
            raise ConfigError(f"{origin} is not valid YAML: {_in_a_line(error)}") from None


def _in_a_line(error: yaml.YAMLError) -> str:
    """Return what is wrong with a YAML text, and where, in one line."""
    if isinstance(error, yaml.reader.ReaderError):
        return f"it holds the character #x{int(error.character):04x}, at position {error.position}"
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return str(error)
    what = str(getattr(error, "problem", "")).replace("'\\t' that", "'\\t', a tab, that")
    return f"{what} at line {mark.line + 1}, column {mark.column + 1}"


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Return the sections of a file of `key: value` lines. Raises ConfigError."""
    try:
        with open(path, encoding="utf-8") as file:
            values = parse_yaml(file.read(LONGEST_YAML + 1), str(path))
    except IsADirectoryError:
        inside = Path(path) / "config.yaml"
        raise ConfigError(
            f"{path} is a folder, not a YAML file{f'; of a run it is {inside}' * inside.is_file()}"
        ) from None
    except OSError as error:
        hint = instead_of(path) if isinstance(error, FileNotFoundError) else ""
        raise ConfigError(f"{path}: {error.strerror or error}{hint}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: {error}") from None
    if not isinstance(values, dict):
        got = "nothing" if values is None else type(values).__name__
        raise ConfigError(f"{path}: expected `section: {{key: value}}` lines, got {got}")
    return values


def with_overrides(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return a copy of `values` with overrides such as `train.steps=100` applied. Raises
    ConfigError."""
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not all(key.split(".")):
            raise ConfigError(
                f"override {override!r} is not of the form section.key=value, without spaces"
            )
        values = _with(values, key.split("."), parse_yaml(text, f"override {override!r}"), override)
    return values


def _with(values: dict[str, Any], keys: Sequence[str], value: Any, override: str) -> dict[str, Any]:
    """Return a copy of `values` with one more value, at the place that `keys` leads to."""
    head, rest = keys[0], keys[1:]
    if not rest:
        return {**values, head: value}
    inner = values.get(head)
    if inner is not None and not isinstance(inner, dict):
        raise ConfigError(f"override {override!r}: {head} is {shown(inner)}, not a section")
    return {**values, head: _with(inner or {}, rest, value, override)}


def fsync(path: Path) -> None:
    """Make a written file, or the renames in a folder, survive a power cut. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # SMB and many FUSE file systems (buckets) know no fsync of a folder. What they do for names,
        # they do by themselves; PostgreSQL passes over it as well.
        is_unknown = error.errno in (errno.EINVAL, errno.EBADF, errno.ENOTSUP)
        if not (is_unknown and stat.S_ISDIR(os.fstat(descriptor).st_mode)):
            raise
    finally:
        os.close(descriptor)
