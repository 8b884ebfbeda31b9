"""Reads torch's flight recorder, which knows of each collective whether the device has begun and
ended it. On a GPU the host runs far ahead of the device: what hangs is often not what the host
waits in."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import torch._C._distributed_c10d as c10d

from megalite.comm.mesh import Axis, Mesh
from megalite.health.report import group_of, spans

KEPT = 10
"""Collectives of each group that a rank writes down before the oldest one under way, and from it
on."""


@dataclass(frozen=True)
class Flight:
    """Describes a collective that this rank has launched."""

    axis: str
    """The mesh axis of its group; torch's own name of a group that is none."""
    number: int
    """How many its group had by then, itself included."""
    kind: str
    """Such as nccl:all_reduce."""
    shape: str
    """Sizes of the tensors that went in."""
    state: str
    """ended; started, or scheduled where the device has not come to it or is not asked."""


def record(mesh: Mesh) -> list[Flight]:
    """Return the collectives around the oldest one under way in each group of this rank, in the
    order of launching."""
    found: defaultdict[str, list[Flight]] = defaultdict(list)
    names: dict[str, str] = {
        axis.group.group_name: axis.name for axis in _axes(mesh) if axis.group is not None
    }
    # NCCL's recorder, where torch has it, is one of its own beside that of gloo.
    for name in ("_dump_fr_trace_json", "_dump_nccl_trace_json"):
        if hasattr(c10d, name):
            for entry in json.loads(getattr(c10d, name)()).get("entries", []):
                flight = _flight(entry, names)
                found[flight.axis].append(flight)
    return [flight for flights in found.values() for flight in _around(flights)]


def _axes(mesh: Mesh) -> list[Axis]:
    """Return the axes of a mesh. Where one group is several, the last name counts: of dense
    weights, then the world."""
    fold = mesh.expert_fold
    of_experts = [fold.replicas, fold.holders, fold.expert, fold.tensor] if fold else []
    return [
        *of_experts,
        mesh.stage,
        mesh.replicas,
        mesh.data,
        mesh.context,
        mesh.pipeline,
        mesh.tensor,
        mesh.world,
    ]


def _flight(entry: Mapping[str, Any], names: Mapping[str, str]) -> Flight:
    ended = entry["retired"] or entry["state"] == "completed"
    name, description = entry["process_group"]
    number = entry["p2p_seq_id" if entry["is_p2p"] else "collective_seq_id"]
    shape = ", ".join("×".join(map(str, size)) for size in entry["input_sizes"])
    return Flight(
        names.get(name, description),
        number,
        entry["profiling_name"],
        shape,
        "ended" if ended else entry["state"],
    )


def _around(flights: list[Flight]) -> list[Flight]:
    open_ = next((i for i, flight in enumerate(flights) if flight.state != "ended"), len(flights))
    return flights[max(0, open_ - KEPT) : open_ + KEPT]


def path_of(folder: Path, rank: int) -> Path:
    """Return the file in a hang's folder that holds a rank's collectives."""
    return folder / f"rank-{rank:05d}.collectives.json"


def write(folder: Path, rank: int, flights: Iterable[Flight]) -> None:
    """Write down a rank's collectives: a line each, names of the columns first. Raises OSError."""
    rows = [[each.name for each in fields(Flight)], *map(astuple, flights)]
    path_of(folder, rank).write_text("[" + ",\n".join(map(json.dumps, rows)) + "]\n")


def read(folder: Path, rank: int) -> list[Flight]:
    """Read what a rank wrote down; nothing where it did not."""
    try:
        return [Flight(*row) for row in json.loads(path_of(folder, rank).read_text())[1:]]
    except (OSError, ValueError, TypeError):
        return []


def describe_flights(flights: Mapping[int, list[Flight]], mesh: Mesh) -> list[str]:
    """Say of each group with a collective under way which ranks are in which one. `flights` are
    those of each rank that could write them down."""
    groups: defaultdict[tuple[str, tuple[int, ...]], dict[int, str]] = defaultdict(dict)
    under_way = set()
    for rank, launched in flights.items():
        # A dict as a set that keeps its order.
        for axis in {flight.axis: None for flight in launched}:
            key, own = (
                (axis, group_of(rank, axis, mesh)),
                [flight for flight in launched if flight.axis == axis],
            )
            oldest = next((flight for flight in own if flight.state != "ended"), None)
            if oldest:
                under_way.add(key)
                groups[key][rank] = (
                    f"in {oldest.kind} {oldest.number} of {oldest.shape} ({oldest.state})"
                )
            else:
                groups[key][rank] = f"after {own[-1].kind} {own[-1].number}, with none under way"
    lines = []
    for key in sorted(under_way):
        by_text: defaultdict[str, list[int]] = defaultdict(list)
        for rank, text in groups[key].items():
            by_text[text].append(rank)
        lines.append(
            f"{key[0]}: " + "; ".join(f"{spans(ranks)} {text}" for text, ranks in by_text.items())
        )
    # Groups whose ranks differ come first: these are where it hangs.
    return sorted(lines, key=lambda line: "; " not in line)
