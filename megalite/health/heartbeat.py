"""RUN/health/rank-N.json: what a rank is doing, written anew every few seconds. A rank whose file stays as it is cannot
speak any more."""

from __future__ import annotations

import contextlib
import json
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from megalite.activity import NOW
from megalite.mesh import node_name

SIZE = 2048
"""Bytes of a file, so that one can take the place of another."""


@dataclass(frozen=True)
class Heartbeat:
    rank: int
    host: str
    pid: int
    run: int
    """When the ranks started, in seconds since 1970, as rank 0 saw it. Beats of another start do not count."""
    beat: int
    """How many were written. (Clocks of two nodes differ, so that times tell less.)"""
    time: float
    phase: str
    step: int
    micro_batch: int
    """-1: none."""
    action: str
    waits_in: str
    """What it waits for other ranks in, such as "all_reduce"; empty where it does not."""
    over: str
    """The axis of the mesh it waits over."""
    number: int
    """Of that collective over the axis; 0: not numbered."""
    stalled_s: float
    """Since the last sign of progress."""
    patience_s: float
    """How long may pass without one."""
    collectives: dict[str, int] = field(default_factory=dict)
    """Begun so far over each axis."""
    at: str = ""
    """Where the main thread is: given once there is a hang."""

    @property
    def stalled(self) -> bool:
        return self.stalled_s > self.patience_s

    @property
    def doing(self) -> str:
        """In words."""
        step = f"step {self.step}" if self.step else ""
        micro_batch = f"micro-batch {self.micro_batch}" if self.micro_batch >= 0 else ""
        parts = (step, self.phase if self.phase != "training" else "", self.action, micro_batch)
        return ", ".join(part for part in parts if part)

    @property
    def waits_for(self) -> str:
        number = f" {self.number}" if self.number else ""
        return f"{self.waits_in}{number} over {self.over}" if self.waits_in else ""


def take(rank: int, run: int, beat: int, stalled_s: float, patience_s: float) -> Heartbeat:
    """Of this process, now."""
    return Heartbeat(
        rank, node_name(), os.getpid(), run, beat, time.time(), NOW.phase, NOW.step, NOW.micro_batch, NOW.action,
        NOW.waits_in, NOW.over if NOW.waits_in else "", NOW.number if NOW.waits_in else 0,
        round(stalled_s, 1), patience_s, dict(NOW.counts),
    )  # fmt: skip


def path_of(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.json"


def write(folder: Path, beat: Heartbeat) -> None:
    """A reader sees the one before or this one. Not durable: that would be dear, and a crash makes it worthless.

    Raises OSError where a disk does not take it."""
    path = path_of(folder, beat.rank)
    text = json.dumps(asdict(beat)).ljust(SIZE)
    try:
        temporary = path.with_suffix(".tmp")
        temporary.write_text(text)
        temporary.replace(path)
    except OSError:  # a full disk still takes it in the place of the one before
        with open(path, "r+") as file:
            file.write(text)


def read_all(folder: Path, world_size: int, run: int) -> dict[int, Heartbeat]:
    """The last heartbeat of every rank of this start that has one."""
    found = {}
    for rank in range(world_size):
        with contextlib.suppress(OSError, ValueError, TypeError):
            beat = Heartbeat(**json.loads(path_of(folder, rank).read_text()))
            if beat.run == run:
                found[rank] = beat
    return found
