"""What fp8 loses in one step: the share of the numbers that are not zero and become it, by layer.

Scales fit each block's largest number, so that nothing overflows; what is far below it in the same
block vanishes. A share that grows says that blocks hold numbers of too many magnitudes: of
activations, or of gradients, that fewer numbers should share a scale, or that the layer's modules
should be excluded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from megalite.comm.collectives import all_reduce
from megalite.comm.mesh import Mesh
from megalite.kernels.fp8 import Recipe
from megalite.observe.steps import Record
from megalite.parallel.tensor import ParallelLinear

KINDS = ("fp8_underflow", "fp8_grad_underflow")


class Underflow:
    """Counts in the linear modules of a rank's layers, from `begin` on, in training, until
    `end`."""

    def __init__(self, layers: Mapping[int, nn.Module], numbers: Sequence[int], mesh: Mesh):
        """`layers` are this rank's, by number; `numbers` are those of the whole model that have
        such modules."""
        self._mesh, self._index = mesh, {number: index for index, number in enumerate(numbers)}
        self._modules = [
            (self._index[number], module)
            for number, layer in layers.items()
            for module in layer.modules()
            if isinstance(module, ParallelLinear) and isinstance(module.recipe, Recipe)
        ]
        self._handles: list[RemovableHandle] = []

    def begin(self) -> None:
        """Begin to count. It costs each of the modules another pass over its input and over the
        gradient of its output."""
        # Of activations and of gradients, for each layer: how many vanish, and of how many.
        self._counts = torch.zeros(
            2, 2, len(self._index), dtype=torch.float64, device=self._mesh.device
        )
        for index, module in self._modules:
            self._handles.append(module.register_forward_hook(self._note(index)))

    def _note(self, index: int) -> Any:
        def note(module: ParallelLinear, inputs: tuple[Tensor], out: Tensor) -> None:
            assert isinstance(module.recipe, Recipe)
            if not module.training:
                return
            recipe, x = module.recipe, inputs[0].detach()
            self._add(0, index, x, recipe.rounded(x, "x"))
            # Of the tensor as it is now: RoPE rotates it in place afterwards.
            if out.requires_grad:
                out.register_hook(lambda g: self._add(1, index, g, recipe.rounded(g, "grad")))

        return note

    def _add(self, kind: int, index: int, given: Tensor, rounded: Tensor) -> None:
        # Zeros lose nothing, and padding or dropout may have many of them.
        there = given != 0
        self._counts[kind, 0, index] += (there & (rounded == 0)).sum()
        self._counts[kind, 1, index] += there.sum()

    def end(self) -> Record:
        """Return the shares by name. All ranks call it."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        counts = all_reduce(self._counts, self._mesh.world)
        shares = (counts[:, 0] / counts[:, 1]).float()
        return {
            f"{kind}/{number}": shares[which, index]
            for which, kind in enumerate(KINDS)
            for number, index in self._index.items()
        }
