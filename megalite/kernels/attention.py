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

from megalite.kernels.library import own, pick


@dataclass(frozen=True)
class AttentionKind:
    """What a model's attention has beside being causal."""

    window: int | None = None
    """Tokens that each attends to at most, itself and those right before it."""
    softcap: float | None = None
    """Scores s become c · tanh(s / c) (Gemma 2)."""
    scale: float | None = None
    """What scores are multiplied by; None: 1/√K."""

    def within(self, length: int) -> AttentionKind:
        """The same, for sequences of this length: a window that takes in all of it is none."""
        return self if self.window is None or self.window < length else AttentionKind(None, self.softcap, self.scale)


PLAIN = AttentionKind()


def causal_attention(
    qkv_BTNK: Tensor,
    num_heads: int,
    num_kv_heads: int,
    document_BT: Tensor | None = None,
    kind: AttentionKind = PLAIN,
) -> Tensor:
    """→ [B,T,H·K]. Each token attends to itself and to those before it in its document: `document_BT` int64, numbers
    that ascend along T; None: all are one.

    megalite's kernel works by tiles, as flash attention does (Dao et al. 2022), and its backward pass gives the
    gradient of the whole projection at once. It knows the plain kind only; torch takes the others, soft-capped scores
    written out."""
    kind = kind.within(qkv_BTNK.shape[1])
    match pick("attention", qkv_BTNK):
        case "megalite" if kind == PLAIN:
            return torch.ops.megalite.attention_forward(qkv_BTNK, num_heads, num_kv_heads, document_BT)[0]
        case "flash_attn":
            return _flash_attn(*_split(qkv_BTNK, num_heads, num_kv_heads), document_BT, kind)
        case _ if kind.softcap is not None:
            return written_out(qkv_BTNK, num_heads, num_kv_heads, document_BT, kind)
        case _:
            return _torch(*_split(qkv_BTNK, num_heads, num_kv_heads), document_BT, kind)


def written_out(
    qkv_BTNK: Tensor,
    num_heads: int,
    num_kv_heads: int,
    document_BT: Tensor | None,
    kind: AttentionKind = PLAIN,
    drop: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """`causal_attention` with its scores, and what `drop` leaves of its probabilities, in memory as [B,H,T,T]."""
    q, k, v = (x.transpose(1, 2) for x in _split(qkv_BTNK, num_heads, num_kv_heads))
    k, v = (x.repeat_interleave(num_heads // num_kv_heads, dim=1) for x in (k, v))
    scores = (q @ k.transpose(-1, -2)).float() * (kind.scale or q.shape[-1] ** -0.5)
    if kind.softcap is not None:
        scores = (scores / kind.softcap).tanh() * kind.softcap
    if document_BT is None:
        document_BT = torch.zeros(1, scores.shape[-1], dtype=torch.int64, device=scores.device)
    probabilities = scores.masked_fill(~attention_mask(document_BT, kind.window), -torch.inf).softmax(-1).to(v.dtype)
    return ((drop(probabilities) if drop else probabilities) @ v).transpose(1, 2).flatten(2)


def attention_mask(document_BT: Tensor, window: int | None = None) -> Tensor:
    """[B,1,T,T] bool: which token (last) each token may attend to."""
    same = document_BT[:, None, :, None] == document_BT[:, None, None, :]
    return same.tril() if window is None else same.tril().triu(1 - window)


def _split(qkv_BTNK: Tensor, num_heads: int, num_kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    return qkv_BTNK.split((num_heads, num_kv_heads, num_kv_heads), dim=2)


def _torch(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, document_BT: Tensor | None, kind: AttentionKind) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BTGK, v_BTGK))
    mask = None
    if document_BT is not None:
        mask = attention_mask(document_BT, kind.window)
    elif kind.window is not None:
        mask = attention_mask(torch.zeros(1, q.shape[2], dtype=torch.int64, device=q.device), kind.window)
    if mask is not None and q.device.type == "cuda":
        # The kernel for CUDA that takes a mask knows no grouped queries; asked for them, torch would write scores out.
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=kind.scale, enable_gqa=grouped
    )
    return out.transpose(1, 2).flatten(2)


def _flash_attn(
    q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, document_BT: Tensor | None, kind: AttentionKind
) -> Tensor:
    import flash_attn

    window = None if kind.window is None else (kind.window - 1, 0)  # tokens before and after
    asked = {"softmax_scale": kind.scale, "window_size": window, "softcap": kind.softcap}
    options: dict[str, Any] = {"causal": True} | {name: value for name, value in asked.items() if value is not None}
    if document_BT is None:
        return flash_attn.flash_attn_func(q_BTHK, k_BTGK, v_BTGK, **options).flatten(2)
    batch, length = document_BT.shape
    ends, (q, k, v) = _document_ends(document_BT), (x.flatten(0, 1) for x in (q_BTHK, k_BTGK, v_BTGK))
    out = flash_attn.flash_attn_varlen_func(q, k, v, ends, ends, length, length, **options)
    return out.view(batch, length, -1)


_ends_of_documents = WeakIdKeyDictionary()


def _document_ends(document_BT: Tensor) -> Tensor:
    """[documents + 1] int32: 0, and where each document of the batch ends, its rows one after the other.

    How many they are, the host must wait to learn: flash_attn starts as many sequences as this is long, so that one
    padded to B·T would cost more than the wait. All layers of a micro-batch are given the same tensor and wait once."""
    if document_BT not in _ends_of_documents:
        begins = torch.ones_like(document_BT, dtype=torch.bool)
        begins[:, 1:] = document_BT[:, 1:] != document_BT[:, :-1]
        starts = begins.flatten().nonzero().flatten()
        _ends_of_documents[document_BT] = F.pad(starts, (0, 1), value=document_BT.numel()).int()
    return _ends_of_documents[document_BT]


def _register() -> None:
    ops = torch.ops.megalite

    @torch.library.register_fake("megalite::attention_forward")
    def _(qkv: Tensor, num_heads: int, num_kv_heads: int, document: Tensor | None) -> tuple[Tensor, Tensor]:
        batch, length, _, size = qkv.shape
        out = qkv.new_empty((batch, length, num_heads * size))
        return out, qkv.new_empty((batch, num_heads, length), dtype=torch.float32)

    @torch.library.register_fake("megalite::attention_backward")
    def _(
        grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, num_heads: int, num_kv_heads: int, document: Tensor | None
    ) -> Tensor:
        return torch.empty_like(qkv, memory_format=torch.contiguous_format)

    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        qkv, num_heads, num_kv_heads, document = inputs
        ctx.save_for_backward(qkv, *output, document)
        ctx.heads = num_heads, num_kv_heads

    def backward(ctx: Any, grad: Tensor, grad_lse: Tensor | None) -> tuple[Tensor, None, None, None]:
        qkv, out, lse, document = ctx.saved_tensors
        return ops.attention_backward(grad, qkv, out, lse, *ctx.heads, document), None, None, None

    torch.library.register_autograd("megalite::attention_forward", backward, setup_context=keep)


if own():
    _register()
