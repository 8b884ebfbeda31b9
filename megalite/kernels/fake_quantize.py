"""Quantisation-aware training: products take weights that are rounded as `megalite quantize` will round
them, and inputs as the format has them rounded where it is run. Gradients go through the rounding as
if it were not there (straight-through, Bengio et al. 2013), also where a number was cut off.

The rounded weight is a function of the weight as it would be saved, so that the model that is
trained is the one that quantising the checkpoint gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megalite.kernels.fp8 import Agree
from megalite.kernels.linear import input_gradient, product
from megalite.kernels.schemes import Scheme


class Switch:
    """Says whether rounding has begun; all modules of a model share one."""

    def __init__(self, on: bool):
        self.on = on


@dataclass(frozen=True)
class FakeQuantised:
    """Rounds the operands of a linear module's products under a scheme, and computes in the dtype of
    the operands."""

    scheme: Scheme
    inputs: Scheme | None
    """How inputs are rounded; None: they are not."""
    switch: Switch
    cut: str | None = None
    """How tensor ranks share the weight: "column", by output features, or "row", by input features.
    None: they do not."""
    agree: Agree | None = None
    """Finds the largest number over them."""

    def weight(self, weight: Tensor) -> Tensor:
        """Return what a weight [N,K] is after quantising, in its own dtype."""
        if not self.switch.on:
            return weight
        # A scale for each row is of all of its columns; groups and blocks lie on one rank.
        whole_rows = self.scheme.group is None and not getattr(self.scheme, "block", None)
        return self._rounded(weight, self.scheme, whole_rows)

    def x(self, x: Tensor) -> Tensor:
        """Return what inputs [… ,K] are rounded to."""
        if not self.switch.on or self.inputs is None:
            return x
        rows = self._rounded(x.flatten(0, -2), self.inputs, self.inputs.group is None)
        return rows.view(x.shape)

    @torch.no_grad()
    def _rounded(self, x: Tensor, scheme: Scheme, whole_rows: bool) -> Tensor:
        largest = scheme.largest(x)
        if whole_rows and self.cut == "row" and self.agree:
            largest = self.agree(largest)
        scale = scheme.spread(scheme.scales_for(largest, x.dtype), tuple(x.shape))
        return scheme.decode(scheme.encode(x, scale), scale).to(x.dtype)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return product(self.x(x), self.weight(weight), bias)

    def input_gradient(self, grad: Tensor, weight: Tensor) -> Tensor:
        return input_gradient(grad, self.weight(weight))

    def wgrad_operands(self, grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return grad, self.x(x)

    def grouped_operands(
        self, rows: Tensor, weight: Tensor, over: Literal["input", "output"]
    ) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("experts are not quantised")
