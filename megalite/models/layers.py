"""Modules that families share, written for one device. Letters in shapes: B batch, T sequence, D
hidden, H heads, G key/value heads, K head size, V vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from megalite.kernels.attention import attention, eager_attention, self_attention, split_heads
from megalite.kernels.attention_kinds import PLAIN, AttentionKind, check_cross
from megalite.kernels.largest_logits import largest_logits
from megalite.kernels.loss import IGNORE as IGNORE
from megalite.kernels.loss import LossTerms, cross_entropy
from megalite.kernels.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from megalite.kernels.sinks import attention_with_sinks, self_attention_with_sinks
from megalite.models.context_cut import ContextCut
from megalite.utils.counter_random import random_bits, uniform
from megalite.utils.keys import key_of


@dataclass(frozen=True)
class SequenceInfo:
    """Positions of a micro-batch's tokens. T counts the tokens at hand: a whole sequence, or a
    context rank's part."""

    index_BT: Tensor
    """Index of each token in its whole sequence, int64, ascending; B may be 1."""
    position_BT: Tensor
    """Positions to encode, int64: the index in the sequence, or in the token's own document; B may
    be 1."""
    document_BT: Tensor | None = None
    """Number of each token's document in its sequence: tokens attend only within theirs. None: one
    document."""
    key_B: Tensor | None = None
    """Dropout keys, int64, one per sample; with None nothing is dropped."""
    whole_length: int | Tensor | None = None
    """Length of the whole sequence, where only a part of it is at hand; [B,1,1] where rows differ,
    [B,T,1] where documents do; None: T."""

    whole_document_BT: Tensor | None = None
    """`document_BT` of the whole sequence, where only a part of it is at hand."""
    type_BT: Tensor | None = None
    """Types of the tokens, int64: 1 in the second text of a document. None: all are 0."""
    cut: ContextCut | None = None
    """How the sequence is cut over context ranks, where only a part of it is at hand."""
    source: Source | None = None
    """What an encoder reads, to which these tokens attend. None: there is no encoder."""

    @property
    def length(self) -> int | Tensor:
        """Return the length of the whole sequence."""
        return self.index_BT.shape[1] if self.whole_length is None else self.whole_length

    @property
    def index_S(self) -> Tensor:
        """Return the index of every token of the whole sequence, [S]."""
        ranks = 1 if self.cut is None else len(self.cut.index_RBT)
        return torch.arange(self.index_BT.shape[1] * ranks, device=self.index_BT.device)

    @classmethod
    def whole(cls, length: int, device: torch.device, source: Source | None = None) -> SequenceInfo:
        """Return the places of a whole sequence that is one document, beside the `source` that an
        encoder reads."""
        index = torch.arange(length, device=device)[None]
        return cls(index, index, source=source)


@dataclass(frozen=True)
class Source:
    """The sequence that an encoder reads, S tokens of it. Those of one document attend to each
    other, and those of the decoder's sequence to the tokens of theirs here."""

    tokens_BS: Tensor
    places: SequenceInfo

    @classmethod
    def whole(cls, tokens_BS: Tensor) -> Source:
        """Return a source whose rows are a document each."""
        return cls(tokens_BS, SequenceInfo.whole(tokens_BS.shape[1], tokens_BS.device))


Streams = Tensor | tuple[Tensor, ...]
"""What goes from layer to layer: hidden states [B,T,D]; several where the architecture has
`num_streams`, behind its `shared_tables`."""


def last_of(streams: Streams) -> Tensor:
    """Return the hidden states that predictions are made from."""
    return streams if isinstance(streams, Tensor) else streams[-1]


class Decoder(nn.Module):
    """Base of every family's model: embed, layers one after another, predict. A pipeline cuts it
    between layers.

    A model of several stacks, as an encoder and a decoder are, has the layers of one after those of
    the other. Between them are several streams, of which each layer changes its own and hands the
    others on."""

    INPUT: tuple[str, ...]
    """Modules that `embed` uses."""
    OUTPUT: tuple[str, ...]
    """Modules that `predict` uses."""
    config: Any
    layers: nn.ModuleDict
    """Layers by their number in the whole model; behind them predictors of further tokens, where
    the architecture has any."""
    norm: nn.Module
    head: nn.Module
    loss: nn.Module
    sentences: nn.Module
    """Tells of first tokens whether two texts follow each other, where the family has it."""

    def embed(self, tokens_BT: Tensor, places: SequenceInfo) -> Any:
        """Return the hidden states [B,T,D] that the first layer takes: `Streams`."""
        raise NotImplementedError

    def shared(self, places: SequenceInfo, dtype: torch.dtype) -> Any:
        """Return what all layers need besides the hidden states, computed once."""
        raise NotImplementedError

    def takes_source(self, module: str) -> bool:
        """Return whether the linear module of this name takes hidden states of the encoder's
        tokens, and not of the decoder's."""
        return False

    def predict(self, x_BTD: Tensor) -> Tensor:
        """Return logits [B,T,V]."""
        return self.project(self.finish(x_BTD))

    def final_states(self, x_BTD: Tensor) -> Tensor:
        """Return the final hidden states [B,T,D], which transformers' models without a head return,
        from those of the last layer."""
        return self.norm(x_BTD)

    def finish(self, x_BTD: Tensor) -> Tensor:
        """Return the hidden states [B,T,D] that the head takes, from those of the last layer."""
        return self.final_states(x_BTD)

    def project(self, x_BTD: Tensor) -> Tensor:
        """Return logits [B,T,V] of hidden states that are finished."""
        return self.head(x_BTD)

    def losses_of(
        self, states_BTD: Tensor, labels_BT: Tensor, terms: LossTerms | None = None
    ) -> Tensor:
        """Return the loss of every token, fp32 [B,T], from hidden states that are finished; with
        `terms` [B,T,2], as `cross_entropy` does. 0 where the label is `IGNORE`."""
        return self.loss(self.project(states_BTD), labels_BT, terms)

    def predict_ahead(
        self, states_BTD: Tensor, tokens_ABT: Tensor, places: SequenceInfo
    ) -> tuple[Tensor, ...]:
        """Return the finished hidden states for the next token, `states_BTD`, and those for each of
        A tokens behind it; `tokens_ABT` are the tokens that each of these comes after. Models with
        predictors of further tokens have it."""
        raise NotImplementedError

    def run_layers(self, x: Any, places: SequenceInfo) -> Any:
        """Run the layers that are here, one after another, on `Streams`: [B,T,D] → [B,T,D] each."""
        # On every stage and in every micro-batch anew: cos/sin tables are cheaper to compute than
        # to send.
        shared = self.shared(places, last_of(x).dtype)
        for number, layer in self.layers.items():
            if int(number) < self.config.num_layers:  # behind them: predictors of further tokens
                x = layer(x, shared)
        return x

    def forward(self, tokens_BT: Tensor, places: SequenceInfo | None = None) -> Tensor:
        """Return logits [B,T,V]. Without `places`, each row is a whole sequence of one document."""
        places = places or SequenceInfo.whole(tokens_BT.shape[1], tokens_BT.device)
        return self.predict(last_of(self.run_layers(self.embed(tokens_BT, places), places)))


def numbered(layers: Iterable[nn.Module]) -> nn.ModuleDict:
    """Return layers by their number, from 0."""
    return nn.ModuleDict({str(number): layer for number, layer in enumerate(layers)})


class Dropout(nn.Module):
    """Dropout whose mask depends on (seed, sample, position in the sample) alone, so that every
    layout drops the same.

    Tensor parallelism sets `shard` to (rank, ranks) where it cuts dimension 1 of the input over
    ranks: the sequence of hidden states, or the heads where `over_heads`; and `features` likewise
    where it cuts the last dimension, as it does where `over_features`: between two matrices. Context
    parallelism sets `parts` to its ranks, each of which has that part of the queries."""

    def __init__(self, p: float, site: str, over_heads: bool = False, over_features: bool = False):
        super().__init__()
        self.p = p
        self.site = key_of(site)
        self.over_heads, self.over_features = over_heads, over_features
        self.shard, self.features = (0, 1), (0, 1)
        self.parts = 1

    def forward(self, x: Tensor, places: SequenceInfo) -> Tensor:
        """Drop elements of `x` [B,T,D], or [B,H,T,T] where `over_heads`. Without keys, or in
        evaluation, it is returned as it is."""
        if self.p == 0.0 or places.key_B is None or not self.training:
            return x
        return self.drop(x, places, places.key_B)

    def drop(self, x: Tensor, places: SequenceInfo, key_B: Tensor) -> Tensor:
        """Drop elements of `x`; `key_B` has the key of each sample."""
        find_index = self._index_of_scores if self.over_heads else self._index_of_features
        index = find_index(x, places.index_BT).view(-1, *x.shape[1:])
        # A key a sample and site: two dropouts of a model must not drop the same elements.
        keys = random_bits(self.site, key_B)
        keys = keys.view(-1, *[1] * (x.dim() - 1))
        keep = uniform(keys, index) >= self.p
        # Inverted dropout: the expectation stays.
        scale = keep / (1.0 - self.p)
        return x * scale.to(x.dtype)

    # The index that one process would have given each element, whatever part of the input is here:
    # first come the heads of the whole model, or the tokens of the whole sequence.

    def _index_of_scores(self, x_BHTS: Tensor, index_BT: Tensor) -> Tensor:
        """Return the index of each score in those of the whole model, [B or 1,H,T,S] int64."""
        heads, queries, num_keys = x_BHTS.shape[1:]
        rank, _ = self.shard
        head_H = rank * heads + torch.arange(heads, device=x_BHTS.device)
        all_queries = queries * self.parts
        query_BHT = head_H[:, None] * all_queries + index_BT[:, None]
        key_S = torch.arange(num_keys, device=x_BHTS.device)
        return query_BHT[..., None] * num_keys + key_S

    def _index_of_features(self, x: Tensor, index_BT: Tensor) -> Tensor:
        """Return the index of each feature in those of the whole sequence, [B or 1,T,D] int64."""
        rank, ranks = self.shard
        part, parts = self.features
        token_BT = index_BT.chunk(ranks, 1)[rank]
        inner = x[0, 0].numel()
        feature_D = torch.arange(inner, device=x.device)
        return (token_BT[..., None] * parts + part) * inner + feature_D


def make_embedding(rows: int, width: int) -> nn.Embedding:
    """Make an embedding without drawing its weights: on the meta device that would import torch's
    compiler, which takes a second."""
    return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)


class RMSNorm(nn.Module):
    """RMSNorm (Zhang and Sennrich 2019), fused with the residual sum before it where one is
    given."""

    INIT: Literal["ones", "zeros"] = "ones"
    """Initial value of the weight, with which nothing is scaled."""
    UNIT = 0.0
    """Added to the weight."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        """Return the norm of `x`; with a residual, (norm, sum) of their sum."""
        if residual is None:
            return rms_norm(x, self.weight, self.eps, self.UNIT)
        return add_rms_norm(x, residual, self.weight, self.eps, self.UNIT)


class OffsetRMSNorm(RMSNorm):
    """RMSNorm that scales by 1 + weight (Gemma)."""

    INIT = "zeros"
    UNIT = 1.0


class LayerNorm(nn.Module):
    """LayerNorm (Ba et al. 2016), fused with the residual sum before it where one is given."""

    INIT: Literal["ones"] = "ones"
    SHIFTS = True
    """True if it has a bias."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size)) if self.SHIFTS else None
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        """Return the norm of `x`; with a residual, (norm, sum) of their sum."""
        # The kernels take a bias in any case.
        bias = torch.zeros_like(self.weight) if self.bias is None else self.bias
        if residual is None:
            return layer_norm(x, self.weight, bias, self.eps)
        return add_layer_norm(x, residual, self.weight, bias, self.eps)


class UnshiftedLayerNorm(LayerNorm):
    """LayerNorm without a bias (ModernBERT)."""

    SHIFTS = False


class CrossEntropy(nn.Module):
    """Compute the loss of every token in fp32; 0 where the label is `IGNORE`. The backward pass
    overwrites the logits."""

    def forward(self, logits: Tensor, labels_BT: Tensor, terms: LossTerms | None = None) -> Tensor:
        return cross_entropy(logits, labels_BT, terms=terms)


class ColumnLoss(nn.Module):
    """Base of losses that are a mean over the columns of the logits, each by itself; 0 where the
    label is `IGNORE`.

    Tensor parallelism cuts the columns, and then sets `columns` and `over_ranks`."""

    def __init__(self, num_columns: int):
        super().__init__()
        self.num_columns = num_columns
        self.columns: Callable[[int], tuple[int, int]] = lambda width: (0, width)
        """(columns of the logits at hand) → number of the first of them, and how many are not
        padding."""
        self.over_ranks: Callable[[Tensor], Tensor] = lambda x_BT: x_BT
        """Sums over the ranks that have other columns."""

    def forward(self, logits: Tensor, labels_BT: Tensor, terms: LossTerms | None = None) -> Tensor:
        first, count = self.columns(logits.shape[-1])
        is_here_BT = labels_BT != IGNORE
        # IGNORE is no label to compute with: 0 takes its place, whose loss is replaced below.
        losses_BTC = self.each(
            logits[..., :count].float(), labels_BT.masked_fill(~is_here_BT, 0), first
        )
        return self.over_ranks(losses_BTC.sum(-1)).masked_fill(~is_here_BT, 0.0) / self.num_columns

    def each(self, logits_BTC: Tensor, labels_BT: Tensor, first: int) -> Tensor:
        """Return the loss of each column, [B,T,C]; `first` is the number of the first."""
        raise NotImplementedError


class SetLoss(ColumnLoss):
    """Binary cross-entropy of whether a text has each class. A label is the set of its classes, as
    bits."""

    def each(self, logits_BTC: Tensor, labels_BT: Tensor, first: int) -> Tensor:
        has_BTC = in_set(labels_BT, first, logits_BTC.shape[-1]).float()
        return F.binary_cross_entropy_with_logits(logits_BTC, has_BTC, reduction="none")


class SquaredLoss(ColumnLoss):
    """Squared error of a number. A label is the bits of its fp32."""

    def each(self, logits_BTC: Tensor, labels_BT: Tensor, first: int) -> Tensor:
        return (logits_BTC - numbers_of(labels_BT)[..., None]).square()


def in_set(labels_BT: Tensor, first: int, count: int) -> Tensor:
    """Return whether the set that is a label has each of `count` classes from `first` on:
    [B,T,count] bool."""
    number_C = torch.arange(first, first + count, device=labels_BT.device)
    return (labels_BT[..., None] >> number_C & 1).bool()


def numbers_of(labels_BT: Tensor) -> Tensor:
    """Return the numbers whose fp32 bits are labels: [B,T]."""
    # Batches hold labels as int64 only; the lower half of one holds the number's bits.
    return labels_BT.to(torch.int32).view(torch.float32)


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
