"""Adagrad (Duchi et al. 2011), as torch.optim.Adagrad computes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from megalite.config import OptimizerConfig
from megalite.engine.optimizers import Optimizer, PlainOptimizer, Shard


class AdagradConfig(OptimizerConfig):
    """Adagrad. Its weight decay is added to the gradient, as in torch."""

    name: Literal["adagrad"] = "adagrad"
    eps: float = Field(1e-10, gt=0, description="Added to the root of the sum of squares.")

    STATES: ClassVar[tuple[str, ...]] = ("sum",)
    UNSIGNED: ClassVar[tuple[str, ...]] = ("sum",)

    def build(self) -> Optimizer:
        return Adagrad(self.eps)


class Adagrad(PlainOptimizer):
    """Divides by the root of the sum of all squared gradients."""

    def __init__(self, eps: float):
        self.eps = eps

    def compute(self, shard: Shard, num_updates: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        grad = shard.grad.add(shard.master, alpha=shard.weight_decay)
        total = shard.states["sum"].addcmul(grad, grad)
        return shard.master.addcdiv(grad, total.sqrt().add_(self.eps), value=-shard.lr), {
            "sum": total
        }
