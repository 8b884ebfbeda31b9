"""Whole matrices for optimizers that need them, whatever is cut over the ranks.

Every matrix has an owner among the ranks that hold its layers (replicas × tensor ranks). Twice a
step, each of them sends each other one message:

    to the owners      from each replica its shard of what the optimizer wants to see of each matrix, and from each
                       tensor rank its part of it; the owner puts the logical tensor together and
                       solves its matrices
    back               to each replica what belongs to its shard

An owner computes what one process would compute, from the same bits. A rank's messages are a shard
long together: next to the reduction of whole buckets it is little (Moonlight, Liu et al. 2025, does
the same over the replicas alone).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function

from megalite.comm.collectives import start_all_to_all
from megalite.comm.mesh import Mesh
from megalite.engine.buckets import BucketState
from megalite.engine.layout import Slot
from megalite.engine.optimizers import MatrixOptimizer
from megalite.models.sharding import assemble, read_local
from megalite.models.weights import joined
from megalite.plan import Cut

STEP = "Optimizer.step"
"""What torch's own optimizers are called in a trace."""


class Held(NamedTuple):
    """What one rank of the stage has of a matrix: elements [start, stop) of its bucket."""

    matrix: int
    rank: int
    start: int
    stop: int


class Route(NamedTuple):
    """What this rank sends to each rank of the stage, and gets from each, in one order on both
    ends."""

    out: list[list[Held]]
    into: list[list[Held]]


@dataclass(frozen=True)
class Matrix:
    """One weight that an optimizer sees as a whole: a matrix, or several that lie in one tensor."""

    bucket: int
    slot: Slot
    owner: int
    """Rank of the stage that solves it."""


class Matrices:
    """The matrices of one optimizer on the ranks of a pipeline stage. All of these have the same
    plan of messages."""

    def __init__(self, optimizer: MatrixOptimizer, buckets: Sequence[BucketState], mesh: Mesh):
        """Choose owners for all weights in `buckets`, in which every rank's are laid out alike."""
        self.optimizer, self.buckets, self.mesh = optimizer, buckets, mesh
        self._message_dtype = torch.float32
        if buckets:
            self._message_dtype = optimizer.message_dtype(buckets[0].weights.dtype)
        self.matrices = self._choose_owners()
        self._to_owners, self._to_holders = self._route(whole=False), self._route(whole=True)
        self._mine = [
            number for number, matrix in enumerate(self.matrices) if matrix.owner == mesh.stage.rank
        ]

    def _choose_owners(self) -> list[Matrix]:
        """Give each matrix, the most costly first, to the rank with the least to do (Graham
        1969)."""
        # Every rank computes the same owners from the same layout: nothing is communicated for it.
        slots = [
            (number, slot)
            for number, bucket in enumerate(self.buckets)
            for slot in bucket.layout.slots
        ]
        costs = [self._cost(slot) for _, slot in slots]
        loads, owners = [0.0] * self.mesh.stage.size, [0] * len(slots)
        for number in sorted(range(len(slots)), key=lambda number: -costs[number]):
            owners[number] = loads.index(min(loads))
            loads[owners[number]] += costs[number]
        return [
            Matrix(number, slot, owner) for (number, slot), owner in zip(slots, owners, strict=True)
        ]

    def _cost(self, slot: Slot) -> float:
        (columns,) = slot.weight.row_shape
        return sum(self.optimizer.cost(rows, columns) for rows in self.optimizer.split(slot.weight))

    def _route(self, whole: bool) -> Route:
        """Return what of `_pieces` travels from or to this rank: to the owners, or with `whole`
        from them."""
        me, ranks = self.mesh.stage.rank, range(self.mesh.stage.size)
        route = Route([[] for _ in ranks], [[] for _ in ranks])
        for rank in ranks:
            for held in self._pieces(rank, whole):
                owner = self.matrices[held.matrix].owner
                # Both ends go through all ranks and matrices in one order, so a message needs no
                # header: the receiver knows from its own route which elements of which matrix lie
                # where in it.
                source, target = (owner, rank) if whole else (rank, owner)
                if source == me:
                    route.out[target].append(held)
                if target == me:
                    route.into[source].append(held)
        return route

    def _pieces(self, rank: int, whole: bool) -> list[Held]:
        """Return what a rank sends to the owners, or with `whole` what it gets back, in the order
        of the matrices.

        The first is its replica's shard. What comes back is the part that it updates: at ZeRO stage
        0 everything. Of a matrix that all tensor ranks hold, only the one that is on the owner's
        side sends it."""
        found = []
        for number, matrix in enumerate(self.matrices):
            bucket = self.buckets[matrix.bucket]
            holders = bucket.fold.holders.size
            # Ranks of a stage: replica-major, holders innermost (see `Mesh.place_of`).
            replica, holder = divmod(rank, holders)
            if not whole and not bucket.layout.cut and holder != matrix.owner % holders:
                continue
            low, high = bucket.layout.shard(replica, bucket.fold.replicas.size)
            if whole and not bucket.zero_stage:
                # At stage 0 every replica updates everything and so must get all of the result
                # back; still, on the way to the owner one shard from each is enough.
                low, high = 0, bucket.layout.size
            start, stop = max(low, matrix.slot.start), min(high, matrix.slot.stop)
            if start < stop:
                found.append(Held(number, rank, start, stop))
        return found

    # --- a step -----------------------------------------------------------------------------------

    def start(self, common: Tensor, lr: float) -> Callable[[], Iterator[BucketState]]:
        """Advance the optimizer's states, and start to send what its owners are to see.

        Returns a function that solves this rank's matrices, sends the results back, and yields each
        bucket when its shard has been updated. `common` is what the optimizer's `begin_step`
        returned, `lr` the schedule's rate."""
        shards = [bucket.shard(lr) for bucket in self.buckets]
        with record_function(STEP):
            seen = [self.optimizer.advance_(shard, common, self._message_dtype) for shard in shards]

        def piece(held: Held) -> Tensor:
            # `held` counts from the bucket's start, `seen` holds only the stepped part of it.
            bucket = self.buckets[self.matrices[held.matrix].bucket]
            first = bucket.stepped.start
            return seen[self.matrices[held.matrix].bucket][held.start - first : held.stop - first]

        # Taken out where it is used: what it holds are the messages.
        to_owners = [self._exchange(self._to_owners, piece)]

        def solve() -> Iterator[BucketState]:
            solved = self._assemble(to_owners.pop()())
            self._solve_in_place(solved)
            to_holders = self._exchange(self._to_holders, partial(self._part, solved))
            for held, part in to_holders():
                number = self.matrices[held.matrix].bucket
                first = self.buckets[number].stepped.start
                seen[number][held.start - first : held.stop - first] = part
            for bucket, shard, result in zip(self.buckets, shards, seen, strict=True):
                with record_function(STEP):
                    self.optimizer.update_(shard, result, common)
                yield bucket

        return solve

    def _exchange(
        self, route: Route, piece: Callable[[Held], Tensor]
    ) -> Callable[[], Iterator[tuple[Held, Tensor]]]:
        """Start one message from each rank to each other; return a function that waits, and yields
        what came to this one. `piece` gives the values of what a message holds."""
        axis, (out, into) = self.mesh.stage, route
        device, dtype = self.mesh.device, self._message_dtype

        def message(some: list[Held], rank: int) -> Tensor:
            # What stays on this rank is not copied into a message; `result` reads it where it is.
            length = sum(held.stop - held.start for held in some) if rank != axis.rank else 0
            return torch.empty(length, dtype=dtype, device=device)

        to_send = [message(some, rank) for rank, some in enumerate(out)]
        for flat, some in zip(to_send, out, strict=True):
            offset = 0
            for held in some if len(flat) else ():
                flat[offset : (offset := offset + held.stop - held.start)] = piece(held)
        received = [message(some, rank) for rank, some in enumerate(into)]
        wait = start_all_to_all(to_send, received, axis)

        def result() -> Iterator[tuple[Held, Tensor]]:
            wait()
            # Messages are memory too: the buffers to send are let go before those received are
            # used.
            to_send.clear()
            for held in out[axis.rank]:
                yield held, piece(held)
            for rank, some in enumerate(into):
                if rank != axis.rank:
                    values = received[rank].split([held.stop - held.start for held in some])
                    yield from zip(some, values, strict=True)
            received.clear()

        return result

    def _assemble(self, found: Iterable[tuple[Held, Tensor]]) -> dict[int, Tensor]:
        """Return the logical tensor of each matrix that this rank owns, as rows, from all of its
        pieces."""
        # [matrix][holder] → (start, values) of each replica's shard. For a weight that is not cut
        # there is one "side": only one holder sends it.
        shards: dict[int, dict[int, list[tuple[int, Tensor]]]] = {
            number: {} for number in self._mine
        }
        for held, value in found:
            bucket = self._bucket_of(held.matrix)
            side = held.rank % bucket.fold.holders.size if bucket.layout.cut else 0
            shards[held.matrix].setdefault(side, []).append((held.start, value))
        logical = {}
        for number, by_side in shards.items():
            weight = self.matrices[number].slot.weight
            bucket = self._bucket_of(number)
            cut = bucket.fold.cut if bucket.layout.cut else Cut(1)
            shape = weight.local_shape(*cut)
            locals_ = [
                # Shards by where they start, then holders by rank: so it is one flat local tensor
                # per holder.
                joined([value for _, value in sorted(pieces, key=lambda piece: piece[0])]).view(
                    shape
                )
                for _, pieces in sorted(by_side.items())
            ]
            # A stack of experts [E, rows, columns] becomes rows, as `split` counts them.
            logical[number] = assemble(weight, locals_, cut.expert).flatten(0, weight.stack)
        return logical

    @record_function(STEP)
    def _solve_in_place(self, logical: dict[int, Tensor]) -> None:
        """Solve matrices of equal shapes together; `logical` holds the rows of all matrices of a
        weight."""
        by_shape: dict[tuple[int, ...], list[Tensor]] = {}
        for number, rows in logical.items():
            for matrix in rows.split(self.optimizer.split(self.matrices[number].slot.weight)):
                # Equal shapes can be multiplied as one batch; a result must not depend on which are
                # together.
                by_shape.setdefault(tuple(matrix.shape), []).append(matrix)
        for matrices in by_shape.values():
            solved = self.optimizer.solve(matrices, self.buckets[0].weights.dtype)
            for matrix, result in zip(matrices, solved, strict=True):
                matrix.copy_(result)

    def _part(self, solved: dict[int, Tensor], held: Held) -> Tensor:
        """Return the elements of what was solved that a rank holds."""
        slot = self.matrices[held.matrix].slot
        rows = solved[held.matrix]
        fold = self._bucket_of(held.matrix).fold
        return read_local(
            slot.weight,
            # The same mapping by which a rank reads its part of a checkpoint, here from the solved
            # matrix.
            lambda _, low, high, columns: (
                rows[low:high] if columns is None else rows[low:high, slice(*columns)]
            ),
            held.rank % fold.holders.size,
            fold.tensor.size,
            held.start - slot.start,
            held.stop - slot.start,
            fold.expert.size,
        )

    def _bucket_of(self, number: int) -> BucketState:
        return self.buckets[self.matrices[number].bucket]
