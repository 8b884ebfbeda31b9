"""What the exit status of a command says. `slurm/pretrain.sh` decides by it whether to start again."""

from __future__ import annotations

import signal
from enum import IntEnum


class Exit(IntEnum):
    DONE = 0
    FAILED = 1
    MISTAKE = 2
    NOT_SAVED = 74
    STOPPED = 75

    @property
    def meaning(self) -> str:
        return _MEANINGS[self]


_MEANINGS = {
    Exit.DONE: "done, or stopped at train.stop_at",
    Exit.FAILED: "failed: a traceback says why",
    Exit.MISTAKE: "a mistake in the command, the config, the data or a checkpoint: starting again changes nothing",
    Exit.NOT_SAVED: "the last checkpoint could not be written",
    Exit.STOPPED: "asked to stop: saved, and goes on there when started again",
}


def killed_by(number: int) -> int:
    """The status of a process that a signal ended, as shells count it."""
    return 128 + number


def describe(status: int) -> str:
    """In words, for a person."""
    if status in _MEANINGS:
        return f"exit status {status} ({Exit(status).meaning})"
    try:
        return f"exit status {status} (killed by {signal.Signals(status - 128).name})"
    except ValueError:
        return f"exit status {status}"
