"""Exit status of the commands. `slurm/pretrain.sh` decides by it whether to start again."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import signal
import sys
from collections.abc import Callable
from enum import IntEnum
from typing import NoReturn

from megalite.errors import CheckpointError, ConfigError, DataError, Unreachable
from megalite.utils.secrecy import hide_secrets


class Exit(IntEnum):
    """Exit status of a command."""

    DONE = 0
    FAILED = 1
    MISTAKE = 2
    # 74 and 75 are EX_IOERR and EX_TEMPFAIL of sysexits.h; the next ones only count on from there.
    NOT_SAVED = 74
    STOPPED = 75
    HUNG = 76
    UNFIT = 77
    BAD_NUMBERS = 78
    CORRUPTED = 79
    ALARM = 80

    @property
    def meaning(self) -> str:
        return _MEANINGS[self]


_MEANINGS = {
    Exit.DONE: "done, or stopped at train.stop_at",
    Exit.FAILED: "failed: the lines before it say why",
    Exit.MISTAKE: "a mistake in the command, the config, the data or a checkpoint: starting again changes nothing",
    Exit.NOT_SAVED: "the last checkpoint could not be written",
    Exit.STOPPED: "asked to stop: saved, and goes on there when started again",
    Exit.HUNG: "no rank made progress any more: the report names those behind; it goes on when started again",
    Exit.UNFIT: "preflight: the line --exclude=NODES names nodes that are not fit; without them it can start",
    Exit.BAD_NUMBERS: "bad numbers in the loss or the gradients (saved), or in a model's logits: would be met again",
    Exit.CORRUPTED: "ranks that must hold the same weights do not: the lines before name them; not saved; goes on from "
    "the newest checkpoint when started again",
    Exit.ALARM: "megalite monitor: an alarm stands",
}


PASSES = {
    errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ECONNRESET, errno.ECONNREFUSED, errno.EHOSTUNREACH,
    errno.ENETUNREACH, errno.EHOSTDOWN, errno.EREMOTEIO, errno.ESHUTDOWN, errno.EAGAIN,
}  # fmt: skip
"""Errors of disks and networks that are gone for a while, or on one node. They are not the user's
mistake."""


def passes(error: BaseException | None) -> bool:
    """Return whether a transient error of this kind caused `error`."""
    while error is not None:
        if isinstance(error, Unreachable) or (isinstance(error, OSError) and error.errno in PASSES):
            return True
        error = error.__cause__ or error.__context__
    return False


def end_process(status: int) -> NoReturn:
    """End the process at once, from any thread, whatever the others wait for. Nothing is cleaned
    up."""
    if sys.stdout.isatty():
        os.write(1, b"\x1b[?25h\n")  # the live line hides the cursor
    os._exit(status)


def flush_output() -> None:
    """Flush what was printed, before the process ends. What a full disk does not take is dropped:
    Python would end with a status of its own for it."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                # Python flushes once more at exit: what is left goes where it cannot fail.
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)


def explained(tool: Callable[[], int], interrupted: str = "interrupted") -> int:
    """Run a tool's `main`, and return its exit status. A mistake of the user's is one line on
    stderr and status MISTAKE, as in `megalite`; a full disk or a store that is gone for a while is
    one line and FAILED. `interrupted` is printed on Ctrl-C."""
    try:
        return tool()
    except (ConfigError, DataError, CheckpointError, OSError) as error:
        text = str(error)
        if isinstance(error, OSError) and error.filename and error.strerror:
            text = f"{error.filename}: {error.strerror}"
            if isinstance(error, FileExistsError) and os.path.isfile(error.filename):
                text = f"{error.filename} is a file, where a folder is needed; name another output"
        print(hide_secrets(f"error: {text}"), file=sys.stderr)
        failed = passes(error) or (isinstance(error, OSError) and not isinstance(error, _OF_PATHS))
        return Exit.FAILED if failed else Exit.MISTAKE
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return killed_by(signal.SIGINT)


def at_least(smallest: int, largest: int = 2**31 - 1) -> Callable[[str], int]:
    """Return the `type` of an argparse option that takes integers from `smallest` to `largest`."""

    def integer(text: str) -> int:
        if not smallest <= (value := int(text)) <= largest:
            raise argparse.ArgumentTypeError(f"{text} is not between {smallest:,} and {largest:,}")
        return value

    return integer


_OF_PATHS = (
    FileNotFoundError,
    FileExistsError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
)


def killed_by(number: int) -> int:
    """Return the exit status of a process that a signal ended, as shells count it."""
    return 128 + number


def describe(status: int) -> str:
    """Return an exit status in words, for a person."""
    if status in _MEANINGS:
        return f"exit status {status} ({Exit(status).meaning})"
    try:
        return f"exit status {status} (killed by {signal.Signals(status - 128).name})"
    except ValueError:
        return f"exit status {status}"
