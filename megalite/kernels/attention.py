"""Attention with grouped queries, within documents: of a fused projection to itself, or of queries
to keys and values of their own.

Letters in shapes: B batch, T queries, S keys and values, H heads of queries, G of keys and values,
K head size of queries and keys, V of values; N = H + 2G heads of a fused projection, where S = T
and V = K. Query head h reads key/value head h // (H // G).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megalite.kernels.attention_kinds import PLAIN, AttentionKind, attention_mask, check_cross
from megalite.kernels.attention_on_gpus import (
    flash_attention,
    sdpa_backends,
    takes_varlen,
    varlen_attention,
)
from megalite.kernels.library import added, own, pick


def self_attention(
    qkv_BTNK: Tensor,
    num_heads: int,
    num_kv_heads: int,
    document_BT: Tensor | None = None,
    kind: AttentionKind = PLAIN,
    bias: Tensor | None = None,
) -> Tensor:
    """Compute the `attention` of a fused projection to itself: [B,T,N,K] → [B,T,H·K].

    `qkv_BTNK` has `num_heads` query heads, then `num_kv_heads` key heads and as many value heads.
    `document_BT`, `kind` and `bias` are those of `attention`.

    megalite's kernel works in tiles, as flash attention does (Dao et al. 2022), and its backward
    pass returns the gradient of the whole fused projection at once. It knows no soft cap;
    `attention` computes what it does not take."""
    kind = kind.within(qkv_BTNK.shape[1])
    # An added function comes first and gets every kind; it must refuse those it does not compute.
    function = added.get("self_attention")
    if function and bias is None:
        return function(qkv_BTNK, num_heads, num_kv_heads, document_BT, kind)
    if not function and _is_own(qkv_BTNK, kind):
        # The operator also returns the log-sum-exp of the scores, which its backward pass reads.
        return torch.ops.megalite.attention_forward(
            qkv_BTNK, num_heads, num_kv_heads, document_BT, None, None,
            kind.causal, kind.window, kind.scale, None if bias is None else bias.float(),
        )[0]  # fmt: skip
    return attention(*split_heads(qkv_BTNK, num_heads, num_kv_heads), document_BT, kind, bias=bias)


def _is_own(x_BTNK: Tensor, kind: AttentionKind) -> bool:
    """Return whether megalite's kernel computes attention of such a kind."""
    has_kernel = kind.softcap is None and not kind.sinks
    return has_kernel and pick("attention", x_BTNK) == "megalite"


def attention(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    document_BT: Tensor | None = None,
    kind: AttentionKind = PLAIN,
    source_BS: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Attend from queries to keys and values: [B,T,H,K], [B,S,G,K] and [B,S,G,V] → [B,T,H·V].

    `document_BT` (int64) numbers each query's document, ascending along T; None means one document
    a row. Queries attend only within theirs. Keys are the queries' own tokens, unless `source_BS`
    numbers their documents, or their number differs (cross-attention): then `kind` must be neither
    causal nor windowed, and a query whose document has no key gets 0. `bias` [B or 1,H or 1,T,S] is
    added to the scores, behind their scale and cap.

    torch computes it, but for packed documents of another sequence, which megalite's kernel takes on
    the CPU; soft-capped scores are materialized (`eager_attention`).

    Raises ValueError for tensors and a kind that do not go together."""
    kind = kind.within(q_BTHK.shape[1])
    _check(q_BTHK, k_BSGK, v_BSGV, document_BT, kind, source_BS)
    if function := added.get("attention"):
        return function(q_BTHK, k_BSGK, v_BSGV, document_BT, kind, source_BS, bias)
    # flash_attn knows neither a bias nor heads of two sizes; torch's kernels take what is left.
    ours = (
        source_BS is None
        and bias is None
        and k_BSGK.shape == v_BSGV.shape
        and q_BTHK.shape[1] == k_BSGK.shape[1]
    )
    if ours and pick("attention", q_BTHK) == "flash_attn":
        return flash_attention(q_BTHK, k_BSGK, v_BSGV, document_BT, kind)
    is_crossing = source_BS is not None and bias is None and k_BSGK.shape == v_BSGV.shape
    if is_crossing and _is_own(q_BTHK, kind):
        kv = torch.cat((k_BSGK, v_BSGV), 2)
        return torch.ops.megalite.attention_forward(
            q_BTHK, q_BTHK.shape[2], k_BSGK.shape[2], document_BT, kv, source_BS,
            False, None, kind.scale, None,
        )[0]  # fmt: skip
    if kind.softcap is not None:
        return eager_attention(q_BTHK, k_BSGK, v_BSGV, document_BT, kind, source_BS, bias)
    return _torch(q_BTHK, k_BSGK, v_BSGV, document_BT, kind, source_BS, bias)


def eager_attention(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    document_BT: Tensor | None,
    kind: AttentionKind = PLAIN,
    source_BS: Tensor | None = None,
    bias: Tensor | None = None,
    drop: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Compute `attention` with its scores materialized as [B,H,T,S]. `drop` is the attention
    dropout, applied to the probabilities; the other arguments are those of `attention`."""
    mask, empty = _mask(q_BTHK, k_BSGK, document_BT, kind, source_BS, bias)
    num_heads = q_BTHK.shape[2]
    k, v = (_repeat_kv(x.transpose(1, 2), num_heads) for x in (k_BSGK, v_BSGV))
    return _merged(eager_heads(q_BTHK.transpose(1, 2), k, v, mask, kind, drop), empty)


def eager_heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    kind: AttentionKind,
    drop: Callable[[Tensor], Tensor] | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attend head by head: [B,H,T,K], [B,H,S,K] and [B,H,S,V] → [B,H,T,V]. `mask` is a bool tensor,
    true where a query attends to a key, or a number to add to each score, or None; `sinks`
    [1,H,T,1] has the sink's logit of each query."""
    # Fp32 from here to the softmax.
    scores = (q @ k.transpose(-1, -2)).float() * kind.scale_of(q.shape[-1])
    if kind.softcap is not None:
        scores = (scores / kind.softcap).tanh() * kind.softcap
    if mask is not None:
        scores = (
            scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        )
    if sinks is not None:
        scores = torch.cat((scores, sinks.float().expand(*scores.shape[:-1], 1)), -1)
    probabilities = scores.softmax(-1)[..., : v.shape[-2]].to(v.dtype)
    return (drop(probabilities) if drop else probabilities) @ v


def split_heads(
    qkv_BTNK: Tensor, num_heads: int, num_kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Split a fused projection into queries [B,T,H,K], and keys and values [B,T,G,K]."""
    return qkv_BTNK.split((num_heads, num_kv_heads, num_kv_heads), dim=2)


def _check(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    document_BT: Tensor | None,
    kind: AttentionKind,
    source_BS: Tensor | None,
) -> None:
    """Raise ValueError where queries, keys and values do not go together."""
    (batch, length, heads, size), (sources, groups) = q_BTHK.shape, k_BSGK.shape[1:3]
    if (
        k_BSGK.shape != (batch, sources, groups, size)
        or v_BSGV.shape[:3] != k_BSGK.shape[:3]
        or heads % groups
    ):
        shapes = ", ".join(str(list(x.shape)) for x in (q_BTHK, k_BSGK, v_BSGV))
        raise ValueError(
            f"attention: queries, keys and values have shapes {shapes}, which do not go together"
        )
    if source_BS is not None or length != sources:
        check_cross(document_BT, source_BS, kind)


def _mask(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    document_BT: Tensor | None,
    kind: AttentionKind,
    source_BS: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Return what SDPA calls `attn_mask`, [B or 1,H or 1,T,S]: bool, or `bias` with -inf where a
    query does not attend; None where all queries attend to all keys. Also return which queries
    attend to nothing, [B,1,T,1] bool, where there may be such: these seem to attend to everything,
    since the gradient of a softmax of nothing is not a number."""
    if document_BT is None and not kind.causal and kind.window is None:
        return None if bias is None else bias.to(q_BTHK.dtype), None
    if document_BT is None:
        document_BT = torch.zeros(1, q_BTHK.shape[1], dtype=torch.int64, device=q_BTHK.device)
    mask = attention_mask(document_BT, document_BT if source_BS is None else source_BS, kind)
    empty = None
    # Causal queries see at least themselves; only keys of another sequence can be missing
    # altogether.
    if source_BS is not None:
        empty = ~mask.any(-1, keepdim=True)
        # A softmax over nothing is NaN, whose gradient would spread: let it see all, and zero its
        # output.
        mask = mask | empty
    return mask if bias is None else bias.to(q_BTHK.dtype).masked_fill(~mask, -torch.inf), empty


def _merged(out_BHTV: Tensor, empty: Tensor | None) -> Tensor:
    """Return the heads' outputs beside each other, [B,T,H·V], and 0 for queries that attend to
    nothing."""
    # masked_fill also stops the gradient that would otherwise go to the keys that were let in.
    if empty is not None:
        out_BHTV = out_BHTV.masked_fill(empty, 0.0)
    return out_BHTV.transpose(1, 2).flatten(2)


def _repeat_kv(x_BGSK: Tensor, num_heads: int) -> Tensor:
    """Repeat keys or values [B,G,S,K] for the query heads that share them: [B,H,S,K]."""
    return x_BGSK.repeat_interleave(num_heads // x_BGSK.shape[1], dim=1)


def _torch(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    document_BT: Tensor | None,
    kind: AttentionKind,
    source_BS: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    is_part = document_BT is not None or kind.window is not None
    if is_part and source_BS is None and bias is None and takes_varlen(q_BTHK, v_BSGV):
        return varlen_attention(q_BTHK, k_BSGK, v_BSGV, document_BT, kind)
    q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BSGK, v_BSGV))
    num_heads = q.shape[1]
    # torch's kernels leave out by themselves what lies behind a query; a mask would only be read.
    implied = kind.causal and document_BT is None and kind.window is None and bias is None
    mask, empty = (
        (None, None) if implied else _mask(q_BTHK, k_BSGK, document_BT, kind, source_BS, bias)
    )
    flash = (
        mask is None and q.shape[-1] == v.shape[-1] and q.dtype in (torch.bfloat16, torch.float16)
    )
    if q.device.type == "cuda" and not flash:
        # The CUDA kernel that takes a mask and fp32 has no grouped-query attention; with enable_gqa
        # torch would fall back to materialized scores.
        k, v = _repeat_kv(k, num_heads), _repeat_kv(v, num_heads)
    with sdpa_backends(q.device) if flash and q.device.type == "cuda" else contextlib.nullcontext():
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=implied,
            scale=kind.scale,
            enable_gqa=num_heads != k.shape[1],
        )
    return _merged(out, empty)


def _gradient_of(x: Tensor | None, none: Tensor) -> Tensor:
    """Return an empty tensor like `x`, or of no elements and the dtype of `none`."""
    if x is None:
        return none.new_empty(0)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _register() -> None:
    ops = torch.ops.megalite

    # Fake kernels give torch.compile the shapes and dtypes of the results without computing them.

    @torch.library.register_fake("megalite::attention_forward")
    def _(
        qkv: Tensor, num_heads: int, num_kv_heads: int, document: Tensor | None, *rest: Any
    ) -> tuple[Tensor, Tensor]:
        # [B, T, N, K] → output [B, T, H · K] and log-sum-exp [B, H, T].
        batch, length, _, size = qkv.shape
        out = qkv.new_empty((batch, length, num_heads * size))
        lse = qkv.new_empty((batch, num_heads, length), dtype=torch.float32)
        return out, lse

    @torch.library.register_fake("megalite::attention_backward")
    def _(
        grad: Tensor,
        qkv: Tensor,
        out: Tensor,
        lse: Tensor,
        num_heads: int,
        num_kv_heads: int,
        document: Tensor | None,
        kv: Tensor | None = None,
        source: Tensor | None = None,
        causal: bool = True,
        window: int | None = None,
        scale: float | None = None,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _gradient_of(qkv, qkv), _gradient_of(kv, qkv), _gradient_of(bias, lse)

    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        qkv, num_heads, num_kv_heads, document, kv, source, *kind, bias = inputs
        # The log-sum-exp, part of `output`, lets the backward pass recompute probabilities tile by
        # tile.
        ctx.save_for_backward(qkv, *output, document, kv, source, bias)
        ctx.heads, ctx.kind = (num_heads, num_kv_heads), kind

    def backward(ctx: Any, grad: Tensor, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        qkv, out, lse, document, kv, source, bias = ctx.saved_tensors
        dqkv, dkv, dbias = ops.attention_backward(
            grad, qkv, out, lse, *ctx.heads, document, kv, source, *ctx.kind, bias
        )
        none = None, None, None
        return (
            dqkv,
            *none,
            None if kv is None else dkv,
            None,
            *none,
            None if bias is None else dbias,
        )

    torch.library.register_autograd("megalite::attention_forward", backward, setup_context=keep)


if own():
    _register()
