"""Modules that families share, written for one device. Letters in shapes: B batch, T sequence, D
hidden, H heads, G key/value heads, K head size, V vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from megalite.kernels.loss import IGNORE as IGNORE
from megalite.kernels.loss import LossTerms, cross_entropy
from megalite.kernels.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from megalite.models.context_cut import ContextCut


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
