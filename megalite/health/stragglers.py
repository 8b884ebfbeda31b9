"""Names ranks that compute more slowly than others that do the same.

Every rank ends its step when the slowest does, so that the step's time tells nothing. What tells is the time without
the waiting for other ranks. It is taken of one step in `health.straggler_every`, and the ranks tell each other later,
on their hosts: no device is waited for.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from statistics import median_low
from typing import Any

import torch
from torch import Tensor

from megalite.activity import NOW
from megalite.config import HealthConfig
from megalite.mesh import Mesh, node_name
from megalite.observe.steps import Record
from megalite.observe.throughput import HostEvent
from megalite.parallel.collectives import all_gather, start_sharing

PERSISTENT = 3
"""Comparisons in a row in which a rank is slow, until it is named."""

NOTICEABLE_S = 0.005
"""A step is not called slow for less: so long a process may have to wait for its turn."""


class StepTimer:
    """Of one step: how long this rank did not wait for others. On a GPU it is the stream that waits."""

    def __init__(self, event: Callable[[], Any]):
        self._event = event
        self._begins, self._ends = [self._now()], list[Any]()  # of stretches of work

    def _now(self) -> Any:
        event = self._event()
        event.record()
        return event

    def stop(self) -> None:
        if len(self._ends) < len(self._begins):
            self._ends.append(self._now())

    def go(self) -> None:
        if len(self._begins) == len(self._ends):
            self._begins.append(self._now())

    def seconds(self) -> float:
        """After `stop`."""
        self._ends[-1].synchronize()
        return sum(begin.elapsed_time(end) for begin, end in zip(self._begins, self._ends, strict=True)) / 1e3


class Stragglers:
    """Every rank has one, and calls `begin` and `end` around every step. Making it is a collective."""

    def __init__(self, health: HealthConfig, mesh: Mesh):
        self._health, self._mesh = health, mesh
        self._hosts = names_of_all(node_name(), mesh)
        self._last: StepTimer | None = None
        self._shared: Callable[[], Tensor] | None = None
        self._times_slow = [0] * mesh.world.size
        self._slowness: dict[int, float] = {}
        """Times the median, of ranks that were named."""
        self._news: list[str] = []

    def begin(self, step: int) -> None:
        if self._mesh.world.size == 1 or step % self._health.straggler_every:
            return
        if self._last is not None:  # of so many steps ago that no device has to be waited for
            self._shared = start_sharing(self._last.seconds(), self._mesh)
        NOW.timer = StepTimer(host_or_device_event(self._mesh.device))

    def end(self) -> None:
        if NOW.timer is not None:
            NOW.timer.stop()
            assert isinstance(NOW.timer, StepTimer)
            self._last, NOW.timer = NOW.timer, None
        if self._shared is not None:
            self._compare(self._shared().tolist())
            self._shared = None

    def record(self) -> Record:
        """The slowest of those that were named, for the record of a step."""
        if not self._slowness:
            return {}
        rank = max(self._slowness, key=lambda rank: self._slowness[rank])
        return {"straggler": rank, "straggler_slowness": self._slowness[rank]}

    def news(self) -> list[str]:
        """What there is to say since the last call, for the console."""
        said, self._news = self._news, []
        return said

    def _compare(self, seconds: Sequence[float]) -> None:
        """Stages of a pipeline need not be equal: a rank is compared with those of the same stages."""
        peers: defaultdict[int, list[int]] = defaultdict(list)
        for rank in range(len(seconds)):
            peers[self._mesh.place_of(rank)[0]].append(rank)
        for ranks in peers.values():
            median = median_low(seconds[rank] for rank in ranks)
            for rank in ranks:
                self._judge(rank, seconds[rank], median)

    def _judge(self, rank: int, seconds: float, median: float) -> None:
        name = f"rank {rank} on {self._hosts[rank]}"
        if seconds > max(self._health.straggler_factor * median, median + NOTICEABLE_S):
            self._times_slow[rank] += 1
            if self._times_slow[rank] == PERSISTENT:
                self._news.append(
                    f"warning: {name} is slow: it computes {seconds / median:.1f} times as long as its peers "
                    f"({seconds:.3g} s a step, their median {median:.3g} s)"
                )
            if self._times_slow[rank] >= PERSISTENT:
                self._slowness[rank] = seconds / median
            return
        self._times_slow[rank] = 0
        if self._slowness.pop(rank, None):
            self._news.append(f"{name} is as fast as its peers again")


def host_or_device_event(device: torch.device) -> Callable[[], Any]:
    return HostEvent if device.type == "cpu" else lambda: torch.cuda.Event(enable_timing=True)


def names_of_all(name: str, mesh: Mesh) -> list[str]:
    """Every rank's, in rank order."""
    size = 64
    letters = list(name.encode()[:size].ljust(size))
    mine = torch.tensor([letters], dtype=torch.uint8, device=mesh.device)
    return [bytes(row).decode(errors="replace").rstrip() for row in all_gather(mine, mesh.world, 0).tolist()]
