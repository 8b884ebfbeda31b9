"""Reports stragglers: ranks that compute more slowly than peers with the same work.

Every rank ends its step when the slowest does, so step times are all alike. What differs is the
time a rank spends without waiting for others. It is measured in one step of
`health.straggler_every`, and exchanged later, between hosts: no device is waited for.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from statistics import median_low
from typing import Any

import torch
from torch import Tensor

from megalite.comm.collectives import all_gather, start_sharing
from megalite.comm.mesh import Mesh, node_name
from megalite.config import HealthConfig
from megalite.observe.steps import Record
from megalite.observe.throughput import HostEvent
from megalite.runtime.activity import NOW

PERSISTENT = 3
"""Number of comparisons in a row in which a rank must be slow before it is reported."""

NOTICEABLE_S = 0.005
"""Smallest excess over the median, in seconds, that counts as slow. The scheduler of the OS costs
about as much."""


class StepTimer:
    """Measures how long this rank computed in one step, without its waits for other ranks.

    On a GPU the events lie in the stream, which is what waits there."""

    def __init__(self, event: Callable[[], Any]):
        """Start with the clock running. `event` makes a torch.cuda.Event or a `HostEvent`."""
        self._event = event
        # A step is a list of stretches of work, with a wait between two of them.
        self._begins = [self._now()]
        self._ends = list[Any]()

    def _now(self) -> Any:
        event = self._event()
        event.record()
        return event

    def stop(self) -> None:
        """Stop the clock: this rank begins to wait for others. Does nothing if it is stopped."""
        if len(self._ends) < len(self._begins):
            self._ends.append(self._now())

    def go(self) -> None:
        """Let the clock run again. Does nothing if it runs."""
        if len(self._begins) == len(self._ends):
            self._begins.append(self._now())

    def seconds(self) -> float:
        """Return the seconds of work. Call `stop` before; waits for the device."""
        self._ends[-1].synchronize()
        stretches = zip(self._begins, self._ends, strict=True)
        return sum(begin.elapsed_time(end) for begin, end in stretches) / 1e3


class Stragglers:
    """Times steps and reports the ranks that are slower than their peers.

    Every rank has one and calls `begin` and `end` around every step. Making it is a collective."""

    def __init__(self, health: HealthConfig, mesh: Mesh):
        self._health = health
        self._mesh = mesh
        self._hosts = names_of_all(node_name(), mesh)
        self._last: StepTimer | None = None
        self._shared: Callable[[], Tensor] | None = None
        self._times_slow = [0] * mesh.world.size
        self._slowness: dict[int, float] = {}
        """Compute time of each reported rank, as a multiple of its peers' median."""
        self._news: list[str] = []

    def begin(self, step: int) -> None:
        """Start the timer if `step` is due, and start to exchange the times of the last step that
        was."""
        if self._mesh.world.size == 1 or step % self._health.straggler_every:
            return
        # Measured `straggler_every` steps ago: no device has to be waited for.
        if self._last is not None:
            self._shared = start_sharing(self._last.seconds(), self._mesh)
        NOW.timer = StepTimer(host_or_device_event(self._mesh.device))

    def end(self) -> None:
        """Stop the timer, and compare the times whose exchange was begun."""
        if NOW.timer is not None:
            NOW.timer.stop()
            assert isinstance(NOW.timer, StepTimer)
            self._last, NOW.timer = NOW.timer, None
        if self._shared is not None:
            self._compare(self._shared().tolist())
            self._shared = None

    def record(self) -> Record:
        """Return the slowest reported rank and its slowness, for the metrics record; empty if there
        is none."""
        if not self._slowness:
            return {}
        # One of them: a metrics record has no room for lists.
        rank = max(self._slowness, key=lambda rank: self._slowness[rank])
        return {"straggler": rank, "straggler_slowness": self._slowness[rank]}

    def news(self) -> list[str]:
        """Return the messages since the last call, for the console."""
        said, self._news = self._news, []
        return said

    def _compare(self, seconds: Sequence[float]) -> None:
        """Compare the compute times of all ranks, `seconds` [world].

        Pipeline stages may have unequal work, so a rank's peers are the ranks of its own stage."""
        peers: defaultdict[int, list[int]] = defaultdict(list)
        for rank in range(len(seconds)):
            peers[self._mesh.place_of(rank)[0]].append(rank)
        for ranks in peers.values():
            # The lower of two middle values: of two peers, the slower one is compared with the
            # faster.
            median = median_low(seconds[rank] for rank in ranks)
            for rank in ranks:
                self._judge(rank, seconds[rank], median)

    def _judge(self, rank: int, seconds: float, median: float) -> None:
        """Count how often in a row a rank is slow, and report when that begins to be persistent and
        when it ends."""
        name = f"rank {rank} on {self._hosts[rank]}"
        # A multiple alone would report ranks of very short steps for what the scheduler costs.
        if seconds > max(self._health.straggler_factor * median, median + NOTICEABLE_S):
            self._times_slow[rank] += 1
            if self._times_slow[rank] < PERSISTENT:
                return
            slowness = seconds / median
            self._slowness[rank] = slowness
            if self._times_slow[rank] == PERSISTENT:  # reported once
                self._news.append(
                    f"warning: {name} is slow: it computes {slowness:.1f} times as long as its peers "
                    f"({seconds:.3g} s a step, their median {median:.3g} s)"
                )
            return
        self._times_slow[rank] = 0
        if self._slowness.pop(rank, None):
            self._news.append(f"{name} is as fast as its peers again")


def host_or_device_event(device: torch.device) -> Callable[[], Any]:
    """Return what makes a timing event of this device: torch.cuda.Event, or its stand-in on the
    CPU."""
    return HostEvent if device.type == "cpu" else lambda: torch.cuda.Event(enable_timing=True)


def names_of_all(name: str, mesh: Mesh) -> list[str]:
    """Gather the `name` of every rank, in rank order, cut to 64 bytes each. A collective."""
    size = 64
    letters = list(name.encode()[:size].ljust(size))
    # Of one length on all ranks, as the collective needs it.
    mine = torch.tensor([letters], dtype=torch.uint8, device=mesh.device)
    rows = all_gather(mine, mesh.world, 0).tolist()
    return [bytes(row).decode(errors="replace").rstrip() for row in rows]
