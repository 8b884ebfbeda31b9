"""Simulates one optimizer step, event by event: every pass of every pipeline rank in the order of
its schedule, the messages between ranks, and the collectives over the replicas beside them.

A rank computes one pass at a time and sends each message when its pass has ended. Weights gathered
after the last update arrive layer by layer in the order of the forward pass, and the first
micro-batch waits for each. Gradients are reduced layer by layer as the last micro-batch's backward
pass makes them. Replicas and tensor ranks all do the same, so one of each stands for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megalite.planner.schedule import Order


@dataclass(frozen=True)
class Piece:
    """Holds the seconds of a layer, or of what stands before or after the layers of a stage."""

    forward: float
    backward: float
    """Seconds until its gradients are there: a backward pass, or the weight-gradient pass of zero
    bubble."""
    gather: float
    """Seconds of the all-gather of its weights; 0: none."""
    reduce: float
    """Seconds of the reduction of its gradients; 0: none."""


@dataclass(frozen=True)
class StageWork:
    """Holds the seconds of a stage's passes over one micro-batch."""

    forward: float
    backward: float
    backward_input: float
    backward_weight: float
    pieces: tuple[Piece, ...]
    """In the order of the forward pass."""

    @property
    def times(self) -> dict[str, float]:
        """Seconds by kind of action (see schedule.py)."""
        return {
            "F": self.forward,
            "B": self.backward,
            "I": self.backward_input,
            "W": self.backward_weight,
        }


@dataclass(frozen=True)
class Links:
    """Describes the messages between pipeline ranks and the collectives over replicas."""

    hand_over: float
    """Seconds of a message from one stage to the next."""
    waits_for_hand_over: bool
    """True if a rank requests a message only when it is due, and waits for it (Schedule1F1B)."""
    reduces_every_time: bool
    """True if gradients are reduced after every micro-batch (ZeRO stage 2), not only after the
    last. At stage 3 the reductions are within the passes' times."""


@dataclass(frozen=True)
class Event:
    """Records when a rank did something, in seconds since the step began."""

    rank: int
    kind: str
    """F, B, I or W for a pass; gather or reduce for a collective over the replicas."""
    stage: int
    micro_batch: int
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """Holds the result of a simulation, in seconds since the step began."""

    events: tuple[Event, ...]
    """Empty unless recorded."""
    passes_end: float
    """End of the last pass of the slowest rank."""
    end: float
    """End of the last reduction."""
    busy: tuple[float, ...]
    """Seconds that each rank computes."""

    @property
    def bubble(self) -> float:
        """Share of the ranks' time until the end of the last pass in which they wait."""
        return 1.0 - sum(self.busy) / (len(self.busy) * self.passes_end)


class _Rank:
    """Holds the clocks of one pipeline rank: of its compute stream and of its stream of collectives
    over replicas."""

    def __init__(self, work: dict[int, StageWork]):
        self.clock = self.busy = 0.0
        self.gathered: dict[int, list[float]] = {}
        """When the weights of each piece of a stage have been gathered, until the stage's first
        forward pass."""
        traffic = 0.0
        # The gathers run one after the other, in the order in which the forward passes need the
        # weights.
        for stage, parts in work.items():
            arrivals = []
            for piece in parts.pieces:
                traffic += piece.gather
                arrivals.append(traffic if piece.gather else 0.0)
            if any(arrivals):
                self.gathered[stage] = arrivals
        self.traffic = traffic


def simulate(
    order: Order,
    work: Sequence[StageWork],
    links: Links,
    micro_batches: int,
    record: bool = False,
) -> Timeline:
    """Walk the schedule: ranks take turns, each going on until it needs a message that has not been
    sent.

    `order` has the passes of each rank, `work` the times of each stage, `links` those of messages;
    a step has `micro_batches`. `record` keeps all events."""
    last_stage = len(work) - 1
    ranks = _ranks(work, len(order))
    events: list[Event] = _gather_events(ranks, work) if record else []
    times = [stage.times for stage in work]
    # When the message that a pass needs was sent, by (is it forward, stage, micro-batch).
    arrived: dict[tuple[bool, int, int], float] = {}
    # Micro-batches whose gradients each stage of a rank has.
    done: list[dict[int, int]] = [{} for _ in ranks]
    next_action = [0] * len(ranks)
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
                    start = _received(start, sent, links)
                if forward and stage in state.gathered:
                    end = _first_forward(state, work[stage], stage, start)
                else:
                    end = start + times[stage][kind]
                state.clock = end
                # Without the wait for weights, which counts as idle.
                state.busy += times[stage][kind]
                if record:
                    events.append(Event(rank, kind, stage, micro, start, end))
                if forward and stage < last_stage:
                    arrived[True, stage + 1, micro] = end
                elif kind in "BI" and stage > 0:
                    arrived[False, stage - 1, micro] = end
                if kind in "BW":  # the micro-batch's gradients are complete
                    done[rank][stage] = done[rank].get(stage, 0) + 1
                    if links.reduces_every_time or done[rank][stage] == micro_batches:
                        _reduce(state, work[stage], rank, stage, start, events if record else None)
                next_action[rank] += 1
                moved = True
        assert moved or not waiting, "the schedule waits for a message that is never sent"
    passes_end = max(state.clock for state in ranks)
    end = max(passes_end, max(state.traffic for state in ranks))
    return Timeline(tuple(events), passes_end, end, tuple(state.busy for state in ranks))


def _ranks(work: Sequence[StageWork], pipeline: int) -> list[_Rank]:
    """Deal out the stages to the ranks in turn, as interleaved schedules do."""
    ranks = []
    for rank in range(pipeline):
        stages = range(rank, len(work), pipeline)
        ranks.append(_Rank({stage: work[stage] for stage in stages}))
    return ranks


def _received(clock: float, sent: float, links: Links) -> float:
    """Return when a rank that is free from `clock` on has received a message that was sent at
    `sent`."""
    if links.waits_for_hand_over:
        # The message travels only when the receiver, idle, requests it.
        return max(clock, sent) + links.hand_over
    return max(clock, sent + links.hand_over)


def _first_forward(state: _Rank, work: StageWork, stage: int, start: float) -> float:
    """Return the end of a stage's first forward pass, which waits for weights that are still being
    gathered."""
    clock = start
    for piece, arrival in zip(work.pieces, state.gathered.pop(stage), strict=True):
        clock = max(clock, arrival) + piece.forward
    return clock


def _reduce(
    state: _Rank,
    work: StageWork,
    rank: int,
    stage: int,
    start: float,
    events: list[Event] | None,
) -> None:
    """Advance the collectives' clock by the reduction of a stage's gradients.

    Its backward pass, which began at `start`, makes them one piece after the other, the last
    piece's first."""
    ready = start
    first = None
    for piece in reversed(work.pieces):
        ready += piece.backward
        if piece.reduce:
            # After the reduction before, and not before the gradients are there.
            began = max(state.traffic, ready)
            first = began if first is None else first
            state.traffic = began + piece.reduce
    # One event for the stage: a picture has no room for one a layer.
    if events is not None and first is not None:
        events.append(Event(rank, "reduce", stage, -1, first, state.traffic))


def _gather_events(ranks: Sequence[_Rank], work: Sequence[StageWork]) -> list[Event]:
    """Return the events of the all-gathers that a step begins with."""
    found = []
    for rank, state in enumerate(ranks):
        start = 0.0
        for stage, arrivals in state.gathered.items():
            end = max(arrivals, default=0.0)
            if end > start:
                found.append(Event(rank, "gather", stage, -1, start, end))
                start = end
    return found
