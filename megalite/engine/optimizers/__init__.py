"""The optimizers of `native`, one file each: its settings, and how it updates weights.

An `Optimizer` is element-wise: the new value of a weight's element depends on the gradient, the
master weight and the optimizer's states of that element alone. Hence each replica updates the shard
that it owns, whatever it is a shard of.

A `MatrixOptimizer` is element-wise in all but one place, where it needs a whole matrix at once
(Muon's orthogonalisation). There every matrix has an owner, one rank, which gets it from all shards
and sends back what is to be done to each; see `engine/matrices.py`. So the bits are those of one
process, whatever the layout.

A `SummingOptimizer` needs sums over matrices, their rows and their columns (Adafactor). Each rank
adds up what it has, and the sums travel instead of the matrices; see `engine/sums.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from megalite.models.weights import Weight


@dataclass(frozen=True)
class Shard:
    """The part of a bucket that this rank updates: flat tensors of one shape, of weights with the
    same settings."""

    master: Tensor
    """Master weights, fp32."""
    weights: Tensor | None
    """The model's weights in bf16, which get the new `master`, rounded; None in fp32: they are
    their own master."""
    grad: Tensor
    """The reduced gradient, fp32, not clipped."""
    states: Mapping[str, Tensor]
    """The optimizer's states, fp32."""
    lr: float
    weight_decay: float


class Optimizer(Protocol):
    """Updates shards of weights in place. Nothing of it may wait for the device."""

    def begin_step(self, divisor: Tensor, num_updates: Tensor) -> Tensor:
        """Return what all shards of a step have in common, on the device.

        `divisor` is fp32 [], by which gradients are divided so that their global norm is clipped.
        Where it is 0 the step is refused (its loss or gradient is not finite): nothing may change.
        `num_updates` is fp64 [], this one included."""

    def update_(self, shard: Shard, common: Tensor) -> None:
        """Update a shard. `common` is what `begin_step` returned."""


class PlainOptimizer:
    """An optimizer written in torch, as a function from old values to new ones: the easy way to add
    one.

    It refuses steps, rounds weights and clips gradients; `compute` says how one update goes."""

    def compute(self, shard: Shard, num_updates: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return the new master weights and states. Must not change the shard, whose `grad` is
        clipped already.

        `num_updates` is fp64 [], the number of updates with this one."""
        raise NotImplementedError

    def begin_step(self, divisor: Tensor, num_updates: Tensor) -> Tensor:
        return torch.stack((divisor.double(), num_updates))

    def update_(self, shard: Shard, common: Tensor) -> None:
        # A refused step is found out on the device: everything is computed, and `where` keeps the
        # old.
        divisor, num_updates = common
        is_refused = divisor <= 0
        clipped = replace(shard, grad=shard.grad / divisor.float())
        value, new_states = self.compute(clipped, num_updates)
        for name, state in shard.states.items():
            state.copy_(torch.where(is_refused, state, new_states[name]))
        shard.master.copy_(torch.where(is_refused, shard.master, value))
        if shard.weights is not None:
            shard.weights.copy_(
                torch.where(is_refused, shard.weights, value.to(shard.weights.dtype))
            )


class MatrixOptimizer:
    """Base of optimizers that look at whole matrices. A step calls the methods in the order in
    which they stand."""

    def begin_step(self, divisor: Tensor, num_updates: Tensor) -> Tensor:
        """Return what all shards of a step have in common; see `Optimizer`."""
        return torch.stack((divisor.double(), num_updates))

    def advance_(self, shard: Shard, common: Tensor, dtype: torch.dtype) -> Tensor:
        """Advance the states of a shard, and return what its owners are to see of it: of the
        shard's shape, in `dtype`, which is the `message_dtype`."""
        raise NotImplementedError

    def split(self, weight: Weight) -> tuple[int, ...]:
        """Return the rows of each matrix that a weight consists of: the parts of a fused one are
        apart."""
        return weight.row_groups

    def cost(self, rows: int, columns: int) -> float:
        """Return about how much work a matrix is, in any unit. It balances the owners."""
        raise NotImplementedError

    def message_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return the precision in which matrices lie, and travel to their owners and back, of a
        model whose weights are in `dtype`: where `solve` rounds to that anyway, it spares half of the bytes."""
        return torch.float32

    def solve(self, matrices: Sequence[Tensor], dtype: torch.dtype) -> Iterable[Tensor]:
        """Yield what is to be done to whole matrices of one shape, [rows, columns] each, in
        `message_dtype`; the results are rounded to it.

        `dtype` is the precision of the model's weights. The result for a matrix must not depend on
        the others, and it overwrites the matrix before the next is asked for."""
        raise NotImplementedError

    def update_(self, shard: Shard, solved: Tensor, common: Tensor) -> None:
        """Update a shard with the part of what `solve` returned that belongs to it."""
        raise NotImplementedError


@dataclass(frozen=True)
class AllMatrices:
    """All matrices of a `SummingOptimizer` on the ranks of a pipeline stage, one after another:
    their rows R, and their columns C. What has no columns is a matrix of one column."""

    rows_M: Tensor
    """Number of rows of each matrix, int64."""
    columns_M: Tensor
    num_rows: int
    """R."""
    num_columns: int
    """C."""
    states: Mapping[str, Tensor]
    """States that every rank has the whole of, fp32: [R] for `ROW_STATE`, [C] for
    `COLUMN_STATE`."""

    def for_rows(self, values_M: Tensor) -> Tensor:
        """Repeat a value of each matrix for its rows: [M] → [R]."""
        return values_M.repeat_interleave(self.rows_M, output_size=self.num_rows)

    def for_columns(self, values_M: Tensor) -> Tensor:
        """Repeat a value of each matrix for its columns: [M] → [C]."""
        return values_M.repeat_interleave(self.columns_M, output_size=self.num_columns)


@dataclass(frozen=True)
class Piece:
    """A rectangle of a matrix that this rank updates: tensors [rows, columns] as in `Shard`."""

    matrix: int
    rows: slice
    """Of all rows R."""
    columns: slice
    """Of all columns C."""
    master: Tensor
    weights: Tensor | None
    grad: Tensor
    """Belongs to the optimizer: nobody reads it behind the update."""
    states: Mapping[str, Tensor]
    lr: float
    weight_decay: float
    counts: bool
    """Whether this rank counts it in sums: of equal copies one does."""


class SummingOptimizer:
    """Base of optimizers that need sums over whole matrices."""

    ROW_STATE: str | None = None
    """Name of a state of one number for each row of a matrix."""
    COLUMN_STATE: str | None = None

    def begin_step(self, divisor: Tensor, num_updates: Tensor) -> Tensor:
        """Return what all pieces of a step have in common; see `Optimizer`."""
        return torch.stack((divisor.double(), num_updates))

    def update_(
        self,
        pieces: Sequence[Piece],
        matrices: AllMatrices,
        common: Tensor,
        add_up: Callable[[Tensor], Tensor],
    ) -> None:
        """Update this rank's pieces, and the states of `matrices`. `add_up` adds a flat fp64 tensor
        over the ranks, in place; all of them call it."""
        raise NotImplementedError
