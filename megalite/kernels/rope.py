"""Rotary position embedding (Su et al. 2021)."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(qkv: Tensor, head_size: int, num_heads: int, cos_BTR: Tensor, sin_BTR: Tensor) -> Tensor:
    qkv_BTNK = qkv.unflatten(-1, (-1, head_size))
    x, rest = qkv_BTNK[:, :, :num_heads], qkv_BTNK[:, :, num_heads:]
    size = cos_BTR.shape[-1]
    a, b, c = x.split((size, size, head_size - 2 * size), dim=-1)
    cos, sin = cos_BTR[:, :, None].to(x.dtype), sin_BTR[:, :, None].to(x.dtype)
    return torch.cat((torch.cat((a * cos - b * sin, b * cos + a * sin, c), -1), rest), 2)
