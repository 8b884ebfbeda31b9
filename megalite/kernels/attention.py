"""Causal self-attention of a fused projection, with grouped queries, within documents.

Letters in shapes: B batch, T tokens, N = H + 2G heads of the projection: H of queries, G of keys, G of values; K head
size. Query head h reads key/value head h // (H // G). Scores are scaled by 1/√K, unless an `AttentionKind` says
otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from megalite.kernels.library import added, own, pick


@dataclass(frozen=True)
class AttentionKind:
    """Describe a model's attention beyond being causal: sliding window, soft-capping and scale of the scores."""

    window: int | None = None
    """Size of the sliding window in tokens, the attending token included. None: no window."""
    softcap: float | None = None
    """Cap c of the scores: s becomes c · tanh(s / c) (Gemma 2). None: no cap."""
    scale: float | None = None
    """Factor of the scores. None: 1/√K."""

    def within(self, length: int) -> AttentionKind:
        """Return this kind for sequences of `length` tokens, without a window that would cover them whole."""
        if self.window is None or self.window < length:
            return self
        return AttentionKind(None, self.softcap, self.scale)


PLAIN = AttentionKind()


def causal_attention(
    qkv_BTNK: Tensor,
    num_heads: int,
    num_kv_heads: int,
    document_BT: Tensor | None = None,
    kind: AttentionKind = PLAIN,
) -> Tensor:
    """Attend causally within each document: [B,T,N,K] → [B,T,H·K].

    `qkv_BTNK` is the fused projection of `num_heads` query heads and `num_kv_heads` key and value heads.
    `document_BT` (int64) numbers each token's document, ascending along T; None means one document a row. `kind`
    adds a sliding window, soft-capping or another scale.

    megalite's kernel works in tiles, as flash attention does (Dao et al. 2022), and its backward pass returns the
    gradient of the whole fused projection at once. It computes the plain kind only. torch computes the others;
    soft-capped scores are materialized (`eager_attention`)."""
    kind = kind.within(qkv_BTNK.shape[1])
    if function := added("attention", "causal_attention"):
        return function(qkv_BTNK, num_heads, num_kv_heads, document_BT, kind)
    match pick("attention", qkv_BTNK):
        case "megalite" if kind == PLAIN:
            # The operator also returns the log-sum-exp of the scores, which its backward pass reads.
            return torch.ops.megalite.attention_forward(qkv_BTNK, num_heads, num_kv_heads, document_BT)[0]
        case "flash_attn":
            return _flash_attn(*_split(qkv_BTNK, num_heads, num_kv_heads), document_BT, kind)
        case _ if kind.softcap is not None:
            return eager_attention(qkv_BTNK, num_heads, num_kv_heads, document_BT, kind)
        case _:
            return _torch(*_split(qkv_BTNK, num_heads, num_kv_heads), document_BT, kind)


def eager_attention(
    qkv_BTNK: Tensor,
    num_heads: int,
    num_kv_heads: int,
    document_BT: Tensor | None,
    kind: AttentionKind = PLAIN,
    drop: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Compute `causal_attention` with its scores materialized as [B,H,T,T] (eager attention).

    `qkv_BTNK`, `num_heads`, `num_kv_heads`, `document_BT` and `kind` are those of `causal_attention`. `drop` is the
    attention dropout, applied to the probabilities."""
    q_BTHK, k_BTGK, v_BTGK = _split(qkv_BTNK, num_heads, num_kv_heads)
    q = q_BTHK.transpose(1, 2)
    k = _repeat_kv(k_BTGK.transpose(1, 2), num_heads)
    v = _repeat_kv(v_BTGK.transpose(1, 2), num_heads)
    scale = kind.scale or q.shape[-1] ** -0.5
    scores = (q @ k.transpose(-1, -2)).float() * scale  # fp32 from here to the softmax
    if kind.softcap is not None:
        scores = (scores / kind.softcap).tanh() * kind.softcap
    if document_BT is None:
        document_BT = _one_document(scores.shape[-1], scores.device)
    allowed = attention_mask(document_BT, kind.window)
    probabilities = scores.masked_fill(~allowed, -torch.inf).softmax(-1).to(v.dtype)
    if drop:
        probabilities = drop(probabilities)
    return (probabilities @ v).transpose(1, 2).flatten(2)


def attention_mask(document_BT: Tensor, window: int | None = None) -> Tensor:
    """Return a mask [B,1,T,T] bool, true where a query (third dimension) may attend to a key (last one)."""
    same = document_BT[:, None, :, None] == document_BT[:, None, None, :]
    causal = same.tril()
    return causal if window is None else causal.triu(1 - window)


def _one_document(length: int, device: torch.device) -> Tensor:
    return torch.zeros(1, length, dtype=torch.int64, device=device)


def _split(qkv_BTNK: Tensor, num_heads: int, num_kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    return qkv_BTNK.split((num_heads, num_kv_heads, num_kv_heads), dim=2)


def _repeat_kv(x_BGTK: Tensor, num_heads: int) -> Tensor:
    """Repeat keys or values [B,G,T,K] for the query heads that share them: [B,H,T,K]."""
    return x_BGTK.repeat_interleave(num_heads // x_BGTK.shape[1], dim=1)


def _torch(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGK: Tensor,
    document_BT: Tensor | None,
    kind: AttentionKind,
) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BTGK, v_BTGK))
    num_heads, length = q.shape[1], q.shape[2]
    mask = None
    if document_BT is not None:
        mask = attention_mask(document_BT, kind.window)
    elif kind.window is not None:
        mask = attention_mask(_one_document(length, q.device), kind.window)
    if mask is not None and q.device.type == "cuda":
        # The CUDA kernel that takes a mask has no grouped-query attention; with enable_gqa torch would fall back to
        # materialized scores.
        k, v = _repeat_kv(k, num_heads), _repeat_kv(v, num_heads)
    out = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=mask is None,
        scale=kind.scale,
        enable_gqa=num_heads != k.shape[1],
    )
    return out.transpose(1, 2).flatten(2)


def _flash_attn(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGK: Tensor,
    document_BT: Tensor | None,
    kind: AttentionKind,
) -> Tensor:
    import flash_attn

    # What is not asked for keeps the default of flash_attn.
    options: dict[str, Any] = {"causal": True}
    if kind.scale is not None:
        options["softmax_scale"] = kind.scale
    if kind.window is not None:
        options["window_size"] = (kind.window - 1, 0)  # tokens before and after
    if kind.softcap is not None:
        options["softcap"] = kind.softcap
    if document_BT is None:
        return flash_attn.flash_attn_func(q_BTHK, k_BTGK, v_BTGK, **options).flatten(2)
    batch, length = document_BT.shape
    ends = _document_ends(document_BT)
    q, k, v = (x.flatten(0, 1) for x in (q_BTHK, k_BTGK, v_BTGK))
    out = flash_attn.flash_attn_varlen_func(q, k, v, ends, ends, length, length, **options)
    return out.view(batch, length, -1)


# Weak keys: an entry goes with its micro-batch.
_ends_of_documents = WeakIdKeyDictionary()


def _document_ends(document_BT: Tensor) -> Tensor:
    """Return the cumulative document lengths [documents + 1] int32, from 0, of the batch's rows laid end to end
    (flash_attn's cu_seqlens).

    The host waits for the device to learn how many documents there are: flash_attn starts as many sequences as this
    tensor is long, so padding it to B·T would cost more than the wait. All layers of a micro-batch get the same tensor
    and wait once."""
    if document_BT not in _ends_of_documents:
        # The first token of a row begins a document, whatever number the row before ended with.
        begins = torch.ones_like(document_BT, dtype=torch.bool)
        begins[:, 1:] = document_BT[:, 1:] != document_BT[:, :-1]
        starts = begins.flatten().nonzero().flatten()
        _ends_of_documents[document_BT] = F.pad(starts, (0, 1), value=document_BT.numel()).int()
    return _ends_of_documents[document_BT]


def _register() -> None:
    ops = torch.ops.megalite

    # Fake kernels give torch.compile the shapes and dtypes of the results without computing them.

    @torch.library.register_fake("megalite::attention_forward")
    def _(
        qkv: Tensor,
        num_heads: int,
        num_kv_heads: int,
        document: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
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
    ) -> Tensor:
        return torch.empty_like(qkv, memory_format=torch.contiguous_format)

    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        qkv, num_heads, num_kv_heads, document = inputs
        # The log-sum-exp, part of `output`, lets the backward pass recompute probabilities tile by tile.
        ctx.save_for_backward(qkv, *output, document)
        ctx.heads = num_heads, num_kv_heads

    def backward(ctx: Any, grad: Tensor, grad_lse: Tensor | None) -> tuple[Tensor, None, None, None]:
        qkv, out, lse, document = ctx.saved_tensors
        grad_qkv = ops.attention_backward(grad, qkv, out, lse, *ctx.heads, document)
        return grad_qkv, None, None, None

    torch.library.register_autograd("megalite::attention_forward", backward, setup_context=keep)


if own():
    _register()
