"""Sums over matrices for optimizers that need them, whatever is cut over the ranks.

Of every matrix each rank has some rectangles: its replica's shard, of its tensor rank's part. It
adds up what it has of each row and column, and one all-reduce over the ranks of the pipeline stage
makes these the sums of whole matrices: as many numbers as all matrices have rows and columns, in
place of their elements. What an optimizer keeps of rows and columns is as small, and every rank
keeps all of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function

from megalite.comm.collectives import all_reduce
from megalite.comm.mesh import Mesh
from megalite.config import OptimizerConfig
from megalite.engine import ReadState
from megalite.engine.buckets import BucketState
from megalite.engine.matrices import STEP
from megalite.engine.optimizers import AllMatrices, Piece, Shard, SummingOptimizer
from megalite.models.sharding import Rectangle, rectangles
from megalite.models.weights import Weight
from megalite.plan import Cut


class _LocalRectangle(NamedTuple):
    """A rectangle of a matrix in a bucket: elements [start, stop) of the part that this rank
    updates."""

    bucket: int
    start: int
    stop: int
    matrix: int
    rows: slice
    columns: slice


AT_ONCE = 2**24
"""Elements of the largest piece: what an optimizer holds beside weights and gradients is a few
times as much."""


def _cut(rectangles: Iterator[Rectangle]) -> Iterator[Rectangle]:
    """Cut rectangles that are larger than `AT_ONCE` between rows."""
    for found in rectangles:
        (low, high), width = found.rows, found.columns[1] - found.columns[0]
        rows = max(1, AT_ONCE // width)
        for first in range(low, high, rows):
            last = min(first + rows, high)
            start = found.start + (first - low) * width
            yield found._replace(
                start=start, stop=start + (last - first) * width, rows=(first, last)
            )


class Sums:
    """The matrices of one `SummingOptimizer` on the ranks of a pipeline stage."""

    def __init__(
        self,
        optimizer: SummingOptimizer,
        config: OptimizerConfig,
        buckets: Sequence[BucketState],
        mesh: Mesh,
    ):
        """Number the matrices of all weights in `buckets`, in which every rank's are laid out
        alike."""
        self.optimizer, self.config, self.buckets, self.mesh = optimizer, config, buckets, mesh
        self._rows: list[int] = []
        self._columns: list[int] = []
        self._rectangles: list[_LocalRectangle] = []
        self._weights: list[
            tuple[Weight, int, int]
        ] = []  # with the first of its rows, and of its columns
        num_rows = num_columns = 0
        # Global coordinates: rows of all matrices of the stage stand one after another, and so do
        # columns. `num_rows` and `num_columns` are where the next matrix begins, on every rank the
        # same.
        for number, bucket in enumerate(buckets):
            for slot in bucket.layout.slots:
                # A norm or bias has rows of no shape: a matrix of one column.
                weight, columns = (
                    slot.weight,
                    slot.weight.row_shape[0] if slot.weight.row_shape else 1,
                )
                self._weights.append((weight, num_rows, num_columns))
                self._add_rectangles(
                    number, slot.start, slot.stop, weight, num_rows, num_columns, columns
                )
                # A fused weight (q, k, v; gate, up) or a stack of experts is several matrices, each
                # with columns of its own: `row_groups` has the rows of each.
                self._rows += weight.row_groups
                self._columns += [columns] * len(weight.row_groups)
                num_rows += weight.num_rows
                num_columns += columns * len(weight.row_groups)
        rows, columns_ = (
            torch.tensor(x, device=mesh.device, dtype=torch.int64)
            for x in (self._rows, self._columns)
        )
        named = {optimizer.ROW_STATE: num_rows, optimizer.COLUMN_STATE: num_columns}
        self.states = {
            name: torch.zeros(size, device=mesh.device) for name, size in named.items() if name
        }
        self.matrices = AllMatrices(rows, columns_, num_rows, num_columns, self.states)

    def _add_rectangles(
        self,
        number: int,
        start: int,
        stop: int,
        weight: Weight,
        row: int,
        column: int,
        columns: int,
    ) -> None:
        """Add this rank's rectangles of a weight, the first of whose rows and columns are `row` and
        `column`."""
        bucket = self.buckets[number]
        # `rectangles` says which rows and columns of the LOGICAL matrix a range of a flat local
        # tensor is: a shard may cut a row in two, so a matrix may give several rectangles.
        rank, cut = (
            (bucket.fold.holders.rank, bucket.fold.cut) if bucket.layout.cut else (0, Cut(1))
        )
        stepped, matrices = bucket.stepped, len(self._rows)
        low, high = max(start, stepped.start), min(stop, stepped.stop)
        for found in _cut(
            rectangles(weight, rank, cut.tensor, low - start, high - start, cut.expert)
        ):
            first = column + found.matrix * columns
            self._rectangles.append(
                _LocalRectangle(
                    number,
                    found.start + start - stepped.start,
                    found.stop + start - stepped.start,
                    matrices + found.matrix,
                    slice(row + found.rows[0], row + found.rows[1]),
                    slice(first + found.columns[0], first + found.columns[1]),
                )
            )

    @property
    def _over_replicas(self) -> bool:
        """Return whether sums go over the replicas, too. At ZeRO stage 0 each replica updates all,
        and sums alone, unless experts have other replicas than dense weights."""
        return self.mesh.expert_fold is not None or any(
            bucket.zero_stage for bucket in self.buckets
        )

    @record_function(STEP)
    def update(self, common: Tensor, lr: float) -> None:
        """Update all buckets. `common` is what the optimizer's `begin_step` returned, `lr` the
        schedule's rate."""
        if not self.buckets:
            return
        shards = [bucket.shard(lr) for bucket in self.buckets]
        pieces = [
            self._piece(rectangle, shards[rectangle.bucket]) for rectangle in self._rectangles
        ]
        # Pipeline ranks hold other matrices, hence never the world.
        axis = self.mesh.stage if self._over_replicas else self.mesh.tensor
        self.optimizer.update_(pieces, self.matrices, common, lambda flat: all_reduce(flat, axis))

    def _piece(self, rectangle: _LocalRectangle, shard: Shard) -> Piece:
        shape = (rectangle.rows.stop - rectangle.rows.start, -1)

        def cut(x: Tensor) -> Tensor:
            return x[rectangle.start : rectangle.stop].view(shape)

        return Piece(
            rectangle.matrix,
            rectangle.rows,
            rectangle.columns,
            cut(shard.master),
            None if shard.weights is None else cut(shard.weights),
            cut(shard.grad),
            {name: cut(state) for name, state in shard.states.items()},
            shard.lr,
            shard.weight_decay,
            counts=self._counts(self.buckets[rectangle.bucket]),
        )

    def _counts(self, bucket: BucketState) -> bool:
        """Return whether this rank's part of a bucket counts in sums: all holders have what is not
        cut, and at ZeRO stage 0 all replicas."""
        # What several ranks have alike must be added once, or means would come out too large.
        if self._over_replicas and not bucket.zero_stage and bucket.fold.replicas.rank > 0:
            return False
        return bucket.layout.cut or bucket.fold.holders.rank == 0

    # --- states, in logical terms -----------------------------------------------------------------

    def load(self, read: ReadState) -> None:
        """Fill the states that every rank has the whole of."""
        for state in self.states:
            for row, held in self._held(state):
                held.copy_(read(row, state, 0, row.numel))

    def logical(self, state: str) -> Mapping[str, Tensor]:
        """Return a state of each weight, by the weight's name."""
        return {row.name: held.view(row.shape) for row, held in self._held(state)}

    def _held(self, state: str) -> Iterator[tuple[Weight, Tensor]]:
        """Yield the row of a state of each weight, and its values, flat."""
        for weight, first_row, first_column in self._weights:
            first = first_row if state == self.optimizer.ROW_STATE else first_column
            row = self.config.state_row(weight, state)
            yield row, self.states[state][first : first + row.numel]
