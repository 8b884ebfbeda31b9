"""Writes the hang report: which ranks are behind, and which ones wait for them."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from megalite.comm.mesh import Mesh
from megalite.health.heartbeat import Heartbeat
from megalite.runtime.exit_codes import Exit, describe

SHOWN = 8
"""Largest number of lines in a list of ranks. The hang's folder has a file of every rank."""


def describe_hang(
    beats: Mapping[int, Heartbeat],
    speaking: Iterable[int],
    mine: Heartbeat,
    mesh: Mesh,
    folder: Path,
    flights: Sequence[str] = (),
) -> str:
    """Return the hang report of the run.

    `beats` are the last heartbeats by rank, `speaking` the ranks that have written their stacks to
    `folder`, `mine` the heartbeat of this rank, `flights` what the flight recorder says
    (`flight.describe_flights`). A rank that cannot speak is behind; so is one that does not wait
    for others; and if all wait, the ranks that have not begun a collective that others wait in."""
    spoken = {rank: beats[rank] for rank in speaking if rank in beats}
    spoken[mine.rank] = mine
    silent = [rank for rank in range(mesh.world.size) if rank not in spoken]
    behind = [_of_silent(rank, beats.get(rank), mine.host, folder) for rank in silent]
    behind += [_who_and_what(beat) for beat in spoken.values() if not beat.waits_in]
    if not behind:
        behind = [_who_and_what(beat) for beat in _with_fewer_collectives(spoken, mesh)]
    # Empty lines around it: other ranks write to the same console.
    lines = ["", f"hang: no rank has made progress for {mine.stalled_s:.0f} s"]
    if behind:
        lines += ["behind:", *_some(behind)]
    else:
        lines += ["each waits for others: their collectives do not match"]
    lines += ["waiting for others:", *_some(_waiting(spoken.values()))]
    if flights:
        lines += ["collectives under way:", *_some(flights)]
    lines += [f"stacks of all threads: {folder}", f"leaving with {describe(Exit.HUNG)}", ""]
    return "\n".join(lines)


def first_behind(report: str) -> str:
    """Return the first rank that a hang report names as behind, and what it does, in one line."""
    return report.partition("behind:")[2].strip().partition("\n")[0]


def who(beat: Heartbeat) -> str:
    """Name the process of a heartbeat."""
    return f"rank {beat.rank} on {beat.host} (process {beat.pid})"


def what(beat: Heartbeat) -> str:
    """Describe what a rank does, what it waits in and since when it has made no progress."""
    waits = f"waits in {beat.waits_for}" if beat.waits_in else ""
    idle = f"no progress for {beat.stalled_s:.0f} s"
    at = f"at {beat.at}" if beat.at else ""
    return _joined(beat.doing, waits, idle, at)


def _who_and_what(beat: Heartbeat) -> str:
    return f"{who(beat)}: {what(beat)}"


def _joined(*parts: str) -> str:
    return "; ".join(part for part in parts if part)


def _of_silent(rank: int, beat: Heartbeat | None, host: str, folder: Path) -> str:
    """Describe a rank that has not written its stacks, from its last heartbeat and, on the same
    host, from /proc."""
    if beat is None:
        return f"rank {rank}: was never heard of"
    if beat.phase == "ended":
        return f"{who(beat)}: has left"
    # /proc knows the processes of this machine only.
    reason = state_of(beat.pid) if beat.host == host else ""
    ago = time.time() - beat.time
    silence = "cannot speak"
    if reason:
        silence += f", {reason}"
    silence += f", last heard of {ago:.0f} s ago"
    # faulthandler's timer writes stacks without the interpreter's lock, also where the watchdog's
    # thread cannot run.
    stacks = folder.parent / f"rank-{rank:05d}.stacks"
    where = f"stacks: {stacks}" if stacks.exists() and stacks.stat().st_size else ""
    return f"{who(beat)}: {_joined(silence, beat.doing, beat.waits_for, where)}"


def state_of(pid: int) -> str:
    """Say what keeps a process of this machine from speaking, as far as Linux tells; empty if it
    does not."""
    process = Path(f"/proc/{pid}")
    try:
        # The state follows the program's name, which stands in parentheses and may hold some
        # itself.
        state = (process / "stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "its process is gone"  # or went between opening the file and reading it
    except OSError:
        return ""
    if state == "D":
        return f"stuck in the kernel ({_kernel_function(process)})"
    reasons = {
        "T": "stopped by a signal",
        "t": "stopped by a debugger",
        "Z": "its process has ended",
    }
    return reasons.get(state, "")


def _kernel_function(process: Path) -> str:
    """Return the kernel function a process sleeps in, such as one of NFS; "?" where that may not be
    read."""
    try:
        return (process / "wchan").read_text() or "?"
    except OSError:
        return "?"


def _with_fewer_collectives(beats: Mapping[int, Heartbeat], mesh: Mesh) -> list[Heartbeat]:
    """Return the ranks that have not begun the collective that another rank of their group waits
    in."""
    # The highest number that is waited for in each group of each axis.
    awaited: defaultdict[tuple[str, tuple[int, ...]], int] = defaultdict(int)
    for beat in beats.values():
        key = beat.over, group_of(beat.rank, beat.over, mesh)
        awaited[key] = max(awaited[key], beat.number)

    def lacks_one(beat: Heartbeat) -> bool:
        for (axis, group), number in awaited.items():
            begun = beat.collectives.get(axis, 0)
            if begun < number and group == group_of(beat.rank, axis, mesh):
                return True
        return False

    return [beat for beat in beats.values() if lacks_one(beat)]


def group_of(rank: int, axis: str, mesh: Mesh) -> tuple[int, ...]:
    """Return the same key for all ranks of one process group of an axis."""
    pipeline, replica, tensor = mesh.place_of(rank)
    data, context = divmod(replica, mesh.context.size)
    others: dict[str, tuple[int, ...]] = {
        "pipeline": (replica, tensor),
        "replicas": (pipeline, tensor),
        "data": (pipeline, context, tensor),
        "context": (pipeline, data, tensor),
        "tensor": (pipeline, replica),
        "stage": (pipeline,),
    }
    _, expert_replica, holder = mesh.place_of(rank, mesh.experts)
    expert, expert_tensor = divmod(holder, mesh.experts.tensor.size)
    others |= {
        "experts": (pipeline, expert_replica),
        "expert_replicas": (pipeline, holder),
        "expert": (pipeline, expert_replica, expert_tensor),
        "expert_tensor": (pipeline, expert_replica, expert),
    }
    return others.get(axis, ())


def _waiting(beats: Iterable[Heartbeat]) -> list[str]:
    """Describe the waiting ranks, one line for all that do the same and wait in the same
    collective."""
    alike: defaultdict[tuple[str, str], list[Heartbeat]] = defaultdict(list)
    for beat in beats:
        if beat.waits_in:
            alike[beat.doing, beat.waits_for].append(beat)
    lines = []
    for (doing, waits_for), group in alike.items():
        ranks = spans([beat.rank for beat in group])
        longest = max(beat.stalled_s for beat in group)
        lines.append(f"{ranks}: {doing}; in {waits_for} for {longest:.0f} s")
    return lines or ["no rank"]


def spans(ranks: Sequence[int]) -> str:
    """Write ranks as spans: [0, 1, 2, 5] → "ranks 0-2, 5"."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and spans[-1][1] == rank - 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    names = []
    for low, high in spans:
        names.append(str(low) if low == high else f"{low}-{high}")
    word = "ranks" if len(ranks) > 1 else "rank"
    return f"{word} {', '.join(names)}"


def _some(lines: Sequence[str]) -> list[str]:
    """Indent the first SHOWN lines, and say how many more there are."""
    shown = [f"  {line}" for line in lines[:SHOWN]]
    if len(lines) > SHOWN:
        shown.append(f"  and {len(lines) - SHOWN} more")
    return shown
