"""Causal self-attention of a fused projection, with grouped queries, within documents.

Letters in shapes: B batch, T tokens, N = H + 2G heads of the projection: H of queries, G of keys, G of values; K head
size. Query head h reads key/value head h // (H // G). Scores are scaled by 1/√K.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from megalite.kernels.library import own, pick


def causal_attention(qkv_BTNK: Tensor, num_heads: int, num_kv_heads: int, document_BT: Tensor | None = None) -> Tensor:
    """→ [B,T,H·K]. Each token attends to itself and to those before it in its document: `document_BT` int64, numbers
    that ascend along T; None: all are one.

    megalite's kernel works by tiles, as flash attention does (Dao et al. 2022), and its backward pass gives the
    gradient of the whole projection at once."""
    match pick("attention", qkv_BTNK):
        case "megalite":
            return torch.ops.megalite.attention_forward(qkv_BTNK, num_heads, num_kv_heads, document_BT)[0]
        case "flash_attn":
            return _flash_attn(*_split(qkv_BTNK, num_heads, num_kv_heads), document_BT)
        case _:
            return _torch(*_split(qkv_BTNK, num_heads, num_kv_heads), document_BT)


def attention_mask(document_BT: Tensor) -> Tensor:
    """[B,1,T,T] bool: which token (last) each token may attend to."""
    same = document_BT[:, None, :, None] == document_BT[:, None, None, :]
    return same.tril()


def _split(qkv_BTNK: Tensor, num_heads: int, num_kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    return qkv_BTNK.split((num_heads, num_kv_heads, num_kv_heads), dim=2)


def _torch(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, document_BT: Tensor | None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BTGK, v_BTGK))
    mask = None if document_BT is None else attention_mask(document_BT)
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)
    return out.transpose(1, 2).flatten(2)


def _flash_attn(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, document_BT: Tensor | None) -> Tensor:
    import flash_attn

    if document_BT is None:
        return flash_attn.flash_attn_func(q_BTHK, k_BTGK, v_BTGK, causal=True).flatten(2)
    batch, length = document_BT.shape
    ends, (q, k, v) = _document_ends(document_BT), (x.flatten(0, 1) for x in (q_BTHK, k_BTGK, v_BTGK))
    out = flash_attn.flash_attn_varlen_func(q, k, v, ends, ends, length, length, causal=True)
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
