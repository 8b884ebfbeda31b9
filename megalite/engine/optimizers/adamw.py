"""AdamW (Loshchilov and Hutter 2019)."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, field_validator
from torch import Tensor

from megalite.config import OptimizerConfig, Section
from megalite.engine.optimizers import Optimizer, Shard
from megalite.kernels.optimizer import adamw_, adamw_factors
from megalite.models.weights import Weight


def below_one(betas: tuple[float, float]) -> tuple[float, float]:
    """Return the decay rates of two averages. Raises ValueError for one that is no such rate."""
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError("both betas must be at least 0 and below 1")
    return betas


class AdamWSettings(Section):
    """AdamW's own settings."""

    betas: tuple[float, float] = Field(
        (0.9, 0.95), description="Decay of the first and the second moment."
    )
    eps: float = Field(1e-8, gt=0, description="Added to the root of the second moment.")

    STATES: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")
    UNSIGNED: ClassVar[tuple[str, ...]] = ("exp_avg_sq",)

    _below_one = field_validator("betas")(below_one)

    def build(self) -> Optimizer:
        """Return the optimizer that updates the weights."""
        return AdamW(self.betas, self.eps)


class AdamWConfig(AdamWSettings, OptimizerConfig):
    """AdamW for all weights."""

    name: Literal["adamw"] = "adamw"

    def width_factor(self, member: str, weight: Weight) -> float:
        return by_fan_in(weight)


def by_fan_in(weight: Weight) -> float:
    """Return muP's factor of the learning rate for updates whose elements are alike at any width:
    more inputs add up to more, all in one direction (Yang et al. 2022, table 3)."""
    return 1 / weight.wider_in


class AdamW:
    """One pass over a shard clips, updates and rounds."""

    def __init__(self, betas: tuple[float, float], eps: float):
        self.betas, self.eps = betas, eps

    def begin_step(self, divisor: Tensor, num_updates: Tensor) -> Tensor:
        return adamw_factors(divisor, num_updates, self.betas)

    def update_(self, shard: Shard, common: Tensor) -> None:
        adamw_(
            shard.master,
            shard.states["exp_avg"],
            shard.states["exp_avg_sq"],
            shard.weights,
            shard.grad,
            common,
            lr=shard.lr,
            betas=self.betas,
            eps=self.eps,
            weight_decay=shard.weight_decay,
        )
