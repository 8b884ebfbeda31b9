"""Exit status of the commands. `slurm/pretrain.sh` decides by it whether to start again."""

from __future__ import annotations

import errno
import os
import signal
import sys
from enum import IntEnum
from typing import NoReturn

from megalite.errors import NotFinite, NotSaved, Unreachable


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


def in_a_line(error: OSError) -> str:
    """Return what an error of the system says, its path first where it is about a file."""
    if not (error.filename and error.strerror):
        return error.strerror or str(error)
    if isinstance(error, FileExistsError) and os.path.isfile(error.filename):
        return f"{error.filename} is a file, where a folder is needed; name another output"
    return f"{error.filename}: {error.strerror}"


def is_explained(error: OSError) -> bool:
    """Return whether a line is all that a user needs to know of an error of the system: which file
    it is about, or that a disk is full."""
    return bool(error.filename) or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def status_of(error: Exception) -> Exit:
    """Return the exit status of a command that ended with an error that is told in a line."""
    if isinstance(error, NotSaved):
        return Exit.NOT_SAVED
    if isinstance(error, NotFinite):
        return Exit.BAD_NUMBERS
    is_mistake = not isinstance(error, OSError) or error.errno in _OF_PATHS
    return Exit.MISTAKE if is_mistake and not passes(error) else Exit.FAILED


_OF_PATHS = {
    errno.ENOENT, errno.EEXIST, errno.EISDIR, errno.ENOTDIR, errno.ENOTEMPTY, errno.EACCES, errno.EPERM, errno.EROFS,
    errno.ENAMETOOLONG, errno.ELOOP,
}  # fmt: skip
"""Errors about a path as it was given: the user can name another."""


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
