"""The order of passes of every pipeline rank, taken from the schedules that run it (torch.distributed.pipelining), so
that what is simulated is what is executed."""

from __future__ import annotations

from functools import lru_cache
from types import SimpleNamespace
from typing import Any, NamedTuple


class Action(NamedTuple):
    kind: str
    """F forward, B backward, I gradient of the input only, W gradients of the weights."""
    stage: int
    micro_batch: int


Order = tuple[tuple[Action, ...], ...]
"""Actions of each pipeline rank."""


@lru_cache(maxsize=64)
def order_of(schedule: str, pipeline: int, virtual: int, micro_batches: int) -> Order:
    if pipeline == 1:  # the engine's own loop
        return (tuple(Action(kind, 0, number) for number in range(micro_batches) for kind in "FB"),)
    if schedule == "1f1b":
        return tuple(_one_forward_one_backward(rank, pipeline, micro_batches) for rank in range(pipeline))
    # Imported here: it takes more than a second.
    from torch.distributed.pipelining import schedules as torch_schedules

    name = "ScheduleInterleavedZeroBubble" if schedule == "zero_bubble" else "ScheduleInterleaved1F1B"
    kind: Any = getattr(torch_schedules, name)
    # What its constructor works out before it asks for the order; the constructor itself wants processes.
    rounds = max(1, micro_batches // pipeline)
    known = SimpleNamespace(
        n_local_stages=virtual,
        pp_group_size=pipeline,
        _n_microbatches=micro_batches,
        microbatches_per_round=micro_batches // rounds,
    )
    table = [kind._calculate_single_rank_operations(known, rank) for rank in range(pipeline)]
    return tuple(_plain(actions) for actions in table)


def _one_forward_one_backward(rank: int, pipeline: int, micro_batches: int) -> tuple[Action, ...]:
    """What Schedule1F1B runs. It has no table of it to ask (the one it prints misnumbers the last rank's passes)."""
    warmup = min(micro_batches, pipeline - rank)
    actions = [Action("F", rank, number) for number in range(warmup)]
    for number in range(micro_batches):
        actions.append(Action("B", rank, number))
        if warmup + number < micro_batches:
            actions.append(Action("F", rank, warmup + number))
    return tuple(actions)


def _plain(actions: Any) -> tuple[Action, ...]:
    found = []
    for action in actions:
        # Empty slots of the table stand for waiting, which the simulation finds out by itself.
        if action is not None and action.computation_type.value in ("F", "B", "I", "W"):
            found.append(Action(action.computation_type.value, action.stage_index, action.microbatch_index))
    return tuple(found)


def most_in_flight(order: Order, pipeline: int, frees: str) -> list[dict[int, int]]:
    """Of each rank: for each of its stages, micro-batches held at the rank's fullest moment (all stages together),
    between their F and the action `frees`."""
    found = []
    for rank, actions in enumerate(order):
        held: dict[int, int] = {}
        most: dict[int, int] = {}
        for action in actions:
            if action.kind == "F":
                held[action.stage] = held.get(action.stage, 0) + 1
            elif action.kind in frees:
                held[action.stage] -= 1
            if sum(held.values()) > sum(most.values()):
                most = dict(held)
        found.append(most)
        assert not any(held.values()), f"rank {rank} keeps activations"
    return found
