"""Read files that others have written, which may hold anything: reading one gives a value, or one
line that says why not."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import date
from pathlib import Path, PurePath
from typing import Any

from megalite.errors import CheckpointError, ConfigError, DataError

LARGEST_JSON = 32 << 20
"""Limit in bytes. The index of the largest model published has 16 million; parsed, JSON takes up to
20 times as much memory."""
SHOWN = 80
"""Most characters of a text that a message shows."""
ALL_SHOWN = 200
"""Most characters of a list or a section that a message shows."""
DEPTH = 3
"""Levels of nested lists and sections that are shown."""


@contextmanager
def reading(path: Path | str, error: type[Exception]) -> Iterator[None]:
    """Turn whatever reading a file raises into one line of class `error` that names the file.

    This includes what is no Exception, such as the panic of a library written in Rust.
    Interruptions, and errors that are such a line already, pass through."""
    try:
        yield
    except (ConfigError, DataError, CheckpointError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as found:
        raise error(f"{path}{_plainly(found)}") from None


def _plainly(error: BaseException) -> str:
    """Return what went wrong with a file, in words that go after its path."""
    if isinstance(error, OSError):
        return f": {error.strerror or error}"
    if isinstance(error, UnicodeDecodeError):
        return f" is not UTF-8: {error.reason} at byte {error.start}"
    if isinstance(error, json.JSONDecodeError):
        return f" is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}"
    if isinstance(error, RecursionError):
        return " is nested too deeply"
    if isinstance(error, MemoryError):
        return " needs more memory than there is"
    text = str(error).partition("\n")[0][:300]
    return f" cannot be read: {type(error).__name__}{f': {text}' if text else ''}"


def check_regular(path: Path, error: type[Exception]) -> None:
    """Refuse a path that exists but is no regular file: opening a FIFO waits forever, and a device
    may have no end."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return  # opening it will say so
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise error(f"{path} is not a regular file")


def check_apart(target: Path, sources: Iterable[Path | str], error: type[Exception]) -> None:
    """Refuse to write a file over one that is read: what was to be made of it would be all that is
    left."""
    for source in sources:
        with suppress(OSError):  # where one of them is not there, it is not lost
            if os.path.samefile(target, source):
                raise error(
                    f"{source} is an input, and {target} would be written over it; name another output"
                )


def check_output(
    target: Path,
    sources: Iterable[Path | str] = (),
    option: str = "--output",
    makes_folder: bool = False,
) -> None:
    """Raise ConfigError, which names the `option`, where a file cannot be written to `target`, or
    would be written over one of the `sources`: before the work of which it takes the result. With
    `makes_folder`, its folder need not be there yet."""
    check_apart(target, sources, ConfigError)
    folder = target.parent
    while makes_folder and not folder.exists():
        folder = folder.parent
    if target.is_dir():
        raise ConfigError(f"{option} {target} is a folder; name a file")
    if not folder.is_dir():
        raise ConfigError(f"{option} {target}: there is no folder {folder}; create it first")
    # Files are renamed into place, for which the folder counts, but for devices and pipes.
    is_special = target.exists() and not target.is_file()
    if not (is_special or os.access(folder, os.W_OK | os.X_OK)):
        raise ConfigError(f"{option} {target}: {folder} may not be written to")


def read_limited(path: Path, error: type[Exception], largest: int = LARGEST_JSON) -> bytes:
    """Return the bytes of a file of at most `largest` bytes. Raises OSError, and `error` for a
    longer or irregular one."""
    check_regular(path, error)
    with open(path, "rb") as file:
        data = file.read(min(os.fstat(file.fileno()).st_size, largest) + 1)
    if len(data) > largest:
        raise error(f"{path} is longer than {largest:,} bytes, which no such file is")
    return data


def read_text(path: Path, error: type[Exception], largest: int = LARGEST_JSON) -> str:
    """Return the text of a file of at most `largest` bytes. Raises `error` where it cannot be read
    or is not UTF-8."""
    with reading(path, error):
        return read_limited(path, error, largest).decode()


def read_object(path: Path, error: type[Exception]) -> dict[str, Any]:
    """Return the JSON object that a file holds. Raises `error` where it cannot be read or holds
    none."""
    values = read_json(path, error)
    if not isinstance(values, dict):
        raise error(f"{path} is not a JSON object")
    return values


def read_json(path: Path, error: type[Exception]) -> Any:
    """Return what a JSON file holds. Raises `error` where it cannot be read or holds no JSON."""
    with reading(path, error):
        return json.loads(read_limited(path, error).decode())


def beside(folder: Path, name: Any, named_by: Path) -> Path:
    """Return the path of a file that an index names. Raises CheckpointError unless it lies in the
    index's folder."""
    if (
        not isinstance(name, str)
        or Path(name).name != name
        or name in (".", "..")
        or not (name and name.isprintable())
    ):
        raise CheckpointError(
            f"{named_by} names {shown(name)}, which is outside of the folder or no file's name"
        )
    check_regular(folder / name, CheckpointError)
    return folder / name


def is_unicode(text: str) -> bool:
    """Return whether UTF-8 can write a text: JSON may hold half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def shown(value: Any, depth: int = 0) -> str:
    """Return a value for a message, in a length and time that do not depend on the value."""
    if isinstance(value, int) and value.bit_length() > 256:
        return f"a number of {value.bit_length():,} bits"  # Python writes no number of more than 4,300 digits
    if isinstance(value, str | bytes):
        return repr(value) if len(value) <= SHOWN else f"{value[:SHOWN]!r}…"
    if value is None or isinstance(value, bool | int | float):
        return repr(value)
    if isinstance(value, PurePath | date):
        return repr(str(value))
    if isinstance(value, dict | list | tuple) and depth < DEPTH:
        return _items_shown(value, depth)
    return f"a value of type {type(value).__name__}"


def _items_shown(values: dict[Any, Any] | list[Any] | tuple[Any, ...], depth: int) -> str:
    """Return the items as `repr` spells them, up to a limit of characters."""
    begin, end = (
        ("{", "}")
        if isinstance(values, dict)
        else ("[", "]")
        if isinstance(values, list)
        else ("(", ")")
    )
    text = begin
    for number, item in enumerate(values.items() if isinstance(values, dict) else values):
        if len(text) > ALL_SHOWN:
            return f"{text[:ALL_SHOWN]}…"
        key = f"{shown(item[0], DEPTH)}: " if isinstance(values, dict) else ""
        text += f"{', ' if number else ''}{key}{shown(item[1] if isinstance(values, dict) else item, depth + 1)}"
    is_single = isinstance(values, tuple) and len(values) == 1
    return (
        f"{text[:ALL_SHOWN]}…"
        if len(text) > ALL_SHOWN
        else f"{text}{',' if is_single else ''}{end}"
    )
