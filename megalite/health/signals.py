"""Requests to stop: SIGTERM, SIGINT or SIGUSR1 to any one rank makes all of them save after the
same step and leave.

The first signal only leaves a note, which the ranks compare once a step (`StopRequests.compare`). A
second one ends the process at once, for whoever does not want to wait for the save. Ranks that have
stopped are about to leave, and ignore what Slurm and launchers send from then on: the same request
may come to one node later than to another, and must not undo what it asked for."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from megalite.comm.collectives import start_highest
from megalite.comm.mesh import Mesh
from megalite.runtime.exit_codes import end_process, killed_by
from megalite.utils.notebook import in_notebook

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

ONE_REQUEST_S = 2.0
"""Signals within so many seconds of the first are the same request: Slurm signals every process of
a job, and a launcher that is one of them passes the signal on to its ranks, which thus get it
twice."""


class StopRequests:
    """Record signals between `with` and its end. Only the main thread can open one."""

    def __init__(self, mesh: Mesh):
        self._mesh = mesh
        self._asked = 0
        self._agreed = False

    def came_too_late(self) -> bool:
        """Return whether this rank was asked to stop when the ranks compared no more, as after the
        last step."""
        return self._asked > 0 and not self._agreed

    def compare(self) -> Callable[[], signal.Signals | None]:
        """Start telling the other ranks whether this one was asked to stop. Every rank calls it at
        the same place of every step. Returns a function to call later in that step, which returns
        the same on all ranks: a signal that one of them was sent, or None.

        The messages go from host to host while the devices compute, and wait for none of them."""
        result = start_highest(self._asked, self._mesh)

        def agreed() -> signal.Signals | None:
            number = result()
            self._agreed = self._agreed or number > 0
            return signal.Signals(number) if number else None

        return agreed

    def __enter__(self) -> StopRequests:
        # Python runs a handler when the main thread is next in Python code, which may be never if
        # it waits for a rank that is gone. The number of the signal goes through the pipe at once,
        # to a thread that can act on it.
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._handlers: dict[int, Any] = {
            number: signal.signal(number, _leave_it_to_the_pipe) for number in SIGNALS
        }
        self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._handlers.items():
            # SIGINT comes from a person, to whom the process may listen again.
            late = self._agreed and number != signal.SIGINT
            signal.signal(number, signal.SIG_IGN if late else handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._write)
        self._thread.join()
        os.close(self._read)

    def _watch(self) -> None:
        """Note the first signal that comes through the pipe; end the process at a second one. Runs
        in a thread."""
        first = 0.0
        while byte := os.read(self._read, 1):
            number = byte[0]
            if number not in SIGNALS:
                continue
            if not self._asked:
                self._asked, first = number, time.monotonic()
            elif number == signal.SIGINT and in_notebook():
                pass  # its kernel holds more than this run, and its stop button is soon pressed again
            elif time.monotonic() - first > ONE_REQUEST_S:
                end_process(killed_by(number))


def _leave_it_to_the_pipe(number: int, frame: FrameType | None) -> None:
    """Keep the signal from doing what it does by default."""
