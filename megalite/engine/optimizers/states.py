"""Optimizer states in fewer bits than fp32: bf16, or 8 bits with a scale for each 256 numbers
(Dettmers et al. 2022). An update widens them piece by piece, and what it leaves is rounded to the
nearest. A checkpoint holds what they stand for in fp32, and rounding that again gives the same
bits: so a run resumes bitwise, and another precision or layout reads it as any state."""

from __future__ import annotations

import torch
from torch import Tensor

from megalite.config import OptimizerConfig
from megalite.kernels.blockwise import DYNAMIC_BLOCK, dequantise_blocks, dynamic_table, nearest

AT_ONCE = 2**20
"""Elements of a shard that are widened at a time; whole blocks."""


class Bf16State:
    """A state of a shard in bf16."""

    def __init__(self, size: int, device: torch.device):
        self._values = torch.zeros(size, dtype=torch.bfloat16, device=device)

    def read(self, part: slice) -> Tensor:
        """Return elements of the state, fp32."""
        return self._values[part].float()

    def write(self, part: slice, values: Tensor) -> None:
        """Round fp32 `values` to elements of the state."""
        self._values[part] = values


class DynamicState:
    """A state of a shard in dynamic 8-bit numbers.

    Differs from bitsandbytes in one thing: a block is divided by its largest number with that
    number's sign, and not by its absolute value. The largest is then always the table's 1, where
    bitsandbytes makes 0.993 of -1; so it is kept exactly, and rounding twice is rounding once."""

    def __init__(self, size: int, device: torch.device, signed: bool):
        blocks = size // DYNAMIC_BLOCK
        assert blocks * DYNAMIC_BLOCK == size, "shards are cut between blocks"
        self._table = dynamic_table(device, signed)
        self._places = torch.zeros(blocks, DYNAMIC_BLOCK, dtype=torch.uint8, device=device)
        self._scales = torch.zeros(blocks, device=device)

    def read(self, part: slice) -> Tensor:
        """Return elements of the state, fp32; `part` begins and ends between blocks."""
        blocks = slice(part.start // DYNAMIC_BLOCK, part.stop // DYNAMIC_BLOCK)
        return dequantise_blocks(self._places[blocks], self._scales[blocks], self._table).flatten()

    def write(self, part: slice, values: Tensor) -> None:
        """Round fp32 `values` to elements of the state; `part` is as in `read`."""
        blocks = slice(part.start // DYNAMIC_BLOCK, part.stop // DYNAMIC_BLOCK)
        rows = values.view(-1, DYNAMIC_BLOCK)
        scales = rows.gather(1, rows.abs().argmax(1, keepdim=True))
        self._scales[blocks] = scales[:, 0]
        # A quotient and no product with the inverse, which of the smallest numbers is infinite.
        self._places[blocks] = nearest(rows / torch.where(scales == 0, 1.0, scales), self._table)


StoredState = Bf16State | DynamicState


def make_state(
    optimizer: OptimizerConfig, name: str, size: int, device: torch.device
) -> StoredState:
    """Return the state `name` of a shard of `size` elements, zero at first, as `optimizer` asks to
    hold it."""
    if optimizer.state_dtype == "bf16":
        return Bf16State(size, device)
    return DynamicState(size, device, signed=name not in optimizer.UNSIGNED)
