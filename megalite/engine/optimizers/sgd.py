"""Stochastic gradient descent with momentum (Sutskever et al. 2013), as torch.optim.SGD computes
it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor

from megalite.config import OptimizerConfig
from megalite.engine.optimizers import Optimizer, PlainOptimizer, Shard


class SGDConfig(OptimizerConfig):
    """SGD. Its weight decay is added to the gradient, as in torch."""

    name: Literal["sgd"] = "sgd"
    momentum: float = Field(0.9, ge=0, lt=1, description="Decay of the momentum.")
    nesterov: bool = Field(False, description="Look ahead by the momentum, as Nesterov does.")

    STATES: ClassVar[tuple[str, ...]] = ("momentum_buffer",)

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> Self:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0")
        return self

    def build(self) -> Optimizer:
        return SGD(self.momentum, self.nesterov)


class SGD(PlainOptimizer):
    """Keeps a decaying sum of gradients, which begins at 0: the first step takes the gradient
    itself."""

    def __init__(self, momentum: float, nesterov: bool):
        self.momentum, self.nesterov = momentum, nesterov

    def compute(self, shard: Shard, num_updates: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        grad = shard.grad.add(shard.master, alpha=shard.weight_decay)
        buffer = grad.add(shard.states["momentum_buffer"], alpha=self.momentum)
        # `buffer` is a new tensor: the shard must stay as it is until the step is known to be
        # permitted.
        step = grad.add(buffer, alpha=self.momentum) if self.nesterov else buffer
        return shard.master.sub(step, alpha=shard.lr), {"momentum_buffer": buffer}
