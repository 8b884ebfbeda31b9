"""A pipeline stage: the part of a model between two hand-overs; without a pipeline, all of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from megalite.kernels.loss import LossTerms
from megalite.kernels.top_divergence import TopTokens
from megalite.models.layers import IGNORE, Decoder, SequenceInfo, Streams, last_of
from megalite.plan import StageSpan

if TYPE_CHECKING:
    from megalite.parallel.outputs import HiddenStates

MESSAGES_UNDER_WAY = 2
"""Hidden states and gradients a stage may have on their way to its neighbours at a time."""

TILE = 64
"""Picked tokens are filled up to a multiple of this."""

Output = Literal["losses", "logits", "hidden_states", "final_states"]
"""What the last stage returns of each token: its loss; the head's logits; what the head takes; what
the model without a head returns."""


@dataclass(frozen=True)
class Pairs:
    """Preference pairs in each row, of documents 2p and 2p + 1: P of them at most."""

    real_BP: Tensor
    """Whether the pair exists, bool."""
    reference_BP2: Tensor
    """The reference model's log-probabilities, fp32."""
    share: float
    """Share of each pair that counts on this rank: context ranks share pairs, and each knows all of
    them."""


@dataclass(frozen=True)
class Contrast:
    """Texts in each row that belong together, documents 2p and 2p + 1: P pairs of them at most."""

    real_BP: Tensor
    """Whether the pair exists, bool."""
    share: float
    """Share of each pair that counts on this rank: context ranks share pairs."""
    grad_BND: Tensor | None = None
    """Gradient of the sum of the losses of the global batch by what is pooled of each text, N = 2P,
    fp32."""
    found_BP2: Tensor | None = None
    """Loss of each pair, and whether its first text is nearest to its second of all."""


@dataclass(frozen=True)
class Answered:
    """Documents in each row, D of them at most, that have an answer with both ends."""

    real_BD: Tensor
    """Whether the document has one, bool."""
    share: float
    """Share of each that counts on this rank: context ranks share documents."""


@dataclass(frozen=True)
class Picked:
    """The tokens of a micro-batch of which predictions are asked, which are few where most have no
    label.

    Under sequence parallelism each tensor rank takes those of its slice of the sequence, as many on
    each, and the head gathers them: M = N · ranks; else M = N. What fills up has no label."""

    index_N: Tensor
    """Where they are in this rank's hidden states, [B·T/n] flattened."""
    labels_1M: Tensor
    place_M: Tensor
    """Where they are in the micro-batch, [B·T] flattened; B·T for what fills up."""
    shape: tuple[int, int]
    """[B,T] of the micro-batch."""

    @classmethod
    def of(cls, labels_BT: Tensor, slices: int, rank: int, device: torch.device) -> Picked:
        """Pick the tokens with a label. `labels_BT` is on the host, so that nothing waits to know
        how many there are; `slices` and `rank` tell how a sequence is cut over the tensor ranks."""
        batch, length = labels_BT.shape
        there = [
            (piece != IGNORE).flatten().nonzero()[:, 0] for piece in labels_BT.chunk(slices, 1)
        ]
        width = length // slices
        # Whole tiles of a product; one at least, since collectives take nothing of no size.
        count = min(-(-max(len(each) for each in there) // TILE) * TILE, batch * width) or 1
        index, place = (
            torch.zeros(slices, count, dtype=torch.long),
            torch.full((slices, count), batch * length),
        )
        for number, each in enumerate(there):
            index[number, : len(each)] = each
            place[number, : len(each)] = each // width * length + number * width + each % width
        labels = F.pad(labels_BT.flatten(), (0, 1), value=IGNORE)[place.flatten()]
        own, labels, where = (
            x.to(device, non_blocking=True) for x in (index[rank], labels[None], place.flatten())
        )
        return cls(own, labels, where, (batch, length))

    def take(self, x_BTD: Tensor) -> Tensor:
        """Return the hidden states of these tokens: [1,N,D]."""
        return x_BTD.flatten(0, 1).index_select(0, self.index_N)[None]

    def spread(self, x_1M: Tensor) -> Tensor:
        """Return the values of these tokens at their places, and 0 elsewhere: [B,T]."""
        batch, length = self.shape
        flat = x_1M.new_zeros(batch * length + 1).scatter(0, self.place_M, x_1M[0])
        return flat[:-1].view(batch, length)


@dataclass(frozen=True)
class Ahead:
    """What a model with A predictors of further tokens takes beside the tokens."""

    tokens_ABT: Tensor
    """Token a + 1 places behind each one, for predictor a; where its document has ended, its last
    token."""
    labels_ABT: Tensor
    """The label of that token."""


@dataclass(frozen=True)
class Inputs:
    """A micro-batch on the device, cut to this rank's part of the sequence."""

    tokens_BT: Tensor
    places: SequenceInfo
    labels_BT: Tensor | None = None
    output: Output = "logits"
    """What the last stage returns; losses need labels."""
    terms: LossTerms | None = None
    """What losses have beside the cross-entropy."""
    last_B: Tensor | None = None
    """The one token of each row whose logits are asked for; None: logits of all tokens."""
    picked: Picked | None = None
    """The tokens whose losses or logits are asked for; None: all of them."""
    sentences: Picked | None = None
    """The first tokens of pairs of sentences, with whether they are out of order."""
    per_pair: Tensor | None = None
    """Masked tokens of the global batch for each of its pairs of sentences, fp32."""
    ahead: Ahead | None = None
    """What predictors of further tokens take, whose losses are then returned as well."""
    pairs: Pairs | None = None
    contrast: Contrast | None = None
    answered: Answered | None = None
    frozen: Callable[[], HiddenStates] | None = None
    """Gives what the objective's frozen model makes of these tokens; only on ranks of the last
    stage."""

    top: TopTokens | None = None
    """What a teacher that is not in memory said of these tokens, [B,T,K]; only on ranks of the last
    stage."""

    @property
    def count_B(self) -> Tensor:
        """Return the number that each row's sum of losses is divided by: its labels, its pairs, or
        its answers. Summed over the replicas, it is that of the whole row."""
        if self.answered is not None:
            return self.answered.real_BD.sum(1) * self.answered.share
        if (pairs := self.pairs or self.contrast) is not None:
            return pairs.real_BP.sum(1) * pairs.share
        assert self.labels_BT is not None
        return (self.labels_BT != IGNORE).sum(1)


class Stage(nn.Module):
    """Embed the tokens in the first stage, run the stage's layers, and compute the loss of every
    token in the last."""

    def __init__(self, model: Decoder, span: StageSpan):
        super().__init__()
        self.model, self.span = model, span

    def forward(self, x: Streams | None, inputs: Inputs) -> Streams:
        """Run the stage on `x` [B,T,D] of the stage before, None for the first. Returns [B,T,D] for
        the next stage, a tuple where the model has several streams of hidden states; the last
        returns `inputs.output`: losses [B,T], with `terms` [B,T,2], fp32 (0 where there is no
        label), and behind them, as further rows, those of each predictor `ahead`, or of pairs of
        `sentences`, whose logits stand behind those of picked tokens likewise; logits
        [B,T or 1,V/n], of picked tokens [1,M,V/n]; or hidden states [B,T,D], as the head takes them
        or final."""
        model = self.model
        if self.span.first:
            x = model.embed(inputs.tokens_BT, inputs.places)
        assert x is not None
        x = model.run_layers(x, inputs.places)
        if not self.span.last:
            return x
        # Of several streams (an encoder's states beside a decoder's), the head takes the last.
        x_BTD = last_of(x)
        if inputs.last_B is not None:
            # Generation: cut to [B, 1, D] before the head, whose logits are the largest tensor of
            # all.
            x_BTD = x_BTD[torch.arange(len(x_BTD), device=x_BTD.device), inputs.last_B][:, None]
        picked, pairs = inputs.picked, inputs.sentences
        told_1M2 = None if pairs is None else model.sentences(pairs.take(x_BTD))
        if picked is not None:
            x_BTD = picked.take(x_BTD)
        if inputs.output == "final_states":
            return model.final_states(x_BTD)
        states_BTD = model.finish(x_BTD)
        if inputs.output == "hidden_states":
            return states_BTD
        if inputs.output == "logits":
            logits = model.project(states_BTD)
            if told_1M2 is None:
                return logits
            return torch.cat((logits, F.pad(told_1M2, (0, logits.shape[2] - 2))), 1)
        if picked is not None:
            losses_BT = picked.spread(model.losses_of(states_BTD, picked.labels_1M))
            if told_1M2 is None or pairs is None:
                return losses_BT
            return torch.cat((losses_BT, pairs.spread(pair_losses(told_1M2, pairs.labels_1M))))
        assert inputs.labels_BT is not None
        if inputs.ahead is None:
            return model.losses_of(states_BTD, inputs.labels_BT, inputs.terms)
        # One call of the head for all predictions: engines count on one weight-gradient GEMM of it.
        states = model.predict_ahead(states_BTD, inputs.ahead.tokens_ABT, inputs.places)
        labels = torch.cat((inputs.labels_BT, *inputs.ahead.labels_ABT))
        return model.losses_of(torch.cat(states), labels, inputs.terms)


def pair_losses(logits_1M2: Tensor, labels_1M: Tensor) -> Tensor:
    """Return the cross-entropy of each pair of sentences, fp32 [1,M]; 0 where the label is
    `IGNORE`."""
    losses_M = F.cross_entropy(
        logits_1M2[0].float(), labels_1M[0], ignore_index=IGNORE, reduction="none"
    )
    return losses_M[None]


def cut(model: Decoder, span: StageSpan, at_both_ends: bool) -> None:
    """Remove from a model all that the stage of `span` does not need, in place. What is left keeps
    its names. `at_both_ends` says that the last stage uses the embedding's weight, too."""
    for number in list(model.layers):
        if int(number) not in span.layers:
            del model.layers[number]
    # Modules are set to None and not deleted: the model's methods of other stages are never called.
    dropped = [] if span.first else list(model.INPUT)
    if at_both_ends and span.last and "embedding" in dropped:
        dropped.remove("embedding")  # a tied head's weight goes by its name
    dropped += [] if span.last else model.OUTPUT
    for name in dropped:
        setattr(model, name, None)


def positions_of(document_BT: Tensor) -> Tensor:
    """Return each token's position in its own document: [B,T] int64, from numbers of documents that
    ascend along T."""
    index = torch.arange(document_BT.shape[1], device=document_BT.device).expand_as(document_BT)
    begins = torch.ones_like(document_BT, dtype=torch.bool)
    begins[:, 1:] = document_BT[:, 1:] != document_BT[:, :-1]
    # The running maximum of the places where documents begin is where this token's own does.
    return index - index.masked_fill(~begins, 0).cummax(1).values


def lengths_of(document_BT: Tensor) -> Tensor:
    """Return the length of each token's own document: [B,T,1], from numbers of documents that
    ascend along T from 0."""
    counts = torch.zeros_like(document_BT).scatter_add_(
        1, document_BT, torch.ones_like(document_BT)
    )
    return counts.gather(1, document_BT)[..., None]
