"""Standard streams: closed ones, a terminal that cannot write every letter, and output that nobody
takes."""

from __future__ import annotations

import contextlib
import io
import os
import select
import sys


def open_streams() -> None:
    """Make stdin, stdout and stderr usable. Those that were closed before the start (`>&-`) lead to
    /dev/null: otherwise the next file that is opened would get their number, and whatever a
    library prints would be written into it. Letters that the terminal's encoding lacks, as × in
    Latin-2, are escaped."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            # The system gives the lowest number that is free, and those below are open by now.
            descriptor = os.open(os.devnull, os.O_RDWR)
            if descriptor != number:
                os.dup2(descriptor, number)
                os.close(descriptor)
            setattr(sys, name, open(number, "w" if number else "r", encoding="utf-8"))  # noqa: SIM115
    # Python escapes letters on stderr by itself. On stdout, without a locale, it lets bytes of file
    # names through but no letter that is not ASCII. Tests put other objects in its place.
    if isinstance(sys.stdout, io.TextIOWrapper) and (
        sys.stdout.errors == "strict" or not sys.stdout.encoding.lower().startswith("utf")
    ):
        sys.stdout.reconfigure(errors="backslashreplace")


def is_unread() -> bool:
    """Return whether stdout is a pipe that nobody reads any more, as with `| head`."""
    with contextlib.suppress(OSError, ValueError):  # of a test, it may be no file
        watch = select.poll()
        watch.register(sys.stdout.fileno(), 0)  # errors are told in any case
        return bool(watch.poll(0))
    return False


def flush_output() -> None:
    """Flush what was printed, before the process ends. What a full disk or a closed pipe does not
    take is dropped: Python would end with a status of its own for it."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                # Python flushes once more at exit: what is left goes where it cannot fail.
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)
