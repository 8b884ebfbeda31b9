"""Attention sinks (gpt-oss): each head has one more logit in its softmax, which takes a share of
the probability and has no value. Given the attention without it and its log-sum-exp, both follow in
one line; and with these two, the usual backward pass of fused attention gives the right gradients,
since all it knows of a softmax is its log-sum-exp.

Letters in shapes are those of `kernels.attention`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megalite.kernels.attention import split_heads
from megalite.kernels.attention_kinds import AttentionKind, attention_mask
from megalite.kernels.library import pick
from megalite.kernels.partial_attention import attend, attend_backward


def with_sinks(out_BHTV: Tensor, lse_BHT: Tensor, sinks_H: Tensor) -> tuple[Tensor, Tensor]:
    """Return attention and its log-sum-exp with the heads' sinks, from those without."""
    sinks_H1 = sinks_H.to(lse_BHT.dtype)[:, None]
    share_BHT = torch.sigmoid(lse_BHT - sinks_H1)
    return (out_BHTV * share_BHT[..., None]).to(out_BHTV.dtype), torch.logaddexp(lse_BHT, sinks_H1)


def sinks_gradient(grad_BHTV: Tensor, out_BHTV: Tensor, lse_BHT: Tensor, sinks_H: Tensor) -> Tensor:
    """Return the gradient of the sinks, [H], from the gradient of the output; `out_BHTV` and
    `lse_BHT` are those with the sinks. A sink's value is 0, so that of its probability is only what
    the normalisation takes."""
    probability_BHT = torch.exp(sinks_H.to(lse_BHT.dtype)[:, None] - lse_BHT)
    taken_BHT = (grad_BHTV.to(lse_BHT.dtype) * out_BHTV).sum(-1)
    return -(probability_BHT * taken_BHT).sum((0, 2)).to(sinks_H.dtype)


def self_attention_with_sinks(
    qkv_BTNK: Tensor,
    num_heads: int,
    num_kv_heads: int,
    sinks_H: Tensor,
    document_BT: Tensor | None,
    kind: AttentionKind,
) -> Tensor:
    """Compute `kernels.attention.self_attention` of heads that have sinks: [B,T,N,K] → [B,T,H·K].
    Raises ValueError for soft-capped scores."""
    kind = kind.within(qkv_BTNK.shape[1])
    if kind == AttentionKind(sinks=True) and pick("attention", qkv_BTNK) == "megalite":
        return _OwnKernel.apply(qkv_BTNK, sinks_H, num_heads, num_kv_heads, document_BT)
    return attention_with_sinks(
        *split_heads(qkv_BTNK, num_heads, num_kv_heads), sinks_H, document_BT, kind
    )


def attention_with_sinks(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    sinks_H: Tensor,
    document_BT: Tensor | None,
    kind: AttentionKind,
) -> Tensor:
    """Compute `kernels.attention.attention` of heads that have sinks: [B,T,H·V]. Raises ValueError
    for soft-capped scores."""
    if kind.softcap is not None:
        raise ValueError(f"attention sinks beside soft-capped scores are not computed: {kind}")
    kind, mask = kind.within(q_BTHK.shape[1]), None
    if document_BT is not None or kind.window is not None:
        if document_BT is None:
            document_BT = torch.zeros(1, q_BTHK.shape[1], dtype=torch.int64, device=q_BTHK.device)
        mask = attention_mask(document_BT, document_BT, kind)
    return _Fused.apply(q_BTHK, k_BTGK, v_BTGV, sinks_H, mask, kind)


class _OwnKernel(Function):
    """megalite's kernel for the CPU."""

    @staticmethod
    def forward(
        ctx: Any,
        qkv_BTNK: Tensor,
        sinks_H: Tensor,
        num_heads: int,
        num_kv_heads: int,
        document_BT: Tensor | None,
    ) -> Tensor:
        ctx.heads = num_heads, num_kv_heads
        out, lse_BHT = torch.ops.megalite.attention_forward(
            qkv_BTNK, num_heads, num_kv_heads, document_BT
        )
        out_BHTK, lse_BHT = with_sinks(_heads_first(out, num_heads), lse_BHT, sinks_H)
        out = out_BHTK.transpose(1, 2).flatten(2)
        ctx.save_for_backward(qkv_BTNK, sinks_H, out, lse_BHT, document_BT)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv_BTNK, sinks_H, out, lse_BHT, document_BT = ctx.saved_tensors
        grad_qkv = torch.ops.megalite.attention_backward(
            grad, qkv_BTNK, out, lse_BHT, *ctx.heads, document_BT
        )[0]
        grad_BHTK, out_BHTK = (_heads_first(x, ctx.heads[0]) for x in (grad, out))
        return grad_qkv, sinks_gradient(grad_BHTK, out_BHTK, lse_BHT, sinks_H), None, None, None


def _heads_first(x: Tensor, num_heads: int) -> Tensor:
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


class _Fused(Function):
    """torch's kernels."""

    @staticmethod
    def forward(
        ctx: Any, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, sinks_H: Tensor, mask: Tensor | None,
        kind: AttentionKind,
    ) -> Tensor:  # fmt: skip
        # A mask leaves out what is behind a query as well.
        ctx.causal, ctx.scale = kind.causal and mask is None, kind.scale
        q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BTGK, v_BTGK))
        out, lse = with_sinks(*attend(q, k, v, ctx.causal, mask, ctx.scale), sinks_H)
        ctx.save_for_backward(q, k, v, sinks_H, mask, out, lse)
        return out.transpose(1, 2).flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks_H, mask, out, lse = ctx.saved_tensors
        grad = _heads_first(grad.contiguous(), q.shape[1])
        grads = attend_backward(grad, q, k, v, out, lse, ctx.causal, mask, ctx.scale)
        of_sinks = sinks_gradient(grad, out, lse, sinks_H)
        return *(x.transpose(1, 2) for x in grads), of_sinks, None, None
