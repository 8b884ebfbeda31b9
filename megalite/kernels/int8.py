"""Round rows of inputs to int8, as layers in w8a8 do."""

from __future__ import annotations

import torch
from torch import Tensor

from megalite.kernels.library import own

SMALLEST = torch.finfo(torch.float32).tiny


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row of `x` [N,K], on the CPU, by a scale of its own: `x` is about `scales` ·
    (`numbers` - 128).

    Returns numbers uint8 [N,K] and scales fp32 [N,1]. As llm-compressor has it, the largest number
    is 127.5 steps from 0."""
    if own() and x.dtype in (torch.float32, torch.bfloat16):
        return torch.ops.megalite.int8_rows(x)
    rows = x.float()
    scales = (rows.abs().amax(1, keepdim=True) / 127.5).clamp_(min=SMALLEST)
    numbers = (rows / scales).round_().clamp_(-128, 127)
    return numbers.add_(128).to(torch.uint8), scales


if own():

    @torch.library.register_fake("megalite::int8_rows")
    def _(x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.empty_like(x, dtype=torch.uint8), x.new_empty(len(x), 1, dtype=torch.float32)
