"""Frozen matrices in few bits, which linears dequantise for each product (QLoRA, Dettmers et al.
2023), by the formulas of bitsandbytes.

    nf4    4 bits and a scale for each 64 numbers along the input; the scales, less their mean over the
           matrix, in 8 dynamic bits with a scale for each 256 of them: 4.127 bits a weight in all
    int8   the nearest of 255 multiples of a 127th of the largest number of each output feature

A matrix is always quantised as a whole, and a rank takes its part of the outcome: so every layout
multiplies by the same numbers. Letters in shapes: N output features, K input features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, Self

import torch
import torch.nn as nn
from torch import Tensor

from megalite.kernels.blockwise import (
    DYNAMIC_BLOCK,
    dequantise_blocks,
    dynamic_table,
    look_up_pairs,
    nf4_table,
    pairs_of,
    quantise_blocks,
)

BLOCK = 64
"""Numbers of NF4 that share a scale."""
AT_ONCE = 2**20
"""Numbers that are converted at a time, which bounds what is held beside the outcome."""

Kind = Literal["nf4", "int8"]
BYTES_BESIDE: dict[Kind, int] = {"nf4": 8, "int8": 4}
"""Bytes for each of these numbers: what they stand for in fp32, and of NF4 the codes, int64 for two
of them."""


@dataclass
class Nf4:
    """Numbers of NF4 with scales that are quantised in turn."""

    codes: Tensor
    """Two numbers a byte, the first in its high half, uint8 [N, K/2]."""
    scales: Tensor
    """Places in the dynamic table, uint8 [N, K/64]."""
    nested: Tensor
    """Scales of each 256 of these, fp32: of the whole matrices, so that a part finds its own."""
    first: Tensor
    """Number of the first scale of each row, among all of the whole matrices, int32 [N]."""
    mean: Tensor
    """Mean of the scales of the matrix that a row is of, fp32 [N]."""

    @classmethod
    def of(cls, matrices: Sequence[Tensor]) -> Self:
        """Quantise `matrices` [N_i, K], each on its own: the rows of the outcome one after
        another."""
        codes, scales, nested, first, mean = zip(*map(_nf4, matrices), strict=True)
        # Each matrix begins with a nested block of its own.
        starts = [0]
        for each in nested:
            starts.append(starts[-1] + each.numel() * DYNAMIC_BLOCK)
        first = tuple(each + start for each, start in zip(first, starts, strict=False))
        return cls(*map(torch.cat, (codes, scales, nested, first, mean)))

    def part(self, rows: Tensor, columns: tuple[int, int]) -> Self:
        """Return some `rows`, by their numbers, of a range of `columns`."""
        low, high = columns
        return type(self)(
            self.codes[rows, low // 2 : high // 2],
            self.scales[rows, low // BLOCK : high // BLOCK],
            self.nested,
            self.first[rows] + low // BLOCK,
            self.mean[rows],
        )

    def rows(self, part: slice) -> Tensor:
        """Return what some rows stand for, fp32 [rows, K]."""
        blocks = self.scales.shape[1]
        number = self.first[part, None] + torch.arange(
            blocks, dtype=torch.int32, device=self.first.device
        )
        nested = self.nested[number // DYNAMIC_BLOCK]
        table = dynamic_table(self.codes.device)
        scales = dequantise_blocks(self.scales[part, :, None], nested, table).squeeze(-1)
        scales += self.mean[part, None]
        values = look_up_pairs(_pairs(self.codes.device), self.codes[part])
        return values.view(-1, blocks, BLOCK).mul_(scales[..., None]).flatten(1)


@cache
def _pairs(device: torch.device) -> Tensor:
    """Return the two numbers of NF4 that each byte holds."""
    return pairs_of(nf4_table(device))


def _nf4(matrix: Tensor) -> tuple[Tensor, ...]:
    """Return the fields of `Nf4` of one matrix."""
    rows, columns = matrix.shape
    table = nf4_table(matrix.device)
    pieces = [
        quantise_blocks(piece.unflatten(1, (-1, BLOCK)), table)
        for piece in matrix.split(max(1, AT_ONCE // columns))
    ]
    halves = [places.view(len(places), -1, 2) for places, _ in pieces]
    codes = torch.cat([each[..., 0] << 4 | each[..., 1] for each in halves])
    scales = torch.cat([largest for _, largest in pieces])
    # In fp64: the order of the sum does not show.
    mean = scales.double().mean().float()
    flat = (scales - mean).flatten()
    padded = nn.functional.pad(flat, (0, -flat.numel() % DYNAMIC_BLOCK)).view(-1, DYNAMIC_BLOCK)
    places, nested = quantise_blocks(padded, dynamic_table(matrix.device))
    each_row = torch.arange(rows, dtype=torch.int32, device=matrix.device) * scales.shape[1]
    found = places.flatten()[: flat.numel()].view_as(scales)
    return codes, found, nested, each_row, mean.expand(rows)


@dataclass
class Int8:
    """Integers with a scale for each row."""

    codes: Tensor
    """int8 [N, K]."""
    largest: Tensor
    """Largest absolute value of each whole row, fp32 [N]: what 127 stands for."""

    @classmethod
    def of(cls, matrices: Sequence[Tensor]) -> Self:
        codes, largest = [], []
        for matrix in matrices:
            most = matrix.float().abs().amax(1)
            scale = 127.0 / most.clamp(min=1e-38)[:, None]
            pieces = zip(
                *(x.split(max(1, AT_ONCE // matrix.shape[1])) for x in (matrix, scale)), strict=True
            )
            codes += [(piece.float() * each).round().to(torch.int8) for piece, each in pieces]
            largest.append(most)
        return cls(torch.cat(codes), torch.cat(largest))

    def part(self, rows: Tensor, columns: tuple[int, int]) -> Self:
        return type(self)(self.codes[rows, slice(*columns)], self.largest[rows])

    def rows(self, part: slice) -> Tensor:
        return self.codes[part].float().mul_(self.largest[part, None] / 127)


KINDS: dict[Kind, type[Nf4] | type[Int8]] = {"nf4": Nf4, "int8": Int8}


def num_bytes(kind: Kind, rows: int, columns: int, whole: int) -> int:
    """Return the bytes of a part of `rows` × `columns` of a matrix of `whole` numbers."""
    if kind == "int8":
        return rows * columns + 4 * rows
    nested = -(-whole // (BLOCK * DYNAMIC_BLOCK))
    return rows * columns // 2 + rows * columns // BLOCK + 4 * nested + 8 * rows


class QuantisedWeight(nn.Parameter):
    """The frozen weight of a linear module, [N, K], of which few bits are kept. As a tensor it is
    the codes."""

    kind: Kind
    numbers: Nf4 | Int8 | None

    def __new__(cls, kind: Kind, device: torch.device) -> Self:
        """Make a weight without numbers."""
        dtype = torch.uint8 if kind == "nf4" else torch.int8
        self = super().__new__(cls, torch.empty(0, dtype=dtype, device=device), requires_grad=False)
        self.kind, self.numbers = kind, None
        return self

    def adopt(self, numbers: Nf4 | Int8) -> None:
        """Take over the numbers of a weight of its kind."""
        self.data, self.numbers = numbers.codes, numbers

    def tensors(self) -> list[Tensor]:
        """Return the tensors that make it up."""
        return [] if self.numbers is None else list(vars(self.numbers).values())

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        """Return what it stands for, [N, K], each number rounded to `dtype` once."""
        assert self.numbers is not None
        rows = len(self.numbers.codes)
        width = self.numbers.codes.shape[1] * (2 if self.kind == "nf4" else 1)
        out = torch.empty(rows, width, dtype=dtype, device=self.device)
        step = max(1, AT_ONCE // width)
        for start in range(0, rows, step):
            part = slice(start, start + step)
            out[part] = self.numbers.rows(part)
        return out
