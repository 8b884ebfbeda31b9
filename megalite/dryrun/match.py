"""Compares what ranks send one another, and plays it: a mismatch or a dead-lock is found without a
cluster.

Every communicator of a rank is a stream that runs its launches in order, as NCCL's do. A collective
ends when all of its ranks are at it, and a send when its receive is there: nothing is buffered.
What a rank launches waits, besides, for all that the program had waited for by then."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

SHOWN = 8
"""Ranks of a dead-lock that are named."""

Traffic = Mapping[str, Any]
"""What `groups.Log` wrote down of a rank."""
Comm = tuple[str, bool]
"""A communicator: the name of its group, and whether it is between hosts."""


class Call(NamedTuple):
    """A collective or message of one rank, with the line that started it."""

    part: Mapping[str, Any]
    line: str
    phase: str

    @property
    def what(self) -> tuple[Any, ...]:
        """Return what must be the same on all ranks."""
        names = ("kind", "op", "peer", "numel", "dtype", "host")
        return tuple(self.part[name] for name in names)

    def __str__(self) -> str:
        part = self.part
        kind = f"{part['kind']} ({part['op'].lower()})" if part["op"] else part["kind"]
        end = {"send": " to", "recv": " from"}.get(
            part["kind"], " of rank" if part["peer"] >= 0 else ""
        )
        peer = f"{end} {part['peer']}" if end else ""
        return f"{kind}{peer} of {part['numel']:,} {part['dtype']} at {self.line}"


def axis_of(group: Mapping[str, Any]) -> str:
    """Name a group by its axis and its ranks."""
    ranks = group["ranks"]
    shown = ", ".join(map(str, ranks)) if len(ranks) <= SHOWN else f"{ranks[0]} to {ranks[-1]}"
    return f"{group['axis'] or 'unnamed'} group of ranks {shown}"


def calls_of(traffic: Traffic) -> Iterator[tuple[int, int, Call]]:
    """Yield (launch, group, call) of a rank, in its order."""
    places, parts, phases = traffic["places"], traffic["parts"], deque(traffic["phases"])
    phase = "starting"
    calls: dict[tuple[int, str], Call] = {}
    for number, (group, wanted, _) in enumerate(traffic["launches"]):
        while phases and phases[0][1] <= number:
            phase = phases.popleft()[0]
        for part in wanted:
            if (part, phase) not in calls:
                calls[part, phase] = Call(parts[part], places[parts[part]["place"]], phase)
            yield number, group, calls[part, phase]


def compare(traffics: Mapping[int, Traffic]) -> list[str]:
    """Return what differs between the collectives of ranks that share a group: the first difference
    of each group."""
    sequences: dict[Comm, dict[int, list[Call]]] = defaultdict(dict)
    groups: dict[str, Mapping[str, Any]] = {}
    for rank, traffic in traffics.items():
        for _, number, call in calls_of(traffic):
            # Messages between two ranks need not be in one order with those of others; `play`
            # matches them.
            if call.part["kind"] in ("send", "recv"):
                continue
            group = traffic["groups"][number]
            groups[group["name"]] = group
            sequences[group["name"], call.part["host"]].setdefault(rank, []).append(call)
    found = []
    for (name, on_host), of_ranks in sequences.items():
        for rank in groups[name]["ranks"]:
            if rank in traffics:
                # A rank that starts nothing on a group differs from one that does.
                of_ranks.setdefault(rank, [])
        (first, wanted), *others = sorted(of_ranks.items())
        for rank, calls in others:
            difference = _difference(first, wanted, rank, calls)
            if difference:
                found.append(
                    f"{axis_of(groups[name])}{', between hosts' if on_host else ''}: {difference}"
                )
                break
    return found


def _difference(first: int, wanted: Sequence[Call], rank: int, calls: Sequence[Call]) -> str:
    """Return the first difference between the collectives of two ranks; empty where there is
    none."""
    for number, (theirs, own) in enumerate(zip(wanted, calls, strict=False), start=1):
        # `is`: ranks that share a record need no comparison.
        if theirs is not own and theirs.what != own.what:
            return f"collective {number} of rank {first} is {theirs}; of rank {rank} it is {own} ({own.phase})"
    if len(wanted) == len(calls):
        return ""
    more, longer, fewer = (
        (first, wanted, rank) if len(wanted) > len(calls) else (rank, calls, first)
    )
    at = min(len(wanted), len(calls))
    return f"rank {more} starts {longer[at]} ({longer[at].phase}), its collective {at + 1}; rank {fewer} has no more"


@dataclass
class _Launch:
    comm: Comm
    calls: list[Call]
    waits_for: list[int]
    is_started: bool = False
    left: int = 0
    """Parts that are not done."""


@dataclass
class _Rank:
    launches: list[_Launch]
    queues: dict[Comm, deque[int]]
    cleared: dict[bool, int] = field(default_factory=lambda: {True: 0, False: 0})
    """By side, host or device: up to which launch all that was waited for is done."""
    is_done: list[bool] = field(default_factory=list)
    counts: defaultdict[Comm, int] = field(default_factory=lambda: defaultdict(int))
    """Collectives that it has started, by communicator."""


def play(traffics: Mapping[int, Traffic]) -> list[str]:
    """Play all ranks' launches to the end. Return what keeps them from it: messages that differ at
    their ends, and ranks that wait for one another. Ranks that are not in `traffics` answer at
    once."""
    return _Play(traffics).run()


class _Play:
    def __init__(self, traffics: Mapping[int, Traffic]):
        self._ranks = {rank: _read(traffic) for rank, traffic in traffics.items()}
        self._groups = {g["name"]: g for traffic in traffics.values() for g in traffic["groups"]}
        self._sends: defaultdict[Any, deque[tuple[int, int, Call]]] = defaultdict(deque)
        self._receives: defaultdict[Any, deque[tuple[int, int, Call]]] = defaultdict(deque)
        self._met: defaultdict[Any, list[tuple[int, int]]] = defaultdict(list)
        self._found: list[str] = []
        # Ranks that may be able to start something; one may be in it several times.
        self._waiting = deque(self._ranks)

    def run(self) -> list[str]:
        """Advance ranks until none can go on."""
        while self._waiting:
            self._advance(self._waiting.popleft())
        return self._found + self._stuck()

    def _advance(self, number: int) -> None:
        """Start all that a rank can start."""
        rank = self._ranks[number]
        moved = True
        while moved:
            moved = False
            for queue in rank.queues.values():
                # One launch of a communicator at a time, in order: the next begins when it is done.
                while queue and rank.is_done[queue[0]]:
                    queue.popleft()
                if (
                    queue
                    and not rank.launches[queue[0]].is_started
                    and self._is_clear(rank, queue[0])
                ):
                    self._start(number, queue[0])
                    moved = True

    def _is_clear(self, rank: _Rank, number: int) -> bool:
        """Return whether all is done that a launch waits for."""
        side = rank.launches[number].comm[1]
        # Up to this launch everything that the program waited for must be done, as it went on only
        # then.
        while rank.cleared[side] <= number:
            launch = rank.launches[rank.cleared[side]]
            if launch.comm[1] == side and not all(rank.is_done[each] for each in launch.waits_for):
                return False
            rank.cleared[side] += 1
        return True

    def _start(self, number: int, index: int) -> None:
        rank = self._ranks[number]
        launch = rank.launches[index]
        launch.is_started, launch.left = True, len(launch.calls)
        for call in launch.calls:
            if call.part["kind"] in ("send", "recv"):
                self._message(number, index, call)
            else:
                self._collective(number, index, launch.comm)

    def _message(self, number: int, index: int, call: Call) -> None:
        comm = self._ranks[number].launches[index].comm
        peer = self._groups[comm[0]]["ranks"][call.part["peer"]]
        # Of ranks that are not run nothing is known: their end of a message is always there.
        if peer not in self._ranks:
            return self._part_done(number, index)
        sends = call.part["kind"] == "send"
        key = (comm, number, peer) if sends else (comm, peer, number)
        mine, theirs = (self._sends, self._receives) if sends else (self._receives, self._sends)
        if not theirs[key]:
            mine[key].append((number, index, call))
            return None
        other, other_index, other_call = theirs[key].popleft()
        if any(call.part[name] != other_call.part[name] for name in ("numel", "dtype")):
            one, two = (
                ((number, call), (other, other_call))
                if sends
                else ((other, other_call), (number, call))
            )
            self._found.append(
                f"{axis_of(self._groups[comm[0]])}: rank {one[0]} starts {one[1]}, and rank {two[0]} takes it by "
                f"{two[1]} ({call.phase})"
            )
        self._part_done(number, index)
        self._part_done(other, other_index)
        return None

    def _collective(self, number: int, index: int, comm: Comm) -> None:
        rank = self._ranks[number]
        # The n-th collective of each rank on a communicator is one and the same.
        key = (comm, rank.counts[comm])
        rank.counts[comm] += 1
        met = self._met[key]
        met.append((number, index))
        if len(met) == sum(each in self._ranks for each in self._groups[comm[0]]["ranks"]):
            for each, its_index in self._met.pop(key):
                self._part_done(each, its_index)

    def _part_done(self, number: int, index: int) -> None:
        rank = self._ranks[number]
        launch = rank.launches[index]
        launch.left -= 1
        if not launch.left:
            rank.is_done[index] = True
            self._waiting.append(number)

    def _stuck(self) -> list[str]:
        """Describe the ranks that did not come to an end."""
        lines = []
        for number, rank in self._ranks.items():
            left = [index for index, done in enumerate(rank.is_done) if not done]
            if not left:
                continue
            # What has begun and does not end is what holds the rest up.
            begun = [index for index in left if rank.launches[index].is_started] or left[:1]
            launch = rank.launches[begun[0]]
            call = launch.calls[0]
            behind = f"; behind it {rank.launches[left[-1]].calls[0]}" if len(left) > 1 else ""
            lines.append(f"  rank {number} waits in {call} ({call.phase}){behind}")
        if not lines:
            return []
        more = [f"  and {len(lines) - SHOWN} more ranks"] if len(lines) > SHOWN else []
        return ["\n".join(["ranks wait for one another, for ever:", *lines[:SHOWN], *more])]


def _read(traffic: Traffic) -> _Rank:
    calls: list[list[Call]] = [[] for _ in traffic["launches"]]
    for number, _, call in calls_of(traffic):
        calls[number].append(call)
    launches: list[_Launch] = []
    queues: defaultdict[Comm, deque[int]] = defaultdict(deque)
    for number, (group, _, waits_for) in enumerate(traffic["launches"]):
        # All parts of a launch are on one side, host or device.
        comm = (traffic["groups"][group]["name"], calls[number][0].part["host"])
        launches.append(_Launch(comm, calls[number], waits_for))
        queues[comm].append(number)
    return _Rank(launches, dict(queues), is_done=[False] * len(launches))


def bytes_by_axis(traffic: Traffic, phase: str) -> dict[str, float]:
    """Return the bytes that a rank sends in the first of the phases of this name, by axis, as a
    ring sends them."""
    begins = [number for name, number in traffic["phases"] if name == phase]
    ends = [number for _, number in traffic["phases"] if begins and number > begins[0]]
    sent: dict[str, float] = defaultdict(float)
    if not begins:
        return sent
    for group, parts, _ in traffic["launches"][begins[0] : min(ends, default=None)]:
        held = traffic["groups"][group]
        for part in parts:
            sent[held["axis"]] += _sent(traffic["parts"][part], len(held["ranks"]))
    return dict(sent)


def _sent(part: Mapping[str, Any], ranks: int) -> float:
    share = (ranks - 1) / ranks
    # As a ring sends them; whatever is not named, such as a message, is sent once and whole.
    ways = {
        "all_reduce": 2 * share,
        "all_gather": share,
        "reduce_scatter": share,
        "all_to_all": share,
        "recv": 0.0,
    }
    return part["bytes"] * ways.get(part["kind"], 1.0)
