"""Imported by the server that ranks are forked from, which is then killed when pytest is, however
that ends."""

from __future__ import annotations

import contextlib
import ctypes
import signal
import sys

PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Have the system kill this process when its parent ends. Linux's alone; what is forked must
    ask for itself."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))


if any("multiprocessing.forkserver" in word for word in sys.orig_argv):
    end_with_parent()
