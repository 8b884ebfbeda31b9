"""Rotary positions (Su et al. 2021), in place in the fused projection of queries, keys and values.

Shapes: B batch, T sequence, N heads of queries, keys and values together, K head size, R pairs of a head that turn."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megalite.kernels.library import own, pick


def rotate(qkv: Tensor, head_size: int, num_heads: int, cos_BTR: Tensor, sin_BTR: Tensor) -> Tensor:
    """[B,T,N·K] → [B,T,N,K]: turn the pairs (x[i], x[i + R]), Hugging Face's pairing, of the first `num_heads` heads of
    every token: queries and keys come first, values last. What a head has beyond 2R stays. Computed in fp32.

    `cos` and `sin` are fp32 [B or 1,T,R]. The result lies in the memory of `qkv`: a checkpointed region may begin where
    `qkv` is computed, but not behind it. A hook that keeps the result's gradient must clone it."""
    if pick("rope", qkv) == "megalite":
        qkv = _Rotate.apply(qkv.contiguous(), head_size, num_heads, cos_BTR, sin_BTR)
        return qkv.unflatten(-1, (-1, head_size))
    return _rotate_plainly(qkv.unflatten(-1, (-1, head_size)), num_heads, cos_BTR, sin_BTR)


def _rotate_plainly(qkv_BTNK: Tensor, num_heads: int, cos_BTR: Tensor, sin_BTR: Tensor) -> Tensor:
    pairs, (*_, heads, size) = cos_BTR.shape[-1], qkv_BTNK.shape
    turned, rest = qkv_BTNK.split((num_heads, heads - num_heads), dim=2)
    a, b, beyond = turned.split((pairs, pairs, size - 2 * pairs), dim=-1)
    cos, sin = cos_BTR[:, :, None], sin_BTR[:, :, None]
    turned = torch.cat((a * cos - b * sin, b * cos + a * sin, beyond), dim=-1)
    return torch.cat((turned.to(rest.dtype), rest), dim=2)


class _Rotate(torch.autograd.Function):
    """Takes [B,T,N·K] as the linear layer gave it, and not its view [B,T,N,K]: where a view changes in place, autograd
    copies the whole gradient three times on the way back."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, head_size: int, num_heads: int, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.head_size, ctx.num_heads = head_size, num_heads
        ctx.mark_dirty(qkv)
        torch.ops.megalite.rope_(qkv.unflatten(-1, (-1, head_size)), cos, sin, num_heads, False)
        return qkv

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        if not _is_ours(grad):
            grad = grad.clone(memory_format=torch.contiguous_format)
        torch.ops.megalite.rope_(grad.unflatten(-1, (-1, ctx.head_size)), *ctx.saved_tensors, ctx.num_heads, True)
        return grad, None, None, None, None


def _is_ours(grad: Tensor) -> bool:
    """Whether nothing else holds this gradient or shares its memory, so that it may change in place. y + z hands one
    gradient to both, and who calls backward(grad) has it still. A compiler finds out by itself."""
    count = getattr(Tensor, "_use_count", None)  # not in every torch
    if torch.compiler.is_compiling() or count is None or not grad.is_contiguous():
        return False
    storage = grad.untyped_storage()
    holders = 2  # of the storage: `grad` and `storage`
    if (whole := grad._base) is not None:  # the gradient [B,T,N,K], of which this one is a view that keeps it
        if count(whole) != 2:  # by `grad` and `whole`
            return False
        holders += 1
    return count(grad) == 1 and torch._C._storage_Use_Count(storage._cdata) == holders


if own():

    @torch.library.register_fake("megalite::rope_")
    def _(qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, inverse: bool) -> None:
        return None
