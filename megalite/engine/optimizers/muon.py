"""Muon: momentum, orthogonalised (Jordan et al. 2024), at scale (Moonlight, Liu et al. 2025)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import sqrt
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from megalite.config import Member, OptimizerConfig
from megalite.engine.optimizers import MatrixOptimizer, Shard
from megalite.engine.optimizers.adamw import AdamWSettings, by_fan_in
from megalite.kernels.newton_schulz import COEFFICIENTS, iteration_products, orthogonalize
from megalite.kernels.optimizer import decayed_step_, momentum_
from megalite.models.weights import Weight

NewtonSchulz = Literal["simple", "quintic", "polar_express", "deepseek_v4"]
Scale = Literal["moonlight", "original", "spectral"]


class BesideMuon(AdamWSettings):
    """AdamW for what is no matrix of a layer: embeddings, heads, norms and biases."""

    lr: float | None = Field(
        None, gt=0, description="Its peak learning rate. That of Muon where left out."
    )
    weight_decay: float | None = Field(
        None, ge=0, description="Its weight decay. That of Muon where left out."
    )


class MuonConfig(OptimizerConfig):
    """Muon for the matrices of layers, AdamW for all other weights."""

    name: Literal["muon"] = "muon"
    momentum: float = Field(0.95, ge=0, lt=1, description="Decay of the momentum.")
    nesterov: bool = Field(True, description="Look ahead by the momentum, as Nesterov does.")
    coefficients: NewtonSchulz = Field(
        "simple", description="Coefficients of the Newton-Schulz iteration."
    )
    scale: Scale = Field(
        "moonlight",
        description="Factor of an update. moonlight: 0.2·√max(out, in), as large as AdamW's, whose lr and weight_decay "
        "carry over; original: √max(1, out/in); spectral: √max(out, in).",
    )
    per_head: bool = Field(
        False, description="Orthogonalise the rows of each head of q, k and v on their own."
    )
    adamw: BesideMuon = BesideMuon()

    STATES: ClassVar[tuple[str, ...]] = ("momentum_buffer",)
    ELEMENTWISE = False

    def build(self) -> MatrixOptimizer:
        return Muon(self)

    def members(self) -> Mapping[str, Member]:
        beside = self.adamw
        # A member's rate is a factor of the schedule's, which peaks at Muon's `lr`.
        decay = self.weight_decay if beside.weight_decay is None else beside.weight_decay
        adamw = Member(beside.build, beside.STATES, (beside.lr or self.lr) / self.lr, decay)
        return {**super().members(), "adamw": adamw}

    def products(self, weight: Weight) -> Sequence[tuple[int, int, int]]:
        if self.treatment(weight).optimizer != self.name:
            return ()
        # (m, n, k) of each product, for the planner and for MFU.
        (columns,) = weight.row_shape
        steps = len(COEFFICIENTS[self.coefficients])
        return [
            product for rows in self.split(weight) for product in iteration_products(rows, columns)
        ] * steps

    def split(self, weight: Weight) -> tuple[int, ...]:
        """Return the rows of each matrix of a weight that is orthogonalised on its own."""
        if self.per_head and weight.shard == "column" and weight.unit > 1:
            return (weight.unit,) * (weight.num_rows // weight.unit)
        return weight.row_groups

    def scale_of(self, rows: float, columns: float) -> float:
        """Return the factor of the orthogonalised update of a matrix."""
        match self.scale:
            case "moonlight":
                # An orthogonal matrix [m, n] has a root mean square of 1/√max(m, n); AdamW's
                # updates have about 0.2 to 0.4 (Moonlight, section 2.2).
                return 0.2 * sqrt(max(rows, columns))
            case "original":
                return sqrt(max(1.0, rows / columns))
            case "spectral":
                return sqrt(max(rows, columns))

    def width_factor(self, member: str, weight: Weight) -> float:
        if member != self.name:
            return by_fan_in(weight)
        # The largest singular value of an update, which is its scale, is to go by √(out/in) (Yang
        # et al. 2023), whatever the scale goes by. A head's rows are as many at every width.
        rows, columns = self.split(weight)[0], weight.row_shape[0]
        outputs = 1.0 if rows < weight.row_groups[0] else weight.wider_out
        base = self.scale_of(rows / outputs, columns / weight.wider_in)
        return sqrt(outputs / weight.wider_in) * base / self.scale_of(rows, columns)

    def member_of(self, weight: Weight) -> str:
        return self.name if weight.is_matrix else "adamw"

    def takes(self, member: str, weight: Weight) -> bool:
        return member != self.name or bool(weight.row_shape)


class Muon(MatrixOptimizer):
    """Momentum is kept by shard; owners orthogonalise it as whole matrices, in the precision of the
    weights."""

    def __init__(self, config: MuonConfig):
        self.config = config

    def begin_step(self, divisor: Tensor, num_updates: Tensor) -> Tensor:
        return divisor.float()

    def advance_(self, shard: Shard, common: Tensor, dtype: torch.dtype) -> Tensor:
        buffer, config = shard.states["momentum_buffer"], self.config
        return momentum_(buffer, shard.grad, common, config.momentum, config.nesterov, dtype)

    def split(self, weight: Weight) -> tuple[int, ...]:
        return self.config.split(weight)

    def cost(self, rows: int, columns: int) -> float:
        return float(sum(m * n * k for m, n, k in iteration_products(rows, columns)))

    def message_dtype(self, dtype: torch.dtype) -> torch.dtype:
        # What `orthogonalize` computes in: rounded here or there, the bits are the same.
        return dtype

    def solve(self, matrices: Sequence[Tensor], dtype: torch.dtype) -> Iterable[Tensor]:
        rows, columns = matrices[0].shape
        scale = self.config.scale_of(rows, columns)
        return orthogonalize(matrices, self.config.coefficients, dtype, scale)

    def update_(self, shard: Shard, solved: Tensor, common: Tensor) -> None:
        decayed_step_(shard.master, shard.weights, solved, common, shard.lr, shard.weight_decay)
