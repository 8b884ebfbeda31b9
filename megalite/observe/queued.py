"""Base of the sinks that talk to a tracking server.

All calls to the tracker happen on a thread of their own, fed through a queue: a slow import, a
server that does not answer, an upload that hangs or an exception costs the training loop nothing.
"""

from __future__ import annotations

import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

from megalite.utils.secrecy import hide_secrets

FINISH_SECONDS = 30  # for the last upload
CLOSE_SECONDS = FINISH_SECONDS + 5
QUEUED_RECORDS = 10_000


def named_step(record: Mapping[str, float]) -> dict[str, float]:
    """Return the record of a step by the names of trackers, such as `train/loss`, and `step`."""
    return {key if key == "step" else f"train/{key}": value for key, value in record.items()}


def named_evaluation(record: Mapping[str, float]) -> dict[str, float]:
    """Return the record of an evaluation by the names of trackers, such as `valid/loss`, and
    `step`."""
    return {key.replace("valid_", "valid/"): value for key, value in record.items()}


class QueuedSink(ABC):
    """Sink that queues records, with names such as `train/loss`, for `work` on a thread."""

    name: str
    later = ""
    """What to do with records that the server has not got when the run ends; empty: nothing."""

    def __init__(self, say: Callable[[str], None]):
        """Start the thread. `say` prints a line for the user. What `work` needs must be set
        before."""
        self._say = say
        # Records, and at the end the exit code.
        self._queue: queue.Queue[dict[str, Any] | int] = queue.Queue(QUEUED_RECORDS)
        # A daemon, so that an upload that hangs does not keep the process alive.
        self._thread = threading.Thread(target=self._work, name=self.name, daemon=True)
        self._thread.start()

    @abstractmethod
    def work(self) -> None:
        """Send records from the queue until the exit code comes. Runs on the thread."""

    def step(self, record: dict[str, float]) -> None:
        self.put(named_step(record))

    def evaluation(self, record: dict[str, float]) -> None:
        self.put(named_evaluation(record))

    def tasks(self, record: dict[str, float]) -> None:
        """Record the results of tasks. Without a `step` they come after what the run has recorded
        so far."""
        self.put(record)

    def close(self, status: str) -> None:
        """Finish the run and wait for the upload, CLOSE_SECONDS at most. Raises TimeoutError."""
        self.put(1 if status == "failed" else 0)
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            raise TimeoutError(f"no answer in {CLOSE_SECONDS} s{self.later}")

    def put(self, item: dict[str, Any] | int) -> None:
        """Queue a record or the exit code. Raises TimeoutError if the thread has fallen too far
        behind."""
        if not self._thread.is_alive():
            return  # turned off; `_work` has said why
        try:
            self._queue.put_nowait(item)
        except queue.Full:
            raise TimeoutError(f"no answer for {QUEUED_RECORDS} records") from None

    def get(self) -> dict[str, Any] | int:
        """Wait for the next record, or the exit code."""
        return self._queue.get()

    def warn(self, what: str, error: Exception) -> None:
        """Print a warning without the secrets of an error's text."""
        reason = " ".join(str(error).split()) or type(error).__name__
        hint = "; pip install 'megalite[observe]'" if isinstance(error, ImportError) else ""
        self._say(f"warning: {self.name} {what}: {hide_secrets(reason)}{hint}")

    def _work(self) -> None:
        try:
            self.work()
        except Exception as error:  # no error of a tracker may end the training
            self.warn("turned off, training goes on", error)
