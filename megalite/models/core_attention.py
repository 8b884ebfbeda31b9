"""The mixer of all families, and what gives it keys that are elsewhere. Letters in shapes are those
of `models/layers.py`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
import torch.nn as nn
from torch import Tensor

from megalite.kernels.attention import attention, eager_attention, self_attention, split_heads
from megalite.kernels.attention_kinds import PLAIN, AttentionKind, check_cross
from megalite.kernels.largest_logits import largest_logits
from megalite.kernels.sinks import attention_with_sinks, self_attention_with_sinks
from megalite.models.dropout import Dropout
from megalite.models.layers import SequenceInfo


class AttentionStrategy(Protocol):
    """Attend where the keys at hand are not all: `RingAttention` to those of other ranks, `KVCache`
    to those of earlier tokens."""

    def attend(
        self,
        q_BTHK: Tensor,
        k_BTGK: Tensor,
        v_BTGV: Tensor,
        places: SequenceInfo,
        kind: AttentionKind,
        sinks_H: Tensor | None = None,
    ) -> Tensor | None:
        """Return the attention of the tokens at `places` to themselves and to those elsewhere,
        [B,T,H·V]; None where there are none elsewhere. `sinks_H` are the heads' sinks, where the
        kind has them."""


class GatheredKeys(Protocol):
    """Attend to the keys and values of all context ranks at once: `GatheredAttention`."""

    def attend(
        self,
        q_BTHK: Tensor,
        k_BSGK: Tensor,
        v_BSGV: Tensor,
        places: SequenceInfo,
        kind: AttentionKind,
        source: SequenceInfo | None,
        bias: Tensor | None,
        drop: Callable[[Tensor], Tensor] | None,
    ) -> Tensor:
        """Return the attention of the tokens at `places` to those of `source`, or of their own
        sequence, [B,T,H·V]."""
        ...


def _largest_logits(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    places: SequenceInfo,
    kind: AttentionKind,
    source: SequenceInfo | None,
) -> Tensor:
    source_BS = None if source is None else source.document_BT
    return largest_logits(q_BTHK, k_BSGK, places.document_BT, kind, source_BS)


class CoreAttention(nn.Module):
    """Attend from each token to tokens of its document, with grouped queries: the one mixer of all
    families.

    In training it computes with what is at hand. Context parallelism and generation each give it a
    `strategy` for keys and values that are elsewhere; a family does nothing for these."""

    def __init__(
        self,
        dropout: Dropout | None = None,
        kind: AttentionKind = PLAIN,
        num_heads: int = 0,
        biased: bool = False,
        crosses: bool = False,
    ):
        """Apply `dropout` to the probabilities; `kind` says whether it is causal, and gives window,
        soft cap and scale, and whether each of `num_heads` heads of queries has a sink. `biased`:
        `attend` is given a bias of the scores that is trained; `crosses`: keys of another
        sequence."""
        super().__init__()
        # Whether anything is ever dropped is known here, and not asked in every pass.
        self.dropout = dropout if dropout and dropout.p else None
        self.kind, self.biased, self.crosses = kind, biased, crosses
        self.sinks = nn.Parameter(torch.empty(num_heads)) if kind.sinks else None
        self.strategy: AttentionStrategy | None = None
        self.gathering: GatheredKeys | None = None
        """What attends to the keys of all context ranks, where it is `biased` or `crosses`."""
        self.logits_of: Callable[..., Tensor] = _largest_logits
        """(queries, keys, places, kind, places of the keys of another sequence or None) → the
        largest logit of each head. Context parallelism sets another function, which finds those of
        this rank's queries, or of its heads."""
        self.largest_logits: Tensor | None = None
        """Where set, fp32 [H] or [1]: each forward pass in training raises it to the largest logit
        of each head."""

    @property
    def writes_scores(self) -> bool:
        """Return whether it may materialise the scores [B,H,T,S]."""
        return self.kind.softcap is not None or self.biased or self.dropout is not None

    def forward(
        self,
        qkv_BTNK: Tensor,
        num_heads: int,
        num_kv_heads: int,
        places: SequenceInfo,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Attend within the fused projection [B,T,N,K]: N = num_heads of queries + num_kv_heads of
        keys + as many of values. Returns [B,T,H·K]; `places` says which tokens are of one
        document, and `bias` [1,H,T,S] is added to the scores."""
        if self.largest_logits is not None:
            self.note_logits(*split_heads(qkv_BTNK, num_heads, num_kv_heads)[:2], places)
        # Split only here: the fused path takes the projection as it is, and returns its gradient
        # whole.
        elsewhere = self.strategy is not None or self.gathering is not None
        if elsewhere or self.dropout is not None:
            out = self._by_strategy_or_eager(
                *split_heads(qkv_BTNK, num_heads, num_kv_heads), places, bias=bias
            )
            if out is not None:
                return out
        if self.sinks is not None:
            arguments = num_heads, num_kv_heads, self.sinks, places.document_BT, self.kind
            return self_attention_with_sinks(qkv_BTNK, *arguments)
        return self_attention(
            qkv_BTNK, num_heads, num_kv_heads, places.document_BT, self.kind, bias
        )

    def attend(
        self,
        q_BTHK: Tensor,
        k_BSGK: Tensor,
        v_BSGV: Tensor,
        places: SequenceInfo,
        source: SequenceInfo | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Attend from queries to keys and values that come apart, whose head sizes K and V may
        differ: [B,T,H·V].

        `places` are those of the queries, and of the keys where `source` is None. `source` are
        those of keys of another sequence (cross-attention), whole on this rank but for context
        parallelism. `bias` [B or 1,H or 1,T,S] is added to the scores. Raises ValueError where
        these, the kind and the strategy do not go together."""
        if self.largest_logits is not None:
            self.note_logits(q_BTHK, k_BSGK, places, source)
        out = self._by_strategy_or_eager(q_BTHK, k_BSGK, v_BSGV, places, source, bias)
        if out is not None:
            return out
        if self.sinks is not None:
            return attention_with_sinks(
                q_BTHK, k_BSGK, v_BSGV, self.sinks, places.document_BT, self.kind
            )
        source_BS = None if source is None else source.document_BT
        return attention(q_BTHK, k_BSGK, v_BSGV, places.document_BT, self.kind, source_BS, bias)

    def note_logits(
        self,
        q_BTHK: Tensor,
        k_BSGK: Tensor,
        places: SequenceInfo,
        source: SequenceInfo | None = None,
    ) -> None:
        """Raise `largest_logits` to those of these queries and keys. In evaluation it does
        nothing."""
        if self.training and self.largest_logits is not None:
            # Behind RoPE and norms, as attention sees them. They are computed a second time, tile
            # by tile: fused kernels do not tell them.
            found = self.logits_of(q_BTHK.detach(), k_BSGK.detach(), places, self.kind, source)
            self.largest_logits = torch.maximum(self.largest_logits, found)

    def _by_strategy_or_eager(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        places: SequenceInfo,
        source: SequenceInfo | None = None,
        bias: Tensor | None = None,
    ) -> Tensor | None:
        """Return what the strategy computes for a sequence's own keys, or eager attention with
        dropout; None where neither is asked for."""
        if self.sinks is not None and (
            source is not None or bias is not None or self.dropout is not None
        ):
            raise ValueError(
                "attention sinks go with no keys of another sequence, no bias and no dropout"
            )
        is_dropping = self.dropout is not None and self.training and places.key_B is not None
        # The random numbers of fused kernels would depend on the layout.
        drop = partial(self.dropout, places=places) if self.dropout and is_dropping else None
        if self.gathering is not None:
            return self.gathering.attend(q, k, v, places, self.kind, source, bias, drop)
        # A strategy is about keys of the sequence itself; those of another one are whole on each
        # rank.
        if source is not None:
            check_cross(places.document_BT, source.document_BT, self.kind)
        elif self.strategy is not None:
            if bias is not None:
                raise ValueError(f"{type(self.strategy).__name__} knows no bias of the scores")
            # None: all keys are at hand after all (a sequence's first tokens), and the usual ways
            # compute it.
            out = self.strategy.attend(
                q, k, v, places, self.kind, *([] if self.sinks is None else [self.sinks])
            )
            if out is not None:
                return out
        if drop is None:
            return None
        source_BS = None if source is None else source.document_BT
        return eager_attention(q, k, v, places.document_BT, self.kind, source_BS, bias, drop)
