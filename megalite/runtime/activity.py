"""Notes on what this process is doing, for whoever watches it from another thread
(health/watchdog.py).

The code that does the work leaves notes on one object, `NOW`: plain assignments, with no lock, no
file and no clock, so that a note costs next to nothing beside what it is about. A reader may see
half of a note, and the rest a moment later."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Protocol


class Timer(Protocol):
    """Called when this rank begins to wait for other ranks, and when it goes on."""

    def stop(self) -> None: ...
    def go(self) -> None: ...


class Activity:
    """The current phase, step and collective of this process."""

    __slots__ = (
        "action",
        "beats",
        "counts",
        "micro_batch",
        "number",
        "over",
        "phase",
        "step",
        "timer",
        "waits_in",
        "watcher",
    )

    def __init__(self) -> None:
        self.beats = 0
        """Grows with every note: as long as it does, there is progress."""
        self.watcher: Callable[[str, int], object] = lambda phase, step: None
        """Called with each phase and step that begin."""
        self.reset()

    def reset(self) -> None:
        """Forget all notes; only `beats` goes on growing, and `watcher` stays."""
        self.counts: defaultdict[str, int] = defaultdict(int)
        """How many collectives were begun over each axis of the mesh. Ranks of a group count
        alike."""
        self.phase, self.step, self.action, self.micro_batch = "starting", 0, "", -1
        # `waits_in` is what a reader looks at: empty while this rank works.
        self.waits_in, self.over, self.number = "", "", 0
        self.timer: Timer | None = None

    def begin(self, phase: str, step: int) -> None:
        """Note that a phase begins. Only "training" is expected to make steady progress; see
        `HealthConfig.patience_s`."""
        self.watcher(phase, step)
        self.phase, self.step = phase, step
        self.do("")

    def do(self, action: str, micro_batch: int = -1) -> None:
        """Note that this rank works, or waits for something of its own such as a disk."""
        self.action, self.micro_batch = action, micro_batch
        self.go_on()

    def enter(self, kind: str, over: str) -> None:
        """Note a collective over an axis that is waited for at once. `go_on` comes after it."""
        self.wait(kind, over, self.count(over))

    def count(self, over: str) -> int:
        """Count one more collective over an axis that has begun. Returns its number."""
        self.counts[over] += 1
        return self.counts[over]

    def wait(self, kind: str, over: str, number: int = 0) -> None:
        """Note that this rank waits for others: `kind` of collective, `over` which axis, its
        `number` there."""
        # `waits_in` last: a watcher that sees it finds the other two of the same wait.
        self.over, self.number, self.waits_in = over, number, kind
        self.beats += 1
        if self.timer is not None:
            self.timer.stop()

    def go_on(self) -> None:
        """Note that this rank waits no longer."""
        self.waits_in = ""
        self.beats += 1
        if self.timer is not None:
            self.timer.go()


NOW = Activity()
