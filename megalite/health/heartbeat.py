"""Heartbeats in RUN/health/rank-N.json: what a rank is doing, rewritten every few seconds. A rank
whose file stops changing is dead, stopped, or cut off from the file system.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from megalite.comm.mesh import node_name
from megalite.runtime.activity import NOW

SIZE = 2048
"""Bytes of every file, padded: on a full disk, a heartbeat is still written over the one before."""


@dataclass(frozen=True)
class Heartbeat:
    """States what one rank is doing, and since when it has made no progress."""

    rank: int
    host: str
    pid: int
    run: int
    """When the ranks started, in seconds since 1970 on rank 0's clock. Heartbeats of another start
    are ignored."""
    beat: int
    """Number of heartbeats written so far. Counts are compared, not times: clocks of two nodes
    differ."""
    time: float
    """When it was written, in seconds since 1970."""
    phase: str
    step: int
    micro_batch: int
    """-1: none."""
    action: str
    waits_in: str
    """The collective it waits in for other ranks, such as "all_reduce"; empty if it does not
    wait."""
    over: str
    """The mesh axis of that collective."""
    number: int
    """Sequence number of that collective over the axis. 0: not numbered."""
    stalled_s: float
    """Seconds since the last progress."""
    patience_s: float
    """Seconds without progress after which the rank counts as stalled."""
    collectives: dict[str, int] = field(default_factory=dict)
    """Number of collectives begun so far over each axis."""
    at: str = ""
    """Code position of the main thread. Set only once there is a hang."""

    @property
    def stalled(self) -> bool:
        """True if the rank has made no progress for longer than its patience."""
        return self.stalled_s > self.patience_s

    @property
    def doing(self) -> str:
        """Describe what the rank does, such as "step 7, forward, micro-batch 2"."""
        step = f"step {self.step}" if self.step else ""
        phase = self.phase if self.phase != "training" else ""  # the usual one goes without saying
        micro_batch = f"micro-batch {self.micro_batch}" if self.micro_batch >= 0 else ""
        parts = (step, phase, self.action, micro_batch)
        return ", ".join(part for part in parts if part)

    @property
    def waits_for(self) -> str:
        """Describe the collective the rank waits in, such as "all_reduce 12 over tensor"; empty if
        in none."""
        if not self.waits_in:
            return ""
        number = f" {self.number}" if self.number else ""
        return f"{self.waits_in}{number} over {self.over}"


def take(rank: int, run: int, beat: int, stalled_s: float, patience_s: float) -> Heartbeat:
    """Return the heartbeat of this process now.

    `rank`, `run`, `beat`, `stalled_s` and `patience_s` are the fields of `Heartbeat`; the others
    come from `activity.NOW`."""
    # NOW keeps the last collective after it has ended: its axis and number count only during a
    # wait.
    return Heartbeat(
        rank, node_name(), os.getpid(), run, beat, time.time(), NOW.phase, NOW.step, NOW.micro_batch, NOW.action,
        NOW.waits_in, NOW.over if NOW.waits_in else "", NOW.number if NOW.waits_in else 0,
        round(stalled_s, 1), patience_s, dict(NOW.counts),
    )  # fmt: skip


def path_of(folder: Path, rank: int) -> Path:
    """Return the heartbeat file of a rank."""
    return folder / f"rank-{rank:05d}.json"


def write(folder: Path, beat: Heartbeat) -> None:
    """Replace the rank's heartbeat file in `folder`. Readers see the old one or the new one, never
    a part.

    There is no fsync: it would be expensive every few seconds, and after a crash nobody needs the
    file. Raises OSError where the disk refuses it."""
    path = path_of(folder, beat.rank)
    text = json.dumps(asdict(beat)).ljust(SIZE)
    try:
        temporary = path.with_suffix(".tmp")
        temporary.write_text(text)
        temporary.replace(path)
    except OSError:
        # A full disk has no room for a second file, but accepts new bytes in the old one.
        with open(path, "r+") as file:
            file.write(text)


def read_all(folder: Path, world_size: int, run: int) -> dict[int, Heartbeat]:
    """Read the last heartbeat of each of `world_size` ranks from `folder`, by rank.

    Ranks without a heartbeat of this `run`, or with a damaged one, are left out."""
    found = {}
    for rank in range(world_size):
        with contextlib.suppress(OSError, ValueError, TypeError):
            beat = Heartbeat(**json.loads(path_of(folder, rank).read_text()))
            if beat.run == run:
                found[rank] = beat
    return found
