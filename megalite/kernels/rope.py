"""Rotary position embedding (RoPE, Su et al. 2021), in place in the fused projection of queries,
keys and values.

Letters in shapes: B batch, T tokens, N heads of queries, keys and values together, K head size, R
rotated pairs of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megalite.kernels.library import added, own, pick


def rotate(qkv: Tensor, head_size: int, num_heads: int, cos_BTR: Tensor, sin_BTR: Tensor) -> Tensor:
    """Rotate queries and keys by their positions: [B,T,N·K] → [B,T,N,K]. Computed in fp32.

    `qkv` is the fused projection of heads of `head_size` K; queries and keys are its first
    `num_heads` heads and values the last ones. Each rotated head turns its pairs (x[i], x[i + R]),
    Hugging Face's pairing; what lies beyond 2R stays. `cos_BTR` and `sin_BTR` are fp32 tables [B or
    1,T,R].

    The result shares the memory of `qkv`: a region under activation checkpointing may begin where
    `qkv` is computed, but not after it. A hook that keeps the result's gradient must clone it."""
    if function := added.get("rotate"):
        return function(qkv, head_size, num_heads, cos_BTR, sin_BTR)
    # contiguous() copies only where it must: the kernel rotates in place.
    if pick("rope", qkv) == "megalite":
        qkv = _Rotate.apply(qkv.contiguous(), head_size, num_heads, cos_BTR, sin_BTR)
        return qkv.unflatten(-1, (-1, head_size))
    return _rotate_plainly(qkv.unflatten(-1, (-1, head_size)), num_heads, cos_BTR, sin_BTR)


def _rotate_plainly(qkv_BTNK: Tensor, num_heads: int, cos_BTR: Tensor, sin_BTR: Tensor) -> Tensor:
    """Compute `rotate` in plain torch, out of place."""
    pairs = cos_BTR.shape[-1]
    *_, heads, size = qkv_BTNK.shape
    query_key, value = qkv_BTNK.split((num_heads, heads - num_heads), dim=2)
    # Hugging Face's pairing is of halves (i, i + R), not of neighbours as in the paper.
    a, b, beyond = query_key.split((pairs, pairs, size - 2 * pairs), dim=-1)
    # One table serves all heads of a token.
    cos = cos_BTR[:, :, None]
    sin = sin_BTR[:, :, None]
    turned_a = a * cos - b * sin
    turned_b = b * cos + a * sin
    turned = torch.cat((turned_a, turned_b, beyond), dim=-1)  # fp32, as the tables are
    return torch.cat((turned.to(value.dtype), value), dim=2)


class _Rotate(torch.autograd.Function):
    """Rotates [B,T,N·K] as the linear layer returned it, not its view [B,T,N,K]: autograd would
    copy the whole gradient three times in the backward pass of a view that changed in place."""

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        head_size: int,
        num_heads: int,
        cos: Tensor,
        sin: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.head_size, ctx.num_heads = head_size, num_heads
        ctx.mark_dirty(qkv)
        heads = qkv.unflatten(-1, (-1, head_size))
        torch.ops.megalite.rope_(heads, cos, sin, num_heads, False)
        return qkv

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        # The gradient is rotated in place as well, if nobody else can see it.
        if not _is_ours(grad):
            grad = grad.clone(memory_format=torch.contiguous_format)
        cos, sin = ctx.saved_tensors
        heads = grad.unflatten(-1, (-1, ctx.head_size))
        # A rotation is orthogonal: its gradient is the rotation by the opposite angle.
        torch.ops.megalite.rope_(heads, cos, sin, ctx.num_heads, True)
        return grad, None, None, None, None


def _is_ours(grad: Tensor) -> bool:
    """Return whether nothing else holds this gradient or shares its memory, so that it may change
    in place.

    Autograd hands the same tensor to both terms of y + z, and a caller of backward(grad) still
    holds its argument. Under torch.compile the answer is False: the compiler removes needless
    copies itself."""
    # Reference counts are the only way to know: autograd does not say who else holds a gradient.
    count = getattr(Tensor, "_use_count", None)  # not in every torch
    if torch.compiler.is_compiling() or count is None or not grad.is_contiguous():
        return False
    storage = grad.untyped_storage()
    holders = 2  # of the storage: `grad` and `storage`
    # `grad` is a view of the gradient [B,T,N,K] and keeps it alive.
    if (whole := grad._base) is not None:
        if count(whole) != 2:  # held by `grad` and by `whole`
            return False
        holders += 1
    return count(grad) == 1 and torch._C._storage_Use_Count(storage._cdata) == holders


if own():

    @torch.library.register_fake("megalite::rope_")
    def _(qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, inverse: bool) -> None:
        return None
