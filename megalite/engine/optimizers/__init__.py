"""The optimizers of `native`, one file each: its settings, and how it updates weights.

An optimizer is element-wise: the new value of a weight's element depends on the gradient, the master weight and the
optimizer's states of that element alone. Hence each replica updates the shard that it owns, whatever it is a shard of.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor


class Optimizer(Protocol):
    """Updates flat shards of weights in place. Nothing of it may wait for the device."""

    def begin_step(self, divisor: Tensor, num_updates: Tensor) -> Tensor:
        """Return what all shards of a step have in common, on the device.

        `divisor` is fp32 [], by which gradients are divided so that their global norm is clipped. Where it is 0 the
        step is refused (its loss or gradient is not finite): nothing may change. `num_updates` is fp64 [], this one
        included."""

    def update_(
        self,
        master: Tensor,
        states: Mapping[str, Tensor],
        weights: Tensor | None,
        grad: Tensor,
        common: Tensor,
        *,
        lr: float,
        weight_decay: float,
    ) -> None:
        """Update a shard. `master`, `grad` and all `states` are fp32 of one shape; `weights` are bf16 and get the new
        `master`, rounded, or None where the weights are in fp32 and so their own master."""


class PlainOptimizer:
    """An optimizer written in torch, as a function from old values to new ones: the easy way to add one.

    It refuses steps, rounds weights and clips gradients; `compute` says how one update goes."""

    def compute(
        self,
        master: Tensor,
        states: Mapping[str, Tensor],
        grad: Tensor,
        num_updates: Tensor,
        *,
        lr: float,
        weight_decay: float,
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return the new master weights and states. Must not change its arguments; `grad` is clipped already."""
        raise NotImplementedError

    def begin_step(self, divisor: Tensor, num_updates: Tensor) -> Tensor:
        return torch.stack((divisor.double(), num_updates))

    def update_(
        self,
        master: Tensor,
        states: Mapping[str, Tensor],
        weights: Tensor | None,
        grad: Tensor,
        common: Tensor,
        *,
        lr: float,
        weight_decay: float,
    ) -> None:
        divisor, num_updates = common
        is_refused = divisor <= 0
        clipped = grad / divisor.float()
        value, new_states = self.compute(master, states, clipped, num_updates, lr=lr, weight_decay=weight_decay)
        for name, state in states.items():
            state.copy_(torch.where(is_refused, state, new_states[name]))
        master.copy_(torch.where(is_refused, master, value))
        if weights is not None:
            weights.copy_(torch.where(is_refused, weights, value.to(weights.dtype)))
