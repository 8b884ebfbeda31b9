"""What a person reads of a hang: who is behind, and who waits for them."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from megalite.exit_codes import Exit, describe
from megalite.health.heartbeat import Heartbeat
from megalite.mesh import Mesh

SHOWN = 8
"""Ranks that get a line each; of more there is the number. All are in the folder."""


def describe_hang(
    beats: Mapping[int, Heartbeat], speaking: Iterable[int], mine: Heartbeat, mesh: Mesh, folder: Path
) -> str:
    """`speaking` ranks have answered the hang with their stacks; the others cannot."""
    spoken = {rank: beats[rank] for rank in speaking if rank in beats} | {mine.rank: mine}
    silent = [rank for rank in range(mesh.world.size) if rank not in spoken]
    behind = [_of_silent(rank, beats.get(rank), mine.host, folder) for rank in silent]
    behind += [f"{who(beat)}: {what(beat)}" for beat in spoken.values() if not beat.waits_in]
    behind = behind or [f"{who(beat)}: {what(beat)}" for beat in _with_fewer_collectives(spoken, mesh)]
    lines = [f"hang: no rank has made progress for {mine.stalled_s:.0f} s"]
    lines += ["behind:", *_some(behind)] if behind else ["each waits for others: their collectives do not match"]
    lines += ["waiting for others:", *_some(_waiting(spoken.values()))]
    lines += [f"stacks of all threads: {folder}", f"leaving with {describe(Exit.HUNG)}"]
    return "\n".join(["", *lines, ""])


def first_behind(report: str) -> str:
    """In one line."""
    return report.partition("behind:")[2].strip().partition("\n")[0]


def who(beat: Heartbeat) -> str:
    return f"rank {beat.rank} on {beat.host} (process {beat.pid})"


def what(beat: Heartbeat) -> str:
    waits = f"waits in {beat.waits_for}" if beat.waits_in else ""
    parts = (beat.doing, waits, f"no progress for {beat.stalled_s:.0f} s", f"at {beat.at}" if beat.at else "")
    return "; ".join(part for part in parts if part)


def _of_silent(rank: int, beat: Heartbeat | None, host: str, folder: Path) -> str:
    if beat is None:
        return f"rank {rank}: was never heard of"
    if beat.phase == "ended":
        return f"{who(beat)}: has left"
    reason = state_of(beat.pid) if beat.host == host else ""
    ago = time.time() - beat.time
    parts = [f"cannot speak{reason and f', {reason}'}, last heard of {ago:.0f} s ago", beat.doing, beat.waits_for]
    stacks = folder.parent / f"rank-{rank:05d}.stacks"
    if stacks.exists() and stacks.stat().st_size:
        parts.append(f"stacks: {stacks}")
    return f"{who(beat)}: {'; '.join(part for part in parts if part)}"


def state_of(pid: int) -> str:
    """What keeps a process of this machine from speaking, as far as Linux tells."""
    process = Path(f"/proc/{pid}")
    try:
        state = (process / "stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):  # the latter where it went between opening and reading
        return "its process is gone"
    except OSError:
        return ""
    if state == "D":
        return f"stuck in the kernel ({_kernel_function(process)})"
    return {"T": "stopped by a signal", "t": "stopped by a debugger", "Z": "its process has ended"}.get(state, "")


def _kernel_function(process: Path) -> str:
    try:
        return (process / "wchan").read_text() or "?"
    except OSError:
        return "?"


def _with_fewer_collectives(beats: Mapping[int, Heartbeat], mesh: Mesh) -> list[Heartbeat]:
    """Ranks that have not begun the collective that another one of the same group waits in."""
    awaited: defaultdict[tuple[str, tuple[int, ...]], int] = defaultdict(int)
    for beat in beats.values():
        key = beat.over, _group(beat.rank, beat.over, mesh)
        awaited[key] = max(awaited[key], beat.number)
    return [
        beat
        for beat in beats.values()
        if any(
            group == _group(beat.rank, axis, mesh) and beat.collectives.get(axis, 0) < number
            for (axis, group), number in awaited.items()
        )
    ]


def _group(rank: int, axis: str, mesh: Mesh) -> tuple[int, ...]:
    """The same for all ranks of a group of an axis."""
    pipeline, replica, tensor = mesh.place_of(rank)
    data, context = divmod(replica, mesh.context.size)
    others: dict[str, tuple[int, ...]] = {
        "pipeline": (replica, tensor),
        "replicas": (pipeline, tensor),
        "data": (pipeline, context, tensor),
        "context": (pipeline, data, tensor),
        "tensor": (pipeline, replica),
    }
    return others.get(axis, ())


def _waiting(beats: Iterable[Heartbeat]) -> list[str]:
    """Ranks that wait alike share a line."""
    alike: defaultdict[tuple[str, str], list[Heartbeat]] = defaultdict(list)
    for beat in beats:
        if beat.waits_in:
            alike[beat.doing, beat.waits_for].append(beat)
    return [
        f"{_ranks([beat.rank for beat in group])}: {doing}; in {waits_for} for {max(b.stalled_s for b in group):.0f} s"
        for (doing, waits_for), group in alike.items()
    ] or ["no rank"]


def _ranks(ranks: Sequence[int]) -> str:
    """[0, 1, 2, 5] → "ranks 0-2, 5"."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and spans[-1][1] == rank - 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    names = [str(low) if low == high else f"{low}-{high}" for low, high in spans]
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(names)}"


def _some(lines: Sequence[str]) -> list[str]:
    more = [f"  and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return [f"  {line}" for line in lines[:SHOWN]] + more
