"""Lion (Chen et al. 2023): the sign of an average of gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field, field_validator
from torch import Tensor

from megalite.config import OptimizerConfig
from megalite.engine.optimizers import Optimizer, PlainOptimizer, Shard
from megalite.engine.optimizers.adamw import below_one


class LionConfig(OptimizerConfig):
    """Lion. Its authors advise a third to a tenth of AdamW's lr, and as many times its weight
    decay."""

    name: Literal["lion"] = "lion"
    betas: tuple[float, float] = Field(
        (0.9, 0.99), description="Share of the momentum in an update, and its decay."
    )

    STATES: ClassVar[tuple[str, ...]] = ("exp_avg",)

    _below_one = field_validator("betas")(below_one)

    def build(self) -> Optimizer:
        return Lion(self.betas)


class Lion(PlainOptimizer):
    """Steps by the sign of one average of gradients, and keeps another."""

    def __init__(self, betas: tuple[float, float]):
        self.betas = betas

    def compute(self, shard: Shard, num_updates: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        average = shard.states["exp_avg"]
        # Two rates: the step looks further into the new gradient (β₁) than what is kept does (β₂).
        beta1, beta2 = self.betas
        step = average.lerp(shard.grad, 1 - beta1).sign()
        decayed = shard.master * (1 - shard.lr * shard.weight_decay)
        value = decayed.sub_(step, alpha=shard.lr)
        return value, {"exp_avg": average.lerp(shard.grad, 1 - beta2)}
