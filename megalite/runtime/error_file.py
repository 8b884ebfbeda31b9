"""What a rank that fails leaves for its launcher, which shows it last: below it, the others only say that they lost
sight of that rank. The file is torchrun's own, in its format."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from typing import Any

from megalite.utils.secrecy import hide_secrets


def leave(message: str, traceback: str = "") -> None:
    """Without torchrun, nothing."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    now = time.time_ns()
    extra = {"py_callstack": hide_secrets(traceback), "timestamp": str(now // 10**9), "time_ns": now}
    try:
        with open(path, "w") as file:
            json.dump({"message": {"message": hide_secrets(message), "extraInfo": extra}}, file)
    except OSError:  # nobody is left to tell
        return


def time_of(failure: Any) -> int:
    """When a rank failed, in ns: torchrun counts whole seconds, within which others follow. `failure` is its record."""
    message = failure.message
    extra = message.get("extraInfo", {}) if isinstance(message, Mapping) else {}
    return extra.get("time_ns", failure.timestamp * 10**9 + 10**9)


def read(failure: Any) -> tuple[str, str]:
    """(message, traceback), empty where the rank left none."""
    if not isinstance(failure.message, Mapping):
        return "", ""
    return failure.message["message"], failure.message["extraInfo"]["py_callstack"]
