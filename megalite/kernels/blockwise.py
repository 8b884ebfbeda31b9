"""Blockwise quantisation (Dettmers et al. 2022 and 2023), by the formulas of bitsandbytes: numbers
of a block are divided by the largest among them, and each becomes the place of the nearest value of
a table."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
"""NormalFloat of 4 bits: between two of these a normal distribution has equal shares."""

DYNAMIC_BLOCK = 256
"""Numbers that share a scale, where 8 bits are dynamic."""


@cache
def nf4_table(device: torch.device) -> Tensor:
    """Return the values of NF4, fp32 [16]."""
    return torch.tensor(NF4, device=device)


@cache
def dynamic_table(device: torch.device, signed: bool = True) -> Tensor:
    """Return the values of dynamic 8-bit numbers, ascending, fp32 [256], 0 and 1 among them.

    How many leading zeros a number has says its power of ten; the bits behind them are its
    fraction. Numbers near 1 have six of these, the smallest none. Unsigned numbers have one more
    each."""
    values = [0.0, 1.0]
    for exponent in range(7):
        bounds = torch.linspace(0.1, 1, 2 ** (exponent + (not signed)) + 1)
        # In this order: fp32 means, scaled in fp32, as bitsandbytes rounds them.
        means = 10 ** (exponent - 6) * (bounds[:-1] + bounds[1:]) / 2
        values += means.tolist()
        values += (-means).tolist() if signed else []
    assert len(values) == 256
    return torch.tensor(sorted(values), device=device)


def nearest(x: Tensor, table: Tensor) -> Tensor:
    """Return the places in an ascending `table` of the values nearest to `x`, uint8."""
    places = torch.bucketize(x, (table[:-1] + table[1:]) / 2, out_int32=True)
    return places.to(torch.uint8)


def quantise_blocks(x: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise blocks of numbers [… , block] to places in an ascending `table`, uint8 of the same
    shape, and the largest absolute value of each block, fp32 [… ]."""
    x = x.float()
    largest = x.abs().amax(-1)
    scaled = (x * (1.0 / largest.clamp(min=1e-38))[..., None]).clamp_(-1, 1)
    return nearest(scaled, table), largest


def dequantise_blocks(places: Tensor, largest: Tensor, table: Tensor) -> Tensor:
    """Return the numbers, fp32 [… , block], that `quantise_blocks` has made `places` of."""
    values = table.index_select(0, places.flatten().long()).view(places.shape)
    return values.mul_(largest[..., None])


def pairs_of(values: Tensor) -> Tensor:
    """Return for each byte of two places in a table of 16 `values`, the first in its high half, the
    two values, as one number of 8 bytes: int64 [256]."""
    return torch.cartesian_prod(values, values).view(torch.int64).flatten()


def look_up_pairs(pairs: Tensor, codes: Tensor) -> Tensor:
    """Return the values, fp32 [2 n], of `codes`, uint8 of n elements, by what `pairs_of` returned."""
    # index_select of single numbers by int64 is 2 to 5 times as quick as of pairs, as indexing, or
    # by int32.
    return pairs.index_select(0, codes.flatten().long()).view(torch.float32)
