"""Where each weight lies in the engine's flat buffers. Pure arithmetic: every rank knows the layout of every other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from megalite.models.weights import Weight

ALIGNMENT = 32
"""Elements. Weights start on 64 bytes even in bf16, so that vector loads stay aligned."""


@dataclass(frozen=True)
class Slot:
    """One weight's place in its bucket."""

    weight: Weight
    start: int
    stop: int


@dataclass(frozen=True)
class Bucket:
    """Weights that are reduced together. All of a bucket share what the optimizer and the reduction must know."""

    slots: tuple[Slot, ...]
    size: int
    """Elements, a multiple of ALIGNMENT × data ranks, so that it cuts into equal aligned shards."""
    decay: bool
    cut: bool
    """Cut over the tensor axis: the ranks hold different elements, and all of them count in a norm."""
    partial_grad: bool

    def shard(self, rank: int, ranks: int) -> tuple[int, int]:
        length = self.size // ranks
        return rank * length, (rank + 1) * length


def make_buckets(weights: Sequence[Weight], tensor: int, data: int, max_elements: int) -> tuple[Bucket, ...]:
    """Fill buckets in the order in which a backward pass finishes the gradients: the last weight first.

    A weight larger than `max_elements` gets a bucket to itself."""
    open_slots: dict[tuple[bool, bool, bool], list[Slot]] = {}
    closed: list[Bucket] = []
    for weight in reversed(weights):
        kind = (weight.decay, weight.shard is not None and tensor > 1, weight.partial_grad)
        slots = open_slots.setdefault(kind, [])
        numel = prod(weight.local_shape(tensor))
        start = _round_up(slots[-1].stop, ALIGNMENT) if slots else 0
        if slots and start + numel > max_elements:
            closed.append(_close(slots, kind, data))
            slots.clear()
            start = 0
        slots.append(Slot(weight, start, start + numel))
    closed += [_close(slots, kind, data) for kind, slots in open_slots.items()]
    return tuple(closed)


def _close(slots: list[Slot], kind: tuple[bool, bool, bool], data: int) -> Bucket:
    decay, cut, partial_grad = kind
    return Bucket(tuple(slots), _round_up(slots[-1].stop, ALIGNMENT * data), decay, cut, partial_grad)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def choose_owners(buckets: Sequence[Bucket], data: int, tensor: int) -> dict[str, tuple[int, int]]:
    """(data rank, tensor rank) that writes each weight, so that all write about as much. A bucket has one data rank."""
    load = [[0] * tensor for _ in range(data)]
    owners: dict[str, tuple[int, int]] = {}
    for bucket in sorted(buckets, key=lambda bucket: -bucket.size):
        row = min(range(data), key=lambda rank: min(load[rank]))
        for slot in sorted(bucket.slots, key=lambda slot: slot.start - slot.stop):
            column = load[row].index(min(load[row]))
            load[row][column] += slot.weight.numel
            owners[slot.weight.name] = (row, column)
    return owners
