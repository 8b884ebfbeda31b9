"""The largest logit of each head, for QK-clip and for records of a run's layers.

Letters in shapes are those of `kernels.attention`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megalite.kernels.attention_kinds import PLAIN, AttentionKind

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
