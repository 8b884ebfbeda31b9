"""Rotary positions (Su et al. 2021), in place in the fused projection of queries, keys and values.

Shapes: B batch, T sequence, N heads of queries, keys and values together, K head size, R pairs of a head that turn."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megalite.kernels.library import own, pick


def rotate(qkv_BTNK: Tensor, cos_BTR: Tensor, sin_BTR: Tensor, num_heads: int) -> Tensor:
    """Turn the pairs (x[i], x[i + R]), Hugging Face's pairing, of the first `num_heads` heads of every token: queries and
    keys come first, values last. The rest of a head beyond 2R is left alone. Computed in fp32.

    `cos` and `sin` are fp32 [B or 1,T,R]. The memory of `qkv` is taken for the result: use `qkv` itself no more, and let
    a checkpointed region begin before it, not with it."""
    if pick("rope", qkv_BTNK) == "megalite":
        return _Rotate.apply(qkv_BTNK.contiguous(), cos_BTR, sin_BTR, num_heads)
    return _rotate_plainly(qkv_BTNK, cos_BTR, sin_BTR, num_heads)


def _rotate_plainly(qkv_BTNK: Tensor, cos_BTR: Tensor, sin_BTR: Tensor, num_heads: int) -> Tensor:
    pairs, (*_, heads, size) = cos_BTR.shape[-1], qkv_BTNK.shape
    turned, rest = qkv_BTNK.split((num_heads, heads - num_heads), dim=2)
    a, b, beyond = turned.split((pairs, pairs, size - 2 * pairs), dim=-1)
    cos, sin = cos_BTR[:, :, None], sin_BTR[:, :, None]
    turned = torch.cat((a * cos - b * sin, b * cos + a * sin, beyond), dim=-1)
    return torch.cat((turned.to(rest.dtype), rest), dim=2)


class _Rotate(torch.autograd.Function):
    """Gives back its input, as flash-attn's rotary does, instead of marking it dirty: `qkv` is a view of what a linear
    layer gave, and for a dirty view autograd copies the whole gradient three times on the way back."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.num_heads = num_heads
        torch.ops.megalite.rope_(qkv, cos, sin, num_heads, False)
        return qkv

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        if not _is_ours(grad):
            grad = grad.clone(memory_format=torch.contiguous_format)
        torch.ops.megalite.rope_(grad, *ctx.saved_tensors, ctx.num_heads, True)
        return grad, None, None, None


def _is_ours(grad: Tensor) -> bool:
    """Whether nothing else holds this gradient or shares its memory, so that it may be changed in place. y + z hands one
    gradient to both, and who calls backward(grad) has it still. A compiler finds out by itself."""
    if torch.compiler.is_compiling() or not hasattr(grad, "_use_count"):
        return False
    storage = grad.untyped_storage()  # counts as one holder of it, the gradient as the other
    return grad.is_contiguous() and grad._use_count() == 1 and torch._C._storage_Use_Count(storage._cdata) == 2


if own():

    @torch.library.register_fake("megalite::rope_")
    def _(qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, inverse: bool) -> None:
        return None
