"""Where each weight lies in the engine's flat buffers. Pure arithmetic: every rank knows the layout of every other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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

    def overlaps(self, rank: int, ranks: int) -> Iterable[tuple[Slot, int, int]]:
        """The weights that reach into a rank's shard: (slot, first, last) in elements of the bucket."""
        low, high = self.shard(rank, ranks)
        for slot in self.slots:
            start, stop = max(slot.start, low), min(slot.stop, high)
            if start < stop:
                yield slot, start, stop


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


@dataclass(frozen=True)
class Piece:
    """Elements [start, stop) of a flattened local weight, which the data rank `data_rank` answers for."""

    data_rank: int
    start: int
    stop: int


def pieces_of(buckets: Sequence[Bucket], data: int) -> dict[str, tuple[Piece, ...]]:
    """For every weight, who answers for which part of its state: the same on every tensor rank."""
    found: dict[str, list[Piece]] = {}
    for bucket in buckets:
        for rank in range(data):
            for slot, start, stop in bucket.overlaps(rank, data):
                piece = Piece(rank, start - slot.start, stop - slot.start)
                found.setdefault(slot.weight.name, []).append(piece)
    return {name: tuple(pieces) for name, pieces in found.items()}
