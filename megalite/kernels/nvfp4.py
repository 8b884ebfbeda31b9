"""NVFP4 (NVIDIA 2025, arXiv 2509.25149), as a study of what four bits cost in loss: computed in torch on
any device, with no codes for a chip.

A number is e2m1. Sixteen share a scale in e4m3, which a scale of the whole matrix, fp32, brings into
that format's range:

    activations, gradients   1 × 16 along the product's sum; weights 16 × 16, so that both passes have the same
    gradients                rounded up or down by chance, in proportion to how near (stochastic rounding)
    the weight's gradient    both operands are rotated by a Hadamard matrix of 16, with fixed random signs, along
                             tokens first, which spreads outliers and leaves the product as it is

Chance is a function of the seed, the module, the sample, the token and the feature: the same on every
layout. Letters in shapes: T tokens, K input features, N output features; R, C rows and columns."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megalite.kernels.fp8 import Agree, Block, Operand, Recipe, Rounded, Sum, spread
from megalite.utils.counter_random import random_bits, uniform
from megalite.utils.keys import key_of

LARGEST = 6.0
"""Of e2m1: 0, 0.5, 1, 1.5, 2, 3, 4, 6."""
LARGEST_SCALE = 448.0
"""Of e4m3."""
LENGTH = 16
"""Numbers that share a scale, and size of the Hadamard matrix."""


def to_e2m1(x: Tensor, chance: Tensor | None = None) -> Tensor:
    """Return the numbers of e2m1 that `x` is rounded to: to the nearest, of two as near the one with
    the even code, or, with `chance` in [0, 1), up where it is above how far the lower one is. What is
    beyond the largest becomes it; NaN stays."""
    size = x.abs()
    # Neighbours are half apart below 2, one apart below 4, two apart above.
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    steps = size / step
    steps = steps.round() if chance is None else (steps + chance).floor()
    return (steps * step).clamp(max=LARGEST).copysign(x)


def quantise_nvfp4(
    x: Tensor, block: Block, agree: Agree | None = None, chance: Tensor | None = None
) -> Rounded:
    """Round a matrix [R,C] to NVFP4; its sizes are multiples of the `block`'s. `agree` finds the
    largest number over the ranks that have parts of the matrix; `chance`, [R,C], rounds by chance.

    A matrix with an infinity or a NaN becomes NaN as a whole, so that the guard of bad numbers sees
    it."""
    blocks = x.float().unflatten(1, (-1, block[1])).unflatten(0, (-1, block[0]))
    largest = blocks.abs().amax((1, 3))
    # Bits of numbers that are not negative are in their order: ranks compare them as integers.
    whole = largest.amax().reshape(1).contiguous().view(torch.int32)
    whole = (agree(whole) if agree else whole).view(torch.float32)
    # A tensor by a tensor: of a number by one, torch multiplies by the rounded reciprocal.
    inverse = torch.full_like(whole, LARGEST * LARGEST_SCALE) / whole
    # Of zeros, or of numbers so small that the inverse overflows: they become zero.
    inverse = torch.where(inverse.isinf(), 0.0, inverse)
    scales = (largest / LARGEST * inverse).to(torch.float8_e4m3fn).float()
    # 0 times what is not finite is NaN; the cast may have made 448 of it.
    decoded = scales * torch.where(inverse > 0, 1 / inverse, 0.0 * whole)
    up = torch.where(decoded > 0, 1 / decoded, torch.where(decoded == 0, 0.0, torch.nan))
    codes = to_e2m1(x.float() * spread(up, block, x.shape), chance)
    return Rounded(codes, decoded, block, "nvfp4")


def hadamard(size: int = LENGTH) -> Tensor:
    """Return the orthogonal Hadamard matrix of a power of two, with its columns' signs drawn once."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    signs = 1.0 - 2.0 * (uniform(key_of("nvfp4", "hadamard"), torch.arange(size)) < 0.5)
    return matrix * signs / size**0.5


def rotate(x: Tensor) -> Tensor:
    """Rotate each 16 tokens of a matrix [T,C] among themselves."""
    matrix = hadamard().to(x.device)
    return (matrix @ x.float().unflatten(0, (-1, LENGTH))).flatten(0, 1).to(x.dtype)


@dataclass(frozen=True)
class Nvfp4(Recipe):
    """How the operands of a linear module's products are rounded to NVFP4."""

    site: int = 0
    """Key of the module, by its name."""
    features: Tensor | None = None
    """Numbers of its output features in the whole module, int64 [N]; None: all, in order."""
    keys: Tensor | None = None
    """Keys of the samples of the micro-batch, int64 [B]; None: nothing is rounded by chance."""

    @property
    def spans_ranks(self) -> bool:
        return True

    def of(self, site: str, features: Tensor) -> Nvfp4:
        """Return the recipe of a module by its name, and the numbers of its features on this rank."""
        return replace(self, site=key_of("nvfp4", site), features=features)

    def of_samples(self, keys: Tensor | None) -> Nvfp4:
        """Return the recipe of a micro-batch, whose backward pass has no more to know."""
        return replace(self, keys=keys)

    def _is_cut(self, operand: Operand, over: Sum) -> bool:
        # The scale of the whole matrix; where every rank has all of it, they find the same.
        return self.cut is not None

    def _round(self, x: Tensor, operand: Operand, over: Sum) -> Tensor:
        rows = x.flatten(0, -2)
        if over == "tokens":
            rows = rotate(rows)
        block, _ = self._block(rows.shape, operand, over)
        chance = self._chance(rows, over) if operand == "grad" else None
        found = quantise_nvfp4(rows, block, self._agree(operand, over), chance)
        return found.dequantise(x.dtype).view(x.shape)

    def _chance(self, rows: Tensor, over: Sum) -> Tensor | None:
        """Return a number in [0, 1) for each element of a gradient [T,N], of all samples in order."""
        if self.keys is None or self.features is None:
            return None
        samples = len(self.keys)
        width = 2**24
        index = torch.arange(len(rows) // samples, device=rows.device)[:, None] * width
        index = index + self.features.to(rows.device)
        # Each product draws anew: its errors must not add to the other's.
        keys = random_bits(random_bits(self.site, self.keys), torch.tensor(int(over == "tokens")))
        return uniform(keys[:, None, None], index[None]).flatten(0, 1)
