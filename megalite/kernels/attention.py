"""Attention with grouped queries, within documents: of a fused projection to itself, or of queries
to keys and values of their own.

Letters in shapes: B batch, T queries, S keys and values, H heads of queries, G of keys and values,
K head size of queries and keys, V of values; N = H + 2G heads of a fused projection, where S = T
and V = K. Query head h reads key/value head h // (H // G).
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from megalite.kernels.library import added, own, pick, torch_takes_full_rows


@dataclass(frozen=True)
class AttentionKind:
    """Describe a model's attention: sliding window, soft-capping and scale of the scores, and
    whether it is causal."""

    window: int | None = None
    """Size of the sliding window in tokens, the attending token included: as many before it and,
    where attention is not causal, as many behind it. None: no window."""
    softcap: float | None = None
    """Cap c of the scores: s becomes c · tanh(s / c) (Gemma 2). None: no cap."""
    scale: float | None = None
    """Factor of the scores. None: 1/√K."""
    causal: bool = True
    """Tokens attend to none behind them. False: an encoder's attention, or attention to another
    sequence."""
    sinks: bool = False
    """Each head has one more logit, a sink, that takes a share of the probability and has no value
    (gpt-oss); see `kernels.sinks`."""

    def within(self, length: int) -> AttentionKind:
        """Return this kind for sequences of `length` tokens, without a window that would cover them
        whole."""
        if self.window is None or self.window < length:
            return self
        return replace(self, window=None)

    def scale_of(self, head_size: int) -> float:
        """Return the factor of the scores, for queries and keys of `head_size`."""
        return self.scale or head_size**-0.5


PLAIN = AttentionKind()


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
    is_masked = document_BT is not None or bias is not None
    if not function and _is_own(qkv_BTNK, kind, is_masked):
        # The operator also returns the log-sum-exp of the scores, which its backward pass reads.
        return torch.ops.megalite.attention_forward(
            qkv_BTNK, num_heads, num_kv_heads, document_BT, None, None,
            kind.causal, kind.window, kind.scale, None if bias is None else bias.float(),
        )[0]  # fmt: skip
    return attention(*split_heads(qkv_BTNK, num_heads, num_kv_heads), document_BT, kind, bias=bias)


def _is_own(x_BTNK: Tensor, kind: AttentionKind, is_masked: bool) -> bool:
    """Return whether megalite's kernel computes attention of such a kind; `is_masked`: within
    documents, or with a bias."""
    if kind.softcap is not None or kind.sinks or pick("attention", x_BTNK) != "megalite":
        return False
    is_full = not (kind.causal or is_masked or kind.window)
    return not (is_full and torch_takes_full_rows(x_BTNK.dtype, x_BTNK.shape[1]))


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
        return _flash_attn(q_BTHK, k_BSGK, v_BSGV, document_BT, kind)
    is_crossing = source_BS is not None and bias is None and k_BSGK.shape == v_BSGV.shape
    if is_crossing and _is_own(q_BTHK, kind, True):
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


CUDNN_IS_QUICKER = (9, 10)
"""Major compute capabilities, of Hopper and Blackwell, whose asynchronous products cuDNN's
attention uses and FlashAttention 2 does not: on an H100 the latter reaches 35% of the peak, the
former more than half (Shah et al. 2024)."""

LARGEST_FLASH_HEAD = 256
"""Largest head size that flash attention takes."""

LOGITS_AT_ONCE = 2**24
"""Attention logits that `largest_logits` has at a time, over all heads."""


@torch.no_grad()
def largest_logits(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    document_BT: Tensor | None = None,
    kind: AttentionKind = PLAIN,
    source_BS: Tensor | None = None,
) -> Tensor:
    """Return the largest logit of each head, fp32 [H]: of scaled products of queries with keys that
    they attend to, before a soft cap or a bias. -inf where there are none. The arguments are those
    of `attention`.

    At no time does it hold more than `LOGITS_AT_ONCE` of them."""
    kind = kind.within(q_BTHK.shape[1])
    source_BS = document_BT if source_BS is None else source_BS
    index_S = torch.arange(k_BSGK.shape[1], device=k_BSGK.device)

    def attended(rows: slice) -> tuple[slice, Tensor | None]:
        # No key before `first` or from `last` on is seen by any of these queries: they are not
        # multiplied at all. The mask then decides among those that some query sees.
        first = 0 if kind.window is None else max(0, rows.start - kind.window + 1)
        last = rows.stop if kind.causal else len(index_S)
        keys = slice(first, last)
        # How many tokens the key lies back of the query, negative where it lies ahead.
        back = (
            index_S[rows, None] - index_S[None, keys]
            if kind.causal or kind.window is not None
            else None
        )
        mask = None if back is None or not kind.causal else back >= 0
        if kind.window is not None and back is not None:
            near = back.abs() < kind.window
            mask = near if mask is None else mask & near
        if document_BT is not None and source_BS is not None:
            same = document_BT[:, None, rows, None] == source_BS[:, None, None, keys]
            mask = same if mask is None else mask & same
        return keys, mask

    return largest_of(
        q_BTHK.transpose(1, 2), k_BSGK.transpose(1, 2), attended, kind.scale_of(q_BTHK.shape[-1])
    )


def largest_of(
    q_BHTK: Tensor,
    k_BGSK: Tensor,
    attended: Callable[[slice], tuple[slice, Tensor | None]],
    scale: float,
) -> Tensor:
    """Return the largest logit of each head, fp32 [H]. `attended` gives for a range of queries a
    range of keys that holds all they attend to, and a bool mask that broadcasts to [B,H,T,S] of
    these; None: they attend to all."""
    (batch, heads, length, _), (groups, sources) = q_BHTK.shape, k_BGSK.shape[1:3]
    largest = torch.full((heads,), -torch.inf, device=q_BHTK.device)
    # Queries of one block: so many that their logits, B · H · rows · S, stay below the limit.
    at_once = max(1, LOGITS_AT_ONCE // (batch * heads * sources))
    for first in range(0, length, at_once):
        rows = slice(first, min(first + at_once, length))
        keys, mask = attended(rows)
        # The queries that share a key head are one matrix: [B,G,H/G·T,K].
        q = q_BHTK[:, :, rows].unflatten(1, (groups, -1)).flatten(2, 3)
        # [B, G, H/G · T, S] → [B, H, T, S]: query heads of a group lie side by side, so this is a
        # view.
        logits = (q @ k_BGSK[:, :, keys].transpose(-1, -2)).view(
            batch, heads, rows.stop - first, -1
        )
        if mask is not None:
            logits = logits.masked_fill(~mask, -torch.inf)
        # Scaled at last, and once a head: a factor above 0 changes nothing about which is the
        # largest.
        largest = torch.maximum(largest, logits.amax((0, 2, 3)).float() * scale)
    return largest


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


def check_cross(document_BT: Tensor | None, source_BS: Tensor | None, kind: AttentionKind) -> None:
    """Raise ValueError where a kind, or the documents of queries and keys, are not for keys of
    another sequence."""
    # Positions of two sequences cannot be compared: no key is "before" a query.
    if kind.causal or kind.window is not None:
        raise ValueError(
            f"attention to another sequence must be neither causal nor windowed, but is {kind}"
        )
    if (source_BS is None) != (document_BT is None):
        raise ValueError(
            "attention to another sequence: give the documents of queries and of keys, or of neither"
        )


def attention_mask(document_BT: Tensor, source_BS: Tensor, kind: AttentionKind) -> Tensor:
    """Return a mask [B,1,T,S] bool, true where a query (third dimension) may attend to a key (last
    one), from the numbers of their documents."""
    mask = document_BT[:, None, :, None] == source_BS[:, None, None, :]
    if kind.causal:
        mask = mask.tril()
    if kind.window is not None:
        # A key may lie up to window - 1 behind the query: the diagonal -(window - 1) is the last
        # kept.
        mask = mask.triu(1 - kind.window)
        if not kind.causal:
            mask = mask.tril(kind.window - 1)
    return mask


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
    if is_part and source_BS is None and bias is None and _takes_varlen(q_BTHK, v_BSGV):
        return _varlen(q_BTHK, k_BSGK, v_BSGV, document_BT, kind)
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
    with _backends(q.device) if flash and q.device.type == "cuda" else contextlib.nullcontext():
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


def prefers_cudnn(capability: tuple[int, int], deterministic: bool) -> bool:
    """Return whether cuDNN's kernel comes before FlashAttention 2 for unmasked attention on a GPU:
    the rule by which torch's are chosen. It has no `deterministic` backward pass; tensors that it
    does not take go to the next."""
    return capability[0] in CUDNN_IS_QUICKER and not deterministic


def _backends(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Return a context in which torch chooses by `prefers_cudnn`, whatever its version prefers."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    capability, deterministic = (
        torch.cuda.get_device_capability(device),
        torch.are_deterministic_algorithms_enabled(),
    )
    first = [SDPBackend.CUDNN_ATTENTION] if prefers_cudnn(capability, deterministic) else []
    others = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel([*first, *others], set_priority=True)


def _takes_varlen(q_BTHK: Tensor, v_BSGV: Tensor) -> bool:
    """Return whether torch's variable-length attention (its build of flash attention) computes such
    queries and values. It takes windows and documents without a mask, and looks at nothing that a
    query does not attend to."""
    size = q_BTHK.shape[-1]
    fits = (
        q_BTHK.dtype in (torch.bfloat16, torch.float16)
        and size == v_BSGV.shape[-1]
        and size % 8 == 0
    )
    if q_BTHK.device.type != "cuda" or not fits or size > LARGEST_FLASH_HEAD or not _has_varlen():
        return False
    return torch.cuda.get_device_capability(q_BTHK.device) >= (8, 0)


@functools.cache
def _has_varlen() -> bool:
    """Return whether this torch has variable-length attention with windows and grouped queries."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return {"scale", "window_size", "enable_gqa"} <= inspect.signature(
        varlen_attn
    ).parameters.keys()


def _varlen(
    q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, document_BT: Tensor | None, kind: AttentionKind
) -> Tensor:
    from torch.nn.attention import varlen

    batch, length = q_BTHK.shape[:2]
    if document_BT is None:
        # Each row is one sequence: only its window asks for this kernel.
        ends = torch.arange(
            0, (batch + 1) * length, length, dtype=torch.int32, device=q_BTHK.device
        )
    else:
        ends = _document_ends(document_BT)
    # -1: as many as there are, in flash attention's convention.
    before = -1 if kind.window is None else kind.window - 1
    # The tokens of all rows in one sequence, [B · T, heads, K].
    q, k, v = (x.flatten(0, 1) for x in (q_BTHK, k_BTGK, v_BTGK))
    out: Any = varlen.varlen_attn(
        q, k, v, ends, ends, length, length, scale=kind.scale, window_size=(before, 0 if kind.causal else before),
        enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    return out.view(batch, length, -1)


def _flash_attn(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGK: Tensor,
    document_BT: Tensor | None,
    kind: AttentionKind,
) -> Tensor:
    module = _flash_package(q_BTHK.device)
    # What is not asked for keeps the default of flash_attn.
    options: dict[str, Any] = {"causal": kind.causal}
    if kind.scale is not None:
        options["softmax_scale"] = kind.scale
    if kind.window is not None:
        # Tokens before and after.
        options["window_size"] = (
            kind.window - 1,
            0 if kind.causal else kind.window - 1,
        )
    if kind.softcap is not None:
        options["softcap"] = kind.softcap
    if torch.are_deterministic_algorithms_enabled():
        options["deterministic"] = True
    if document_BT is None:
        # Takes [B, T, heads, K] with grouped queries as they are.
        return _first(module.flash_attn_func(q_BTHK, k_BTGK, v_BTGK, **options)).flatten(2)
    batch, length = document_BT.shape
    ends = _document_ends(document_BT)
    # "varlen" wants the tokens of all rows in one sequence [B · T, heads, K], cut at `ends`.
    q, k, v = (x.flatten(0, 1) for x in (q_BTHK, k_BTGK, v_BTGK))
    # No document is longer than a row: `length` is a bound that needs no wait for the device.
    out = _first(module.flash_attn_varlen_func(q, k, v, ends, ends, length, length, **options))
    return out.view(batch, length, -1)


def _flash_package(device: torch.device) -> Any:
    """Return FlashAttention 3, a package of its own, on Hopper where it is installed; otherwise
    FlashAttention 2."""
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    if importlib.util.find_spec("flash_attn") is None or (
        hopper and importlib.util.find_spec("flash_attn_interface")
    ):
        return importlib.import_module("flash_attn_interface")
    return importlib.import_module("flash_attn")


def _first(found: Any) -> Tensor:
    """Return the output: some versions of FlashAttention 3 return the log-sum-exp with it."""
    return found[0] if isinstance(found, tuple) else found


# Weak keys: an entry goes with its micro-batch.
_ends_of_documents = WeakIdKeyDictionary()


def _document_ends(document_BT: Tensor) -> Tensor:
    """Return the cumulative document lengths [documents + 1] int32, from 0, of the batch's rows
    laid end to end (cu_seqlens). All layers of a micro-batch get the same tensor.

    Where the host does not know the documents (`note_documents`), it waits for the device to learn
    how many there are: kernels start as many sequences as this tensor is long, so padding it to B·T
    would cost more than the wait."""
    if document_BT not in _ends_of_documents:
        _ends_of_documents[document_BT] = _find_ends(document_BT)
    return _ends_of_documents[document_BT]


def note_documents(document_BT: Tensor, on_host_BT: Tensor) -> None:
    """Note where documents end, from the same numbers on the host, so that it need not ask the
    device of `document_BT` for them."""
    if document_BT.device.type == "cuda":
        # From pageable memory the copy would wait for the device, even with non_blocking.
        ends = _find_ends(on_host_BT).pin_memory()
        _ends_of_documents[document_BT] = ends.to(document_BT.device, non_blocking=True)


def _find_ends(document_BT: Tensor) -> Tensor:
    # The first token of a row begins a document, whatever number the row before ended with.
    begins = torch.ones_like(document_BT, dtype=torch.bool)
    begins[:, 1:] = document_BT[:, 1:] != document_BT[:, :-1]
    starts = begins.flatten().nonzero().flatten()
    return F.pad(starts, (0, 1), value=document_BT.numel()).int()


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
