"""Weights of fp8 products that replicas gather as codes (`train.fp8.param_gather`), in half of bf16's
bytes.

Each replica rounds the shard that it has updated, by the scales that one process would take. Borders
of shards cut blocks of 128 × 128: so replicas agree on the largest number of each block first, four
bytes for 16,384 weights. What is gathered is what products take, and no rank has more of the weights
of others. Its own shard it keeps as without codes, for checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor

from megalite.comm.collectives import Wait, all_reduce, start_all_gather
from megalite.comm.mesh import Fold
from megalite.config import FP8_BLOCK
from megalite.engine.layout import Bucket, Slot
from megalite.kernels.fp8 import E4M3, WITHOUT_SIGN, CodedWeight, Rounded, scales_of

AT_ONCE = 2**24
"""Elements that are rounded at a time: they are widened to fp32 for it."""


class Codes:
    """Hold the codes and scales of one bucket on one rank."""

    def __init__(self, layout: Bucket, fold: Fold, device: torch.device):
        self.layout, self.replicas = layout, fold.replicas
        self.low, self.high = layout.shard(fold.replicas.rank, fold.replicas.size)
        self._shapes = {slot: slot.weight.local_shape(*fold.cut) for slot in layout.slots}
        self._first: dict[Slot, int] = {}
        number = 0
        for slot in layout.slots:
            self._first[slot] = number
            number += (slot.stop - slot.start) // FP8_BLOCK**2
        self.codes = torch.zeros(layout.size, dtype=torch.uint8, device=device)
        # One more than there are blocks: padding between weights is of the last.
        self.scales = torch.zeros(number + 1, device=device)
        self._block = torch.cat([*self._blocks()]).to(device)

    def _blocks(self) -> Iterator[Tensor]:
        """Yield the number of the block of each 128 elements of this rank's shard, int64. Rows are
        multiples of 128, and slots and shards begin at such: so these lie in one row of a block."""
        end = self.low
        for slot in self.layout.slots:
            start, stop = max(slot.start, self.low), min(slot.stop, self.high)
            if start >= stop:
                continue
            yield self._padding(start - end)
            end = stop
            across = self._shapes[slot][-1] // FP8_BLOCK
            piece = torch.arange(
                (start - slot.start) // FP8_BLOCK, (stop - slot.start) // FP8_BLOCK
            )
            row, column = piece // across, piece % across
            yield self._first[slot] + row // FP8_BLOCK * across + column
        yield self._padding(self.high - end)

    def _padding(self, elements: int) -> Tensor:
        return torch.full((elements // FP8_BLOCK,), len(self.scales) - 1, dtype=torch.int64)

    def parameter(self, slot: Slot, dtype: torch.dtype) -> nn.Parameter:
        """Return the weight of a slot as modules hold it. What is gathered later is there at once."""
        shape = self._shapes[slot]
        rows, columns = prod(shape[:-1]), shape[-1]
        codes = self.codes[slot.start : slot.stop].view(E4M3.dtype).view(rows, columns)
        first = self._first[slot]
        across = columns // FP8_BLOCK
        scales = self.scales[first : first + rows // FP8_BLOCK * across].view(-1, across)
        return CodedWeight(Rounded(codes, scales, (FP8_BLOCK, FP8_BLOCK)), torch.Size(shape), dtype)

    def start_gather(self, shard: Tensor) -> Wait:
        """Round this rank's `shard`, and start gathering those of all replicas, who call this, too."""
        # Bits without the sign: integers in the order of absolute values, NaN above infinity.
        largest = torch.zeros(len(self.scales), dtype=torch.int32, device=shard.device)
        for x, block in self._pieces(shard):
            bits = (x.view(torch.int32) & WITHOUT_SIGN).amax(1)
            largest.scatter_reduce_(0, block, bits, "amax")
        all_reduce(largest, self.replicas, dist.ReduceOp.MAX)
        scales, inverse = scales_of(largest, E4M3)
        self.scales.copy_(scales)
        start = self.low
        for x, block in self._pieces(shard):
            codes = (x * inverse[block, None]).to(E4M3.dtype).view(torch.uint8)
            self.codes[start : start + codes.numel()] = codes.view(-1)
            start += codes.numel()
        return start_all_gather(self.codes, self.replicas)

    def _pieces(self, shard: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield pieces of the shard, fp32 [n,128], with the block of each row."""
        rows = AT_ONCE // FP8_BLOCK
        for x, block in zip(
            shard.view(-1, FP8_BLOCK).split(rows), self._block.split(rows), strict=True
        ):
            yield x.float(), block
