"""Adafactor (Shazeer and Stern 2018), as torch.optim.Adafactor computes it: the second moment of a
matrix is kept as the means of its rows and of its columns, and steps are as large as the weights
are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from megalite.config import Member, OptimizerConfig
from megalite.engine.optimizers import AllMatrices, Piece, SummingOptimizer
from megalite.models.weights import Weight

ROW, COLUMN, WHOLE = "row_var", "col_var", "variance"


class AdafactorConfig(OptimizerConfig):
    """Adafactor. Each matrix of a fused weight, and each expert, is one of its own. What is no
    matrix, norms and biases, keeps a whole second moment: `unfactored` among the config's
    optimizers."""

    name: Literal["adafactor"] = "adafactor"
    beta2_decay: float = Field(
        -0.8,
        lt=0,
        description="Power of the number of updates that is the share of a new second moment.",
    )
    eps: float = Field(
        torch.finfo(torch.float32).eps, gt=0, description="Smallest root of a second moment."
    )
    min_scale: float = Field(
        1e-3,
        gt=0,
        description="Steps are scaled by the root mean square of a matrix, or by this where it is less.",
    )
    clip_threshold: float = Field(
        1.0, gt=0, description="Largest root mean square of a matrix's update."
    )

    STATES: ClassVar[tuple[str, ...]] = (ROW, COLUMN)
    ELEMENTWISE = False
    PASSES = 39  # in torch: 15 for three sums of squares in fp64, 15 for the update and its sum, 9 more to apply it

    def build(self) -> SummingOptimizer:
        return Adafactor(self, factored=True)

    def members(self) -> Mapping[str, Member]:
        unfactored = Member(
            lambda: Adafactor(self, factored=False), (WHOLE,), 1.0, self.weight_decay
        )
        return {**super().members(), "unfactored": unfactored}

    def member_of(self, weight: Weight) -> str:
        return self.name if weight.row_shape else "unfactored"

    def takes(self, member: str, weight: Weight) -> bool:
        return member != self.name or bool(weight.row_shape)

    def state_row(self, weight: Weight, state: str) -> Weight:
        if state == ROW:
            # One number for each row, of each matrix of a stack; whole on every rank, hence not
            # cut.
            return replace(weight, shape=(*weight.shape[:-1], 1), shard=None)
        if state == COLUMN:
            parts = (1,) * len(weight.parts)
            shape = (*weight.shape[: weight.stack], len(parts) or 1, weight.shape[-1])
            return replace(weight, shape=shape, parts=parts, unit=1, shard=None)
        return weight


class Adafactor(SummingOptimizer):
    """Sums are taken in fp64, so that how they are spread over ranks does not show in fp32."""

    def __init__(self, config: AdafactorConfig, factored: bool):
        self.config, self.factored = config, factored
        if factored:
            self.ROW_STATE, self.COLUMN_STATE = ROW, COLUMN

    def update_(
        self,
        pieces: Sequence[Piece],
        matrices: AllMatrices,
        common: Tensor,
        add_up: Callable[[Tensor], Tensor],
    ) -> None:
        divisor, num_updates = common
        is_refused = divisor <= 0
        # The share 1 - β₂(t) of the new in the mean: 1 in the first step, which needs no bias
        # correction.
        share = num_updates**self.config.beta2_decay
        squares_M, rows_R, columns_C = self._squares(pieces, matrices, add_up)
        if self.factored:
            for state, sums, sizes in (
                (matrices.states[ROW], rows_R, matrices.for_rows(matrices.columns_M)),
                (matrices.states[COLUMN], columns_C, matrices.for_columns(matrices.rows_M)),
            ):
                # Squares of clipped gradients, from sums over unclipped ones.
                mean = sums / divisor.square() / sizes
                state.copy_(torch.where(is_refused, state, state.double().lerp(mean, share)))
            # The mean of the columns' means is that of the rows', too.
            means_M = torch.segment_reduce(
                matrices.states[COLUMN].double(), "mean", lengths=matrices.columns_M
            )
            rows = (
                matrices.states[ROW] / matrices.for_rows(means_M.clamp(min=self.config.eps)).float()
            )
        updates_M = torch.zeros_like(squares_M)
        for piece in pieces:
            grad = piece.grad.div_(divisor.float())
            if self.factored:
                # The rank-1 estimate of the second moment: row mean × column mean / mean of all
                # (paper, section 3).
                variance = rows[piece.rows, None] * matrices.states[COLUMN][piece.columns]
            else:
                before = piece.states[WHOLE]
                before.copy_(
                    torch.where(is_refused, before, before.lerp(grad.square(), share.float()))
                )
                variance = before
            grad.mul_(variance.clamp(min=self.config.eps**2).rsqrt_())
            if piece.counts:
                updates_M[piece.matrix] += sum_of_squares(grad)
        # The second and last message of a step: how large each matrix's update came out, to clip it
        # by.
        add_up(updates_M)
        self._apply(pieces, matrices, squares_M, updates_M, common)

    def _squares(
        self, pieces: Sequence[Piece], matrices: AllMatrices, add_up: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the sums of squares, fp64, of each matrix's weights, and of the gradients in each
        row and column."""
        vectors = (matrices.num_rows, matrices.num_columns) if self.factored else (0, 0)
        sizes = [len(matrices.rows_M), *vectors]
        flat = torch.zeros(sum(sizes), dtype=torch.float64, device=matrices.rows_M.device)
        squares_M, rows_R, columns_C = flat.split(sizes)
        for piece in pieces:
            if not piece.counts:
                continue
            squares_M[piece.matrix] += sum_of_squares(piece.master)
            if self.factored:
                rows_R[piece.rows] += sum_of_squares(piece.grad, 1)
                columns_C[piece.columns] += sum_of_squares(piece.grad, 0)
        add_up(flat)
        return squares_M, rows_R, columns_C

    def _apply(
        self,
        pieces: Sequence[Piece],
        matrices: AllMatrices,
        squares_M: Tensor,
        updates_M: Tensor,
        common: Tensor,
    ) -> None:
        """Step by what the pieces' gradients have become."""
        divisor, num_updates = common
        is_refused = divisor <= 0
        numel_M = matrices.rows_M * matrices.columns_M
        scale_M = (squares_M / numel_M).sqrt().clamp(min=self.config.min_scale)
        clip_M = ((updates_M / numel_M).sqrt() / self.config.clip_threshold).clamp(min=1.0)
        # The relative step size of the paper, min(lr, 1/√t), times the scale of the weights.
        most = num_updates**-0.5
        for piece in pieces:
            step = most.clamp(max=piece.lr) * scale_M[piece.matrix] / clip_M[piece.matrix]
            value = piece.master * (1 - piece.lr * piece.weight_decay) - step.float() * piece.grad
            piece.master.copy_(torch.where(is_refused, piece.master, value))
            if piece.weights is not None:
                piece.weights.copy_(
                    torch.where(is_refused, piece.weights, value.to(piece.weights.dtype))
                )


def sum_of_squares(x: Tensor, dim: int | None = None) -> Tensor:
    """Return the sum of the squares of `x` over a dimension, or over all, in fp64."""
    return torch.linalg.vector_norm(x, dim=dim, dtype=torch.float64).square()
