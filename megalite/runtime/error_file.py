"""The error file that a failing rank leaves for its launcher, which shows it last: below it, the
other ranks only say that they lost that rank. The file is torchrun's own, in its format."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from typing import Any

from megalite.utils.secrecy import hide_secrets

LAUNCHER = "MEGALITE_LAUNCHER"
"""Environment variable that `megalite.launch` sets for its ranks: it tells of their failures
itself."""


def leave(message: str, traceback: str = "") -> None:
    """Write torchrun's error file. Does nothing without torchrun."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    now = time.time_ns()
    extra = {
        "py_callstack": hide_secrets(traceback),
        "timestamp": str(now // 10**9),
        "time_ns": now,
    }
    try:
        with open(path, "w") as file:
            json.dump({"message": {"message": hide_secrets(message), "extraInfo": extra}}, file)
    except OSError:  # nobody is left to tell
        return


def time_of(failure: Any) -> int:
    """Return when a rank failed, in ns: torchrun counts whole seconds, within which others follow.
    `failure` is its record."""
    message = failure.message
    extra = message.get("extraInfo", {}) if isinstance(message, Mapping) else {}
    return extra.get("time_ns", failure.timestamp * 10**9 + 10**9)


def read(failure: Any) -> tuple[str, str]:
    """Return (message, traceback) from torchrun's record of a failure; empty where the rank left
    none."""
    if not isinstance(failure.message, Mapping):
        return "", ""
    return failure.message["message"], failure.message["extraInfo"]["py_callstack"]
