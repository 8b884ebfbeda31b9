"""The order of passes of every pipeline rank, taken from the schedules of
torch.distributed.pipelining that execute it: what is simulated is what runs.
"""

from __future__ import annotations

from functools import lru_cache
from types import SimpleNamespace
from typing import Any, NamedTuple


class Action(NamedTuple):
    """Names one pass of one micro-batch through one stage."""

    kind: str
    """F forward, B backward, I input gradient only, W weight gradients."""
    stage: int
    micro_batch: int


Order = tuple[tuple[Action, ...], ...]
"""Actions of each pipeline rank."""


@lru_cache(maxsize=64)
def order_of(schedule: str, pipeline: int, virtual: int, micro_batches: int) -> Order:
    """Return the passes of each of `pipeline` ranks with `virtual` stages each, for a step of
    `micro_batches`.

    `schedule` is parallel.schedule: 1f1b, interleaved or zero_bubble."""
    # The engine's own loop: forward and backward of one micro-batch after the other.
    if pipeline == 1:
        actions = []
        for number in range(micro_batches):
            actions += [Action("F", 0, number), Action("B", 0, number)]
        return (tuple(actions),)
    if schedule == "1f1b":
        return tuple(
            _one_forward_one_backward(rank, pipeline, micro_batches) for rank in range(pipeline)
        )
    # Importing it takes more than a second.
    from torch.distributed.pipelining import schedules as torch_schedules

    name = (
        "ScheduleInterleavedZeroBubble" if schedule == "zero_bubble" else "ScheduleInterleaved1F1B"
    )
    kind: Any = getattr(torch_schedules, name)
    # The constructor needs process groups. Its method for the order reads only these attributes of
    # it. As torch's constructor computes it.
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
    """Return the passes of a rank under Schedule1F1B, which has no table to read (the one it prints
    misnumbers the last rank's passes)."""
    # The last rank begins a backward pass after one forward pass, the first after `pipeline` of
    # them.
    warmup = min(micro_batches, pipeline - rank)
    actions = [Action("F", rank, number) for number in range(warmup)]
    for number in range(micro_batches):
        actions.append(Action("B", rank, number))
        if warmup + number < micro_batches:
            actions.append(Action("F", rank, warmup + number))
    return tuple(actions)


def _plain(actions: Any) -> tuple[Action, ...]:
    """Turn a rank's row of torch's table into actions."""
    found = []
    for action in actions:
        # Empty slots of the table stand for waiting, which the simulation finds out by itself.
        if action is None:
            continue
        kind = action.computation_type.value
        if kind in ("F", "B", "I", "W"):
            found.append(Action(kind, action.stage_index, action.microbatch_index))
    return tuple(found)


def most_in_flight(order: Order, pipeline: int, frees: str) -> list[dict[int, int]]:
    """Return the micro-batches in flight for each stage of each rank, at the moment when a rank
    holds most of them.

    `order` has the passes of `pipeline` ranks. A micro-batch is in flight from its F to the action
    whose kind is in `frees`."""
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
