"""One optimizer step, event by event: every pass of every pipeline rank in the order of its schedule, the hand-overs
between ranks, and the traffic of the replicas beside them.

A rank computes one pass at a time and sends each message when its pass has ended. Weights that the last step gathers
arrive in the order of the forward pass, layer by layer, and the first micro-batch waits for each; gradients are reduced
layer by layer as the last micro-batch's backward pass makes them. Replicas and tensor ranks do all the same, so one of
each stands for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megalite.planner.schedule import Order


@dataclass(frozen=True)
class Piece:
    """A layer, or what stands before or behind the layers of a stage."""

    forward: float
    backward: float
    """Until its gradients are there: a whole backward pass, or a weights' pass of a zero-bubble schedule."""
    gather: float
    """Seconds of the all-gather of its weights, 0 where there is none."""
    reduce: float
    """Seconds of the reduction of its gradients, 0 where there is none."""


@dataclass(frozen=True)
class StageWork:
    """Seconds of a stage's passes over one micro-batch."""

    forward: float
    backward: float
    backward_input: float
    backward_weight: float
    pieces: tuple[Piece, ...]
    """In the order of the forward pass."""

    @property
    def times(self) -> dict[str, float]:
        return {"F": self.forward, "B": self.backward, "I": self.backward_input, "W": self.backward_weight}


@dataclass(frozen=True)
class Links:
    hand_over: float
    """Seconds from a stage to the next."""
    waits_for_hand_over: bool
    """A rank goes on only when its message has arrived, and asks for one only when it is due (Schedule1F1B)."""
    reduces_every_time: bool
    """Gradients are reduced after every micro-batch (ZeRO stage 2 and 3), not only after the last."""


@dataclass(frozen=True)
class Event:
    rank: int
    kind: str
    """F, B, I, W; gather, reduce, send; optimizer."""
    stage: int
    micro_batch: int
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    events: tuple[Event, ...]
    """Empty unless they were asked for."""
    passes_end: float
    """When the last pass of the slowest rank ends."""
    end: float
    """When the last reduction has ended."""
    busy: tuple[float, ...]
    """Seconds each rank computes."""

    @property
    def bubble(self) -> float:
        """Share of the ranks' time, until the last pass has ended, in which they wait."""
        return 1.0 - sum(self.busy) / (len(self.busy) * self.passes_end)


class _Rank:
    """Clocks of one pipeline rank: its computing stream and its stream of collectives over the replicas."""

    def __init__(self, work: dict[int, StageWork]):
        self.clock = self.busy = 0.0
        self.gathered: dict[int, list[float]] = {}
        traffic = 0.0
        for stage, parts in work.items():
            arrivals = []
            for piece in parts.pieces:
                traffic += piece.gather
                arrivals.append(traffic if piece.gather else 0.0)
            if any(arrivals):
                self.gathered[stage] = arrivals
        self.traffic = traffic


def simulate(
    order: Order, work: Sequence[StageWork], links: Links, micro_batches: int, record: bool = False
) -> Timeline:
    """Walk the schedule; ranks take turns, each going on until it needs a message that has not been sent."""
    pipeline, last_stage = len(order), len(work) - 1
    ranks = [_Rank({stage: work[stage] for stage in range(rank, len(work), pipeline)}) for rank in range(pipeline)]
    events: list[Event] = _gather_events(ranks, work) if record else []
    times = [stage.times for stage in work]
    arrived: dict[tuple[bool, int, int], float] = {}
    done: list[dict[int, int]] = [{} for _ in ranks]
    next_action = [0] * pipeline
    waiting = True
    while waiting:
        waiting, moved = False, False
        for rank, actions in enumerate(order):
            state = ranks[rank]
            while next_action[rank] < len(actions):
                kind, stage, micro = actions[next_action[rank]]
                forward = kind == "F"
                start = state.clock
                if (forward and stage > 0) or (kind in "BI" and stage < last_stage):
                    sent = arrived.pop((forward, stage, micro), None)
                    if sent is None:
                        waiting = True
                        break
                    if links.waits_for_hand_over:
                        # The receiver asks for it when it has nothing else to do; then it travels.
                        start = max(start, sent) + links.hand_over
                    else:
                        start = max(start, sent + links.hand_over)
                if forward and stage in state.gathered:
                    end = _first_forward(state, work[stage], stage, start)
                else:
                    end = start + times[stage][kind]
                state.clock = end
                state.busy += times[stage][kind]
                if record:
                    events.append(Event(rank, kind, stage, micro, start, end))
                if forward and stage < last_stage:
                    arrived[True, stage + 1, micro] = end
                elif kind in "BI" and stage > 0:
                    arrived[False, stage - 1, micro] = end
                if kind in "BW":
                    done[rank][stage] = done[rank].get(stage, 0) + 1
                    if links.reduces_every_time or done[rank][stage] == micro_batches:
                        _reduce(state, work[stage], rank, stage, start, events if record else None)
                next_action[rank] += 1
                moved = True
        assert moved or not waiting, "the schedule waits for a message that is never sent"
    passes_end = max(state.clock for state in ranks)
    end = max(passes_end, max(state.traffic for state in ranks))
    return Timeline(tuple(events), passes_end, end, tuple(state.busy for state in ranks))


def _first_forward(state: _Rank, work: StageWork, stage: int, start: float) -> float:
    """End of a stage's first forward pass, which waits for weights that still travel."""
    clock = start
    for piece, arrival in zip(work.pieces, state.gathered.pop(stage), strict=True):
        clock = max(clock, arrival) + piece.forward
    return clock


def _reduce(state: _Rank, work: StageWork, rank: int, stage: int, start: float, events: list[Event] | None) -> None:
    """Reduce a stage's gradients as its backward pass, which began at `start`, makes them: the last piece's first."""
    ready, first = start, None
    for piece in reversed(work.pieces):
        ready += piece.backward
        if piece.reduce:
            began = max(state.traffic, ready)
            first = began if first is None else first
            state.traffic = began + piece.reduce
    if events is not None and first is not None:
        events.append(Event(rank, "reduce", stage, -1, first, state.traffic))


def _gather_events(ranks: Sequence[_Rank], work: Sequence[StageWork]) -> list[Event]:
    found = []
    for rank, state in enumerate(ranks):
        start = 0.0
        for stage, arrivals in state.gathered.items():
            end = max(arrivals, default=0.0)
            if end > start:
                found.append(Event(rank, "gather", stage, -1, start, end))
                start = end
    return found
