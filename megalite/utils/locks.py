"""Locks on files, which the system takes away from a process that dies."""

from __future__ import annotations

import fcntl
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from megalite.errors import ConfigError, DataError


class NoLocks(ConfigError):
    """Raised where a file system has no locks, as some of clusters: nobody can be kept out there."""


class Locked(DataError):
    """Raised where another process is at work in a folder."""


def lock(file: IO[Any], path: Path) -> bool:
    """Lock an open file until it is closed, unless another process has it; return whether it is
    locked now. `path` names it in the message of NoLocks, which is raised where there are no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # which of them, differs by file system
        return False
    except OSError as error:
        # Neither free nor held: taken for the one, two would write at once, and for the other, all
        # would wait for nobody.
        raise NoLocks(
            f"{path} cannot be locked ({error.strerror}): its file system has no locks (Lustre has them where it is "
            "mounted with -o flock)"
        ) from None
    return True


def lock_byte(file: IO[Any], kind: int, place: int) -> None:
    """Lock one byte of an open file (`kind` fcntl.F_WRLCK) or unlock it (F_UNLCK), without waiting.
    Raise BlockingIOError or PermissionError, differing by system, if another process has it, and
    OSError."""
    if sys.platform == "linux":
        # Of this open file: what POSIX has for processes ends as soon as the process closes
        # any of its descriptors of the same file.
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", kind, 0, place, 1, 0))
    else:
        operation = fcntl.LOCK_UN if kind == fcntl.F_UNLCK else fcntl.LOCK_EX | fcntl.LOCK_NB
        fcntl.lockf(file, operation, 1, place)


@contextmanager
def alone_in(folder: Path, named: Path | None = None) -> Iterator[None]:
    """Keep other processes out of a folder, which is made, until the block ends. Where there are no
    locks, a line on stderr says that nobody is kept out. Raise Locked if another process is in it,
    which the message calls `named` (default: `folder`), and OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    # Not removed at the end: another process may have opened it, and would lock what no third one
    # finds.
    with open(folder / "lock", "w") as file:
        try:
            is_alone = lock(file, folder / "lock")
        except NoLocks as problem:
            # One process at a time is the usual case, which need not suffer for the other.
            is_alone = True
            print(f"warning: {problem}: start no second process there", file=sys.stderr)
        if not is_alone:
            raise Locked(f"{named or folder} is being written by another process")
        yield
