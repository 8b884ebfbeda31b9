"""What an objective may ask of the last pipeline stage beside each token's loss: logits in
vocabulary shards, or hidden states with the head that makes logits of them. Every tensor rank of
the stage has the same tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from megalite.comm.collectives import all_gather, all_reduce
from megalite.comm.mesh import Axis
from megalite.models.layers import IGNORE, Decoder
from megalite.parallel.stage import Output
from megalite.parallel.tensor import SEQUENCE, ChunkedHead, enter, leave, vocab_columns


@dataclass(frozen=True)
class VocabShards:
    """Logits [B,T,V/n], of which each tensor rank holds some columns of the vocabulary.

    The methods that return [B,T] give every tensor rank the same, in fp32, with the gradient of
    this rank's columns: an objective computes the same loss on each rank, as from whole logits.
    What is alike on all ranks goes back to columns by `spread`. They are collectives."""

    padded_BTV: Tensor
    """Logits of this rank's columns, as many on every rank: the last may be padding."""
    axis: Axis
    vocab_size: int
    """Columns of the whole vocabulary, without padding."""

    @property
    def columns(self) -> slice:
        """Return which columns of the vocabulary `logits_BTV` has; on the last ranks it may be
        none."""
        first, count = vocab_columns(self.padded_BTV.shape[-1], self.axis, self.vocab_size)
        return slice(first, first + count)

    @cached_property
    def logits_BTV(self) -> Tensor:
        """Return the logits of this rank's columns in fp32, without padding."""
        columns = self.columns
        return self.padded_BTV[..., : columns.stop - columns.start].float()

    def sum(self, x_BTV: Tensor) -> Tensor:
        """Sum over the whole vocabulary what each rank has computed of its columns, [B,T,V/n] fp32:
        [B,T]."""
        # All-reduce forward, identity backward: each rank goes on with the same sum, and each has
        # the whole gradient of it for its own columns.
        return leave(x_BTV.sum(-1), self.axis, sequence=False)

    def spread(self, x_BT: Tensor) -> Tensor:
        """Return [B,T,1] for computing with this rank's columns, from what every rank has alike,
        [B,T]. Its gradient is summed over the ranks, each of which has that of its own columns."""
        return enter(x_BT[..., None], self.axis, sequence=False)

    @cached_property
    def log_sum_exp_BT(self) -> Tensor:
        """Return the log-sum-exp over the whole vocabulary, [B,T]: the normaliser whose square a
        z-loss keeps small."""
        lse = self.logits_BTV.logsumexp(-1)
        if self.axis.size == 1:
            return lse
        # Shifted by the largest, no exponential overflows.
        # Detached: a shift that is added and subtracted has no gradient.
        largest = all_reduce(lse.detach().clone(), self.axis, dist.ReduceOp.MAX)
        return largest + self.sum((lse - largest).exp()[..., None]).log()

    @property
    def largest_BT(self) -> Tensor:
        """Return the largest logit of each token, [B,T]; without a gradient."""
        logits_BTV = self.logits_BTV.detach()
        # A rank of padding alone has no columns.
        none = logits_BTV.new_full((*logits_BTV.shape[:2], 1), -torch.inf)
        return all_reduce(torch.cat((logits_BTV, none), 2).amax(2), self.axis, dist.ReduceOp.MAX)

    def log_softmax(self) -> Tensor:
        """Return the log-probabilities of this rank's columns, [B,T,V/n] fp32."""
        return self.logits_BTV - self.spread(self.log_sum_exp_BT)

    def target(self, labels_BT: Tensor) -> Tensor:
        """Return the logit of each label, [B,T]; 0 where it is `IGNORE`."""
        columns, logits_BTV = self.columns, self.logits_BTV
        # One rank has a label's column; the others add 0. IGNORE is negative, so it is nowhere.
        is_here = (labels_BT >= columns.start) & (labels_BT < columns.stop)
        # An empty sum, [B, T] zeros, that still takes part in the all-reduce and in autograd.
        if columns.start == columns.stop:  # a rank of padding alone
            return self.sum(logits_BTV)
        index_BT1 = (labels_BT - columns.start).masked_fill(~is_here, 0)[..., None]
        return self.sum(logits_BTV.gather(2, index_BT1).masked_fill(~is_here[..., None], 0.0))

    def cross_entropy(self, labels_BT: Tensor) -> Tensor:
        """Return each token's cross-entropy, [B,T]; 0 where the label is `IGNORE`."""
        return (self.log_sum_exp_BT - self.target(labels_BT)).masked_fill(labels_BT == IGNORE, 0.0)

    @torch.no_grad()
    def whole(self) -> Tensor:
        """Return the logits of the whole vocabulary, [B,T,V] fp32, on every tensor rank; without a
        gradient."""
        return all_gather(self.padded_BTV.float(), self.axis, dim=2)[..., : self.vocab_size]


class HiddenStates:
    """Hidden states [B,T,D] behind the last norm, whole on every tensor rank, with the head that
    takes them."""

    def __init__(
        self,
        states_BTD: Tensor,
        head: Callable[[Tensor], VocabShards],
        chunked: ChunkedHead | None = None,
    ):
        """Take hidden states with their `head`; under train.loss_chunk it is `chunked`, for an
        objective that takes a few tokens at a time."""
        self.states_BTD, self._head, self.chunked = states_BTD, head, chunked
        self._is_used = False

    def head(self, x_BTD: Tensor) -> VocabShards:
        """Return the logits of `x`: of these hidden states, or of others of their shape. Raises
        RuntimeError when asked again: engines count on one weight-gradient GEMM of the head in a
        micro-batch."""
        if self._is_used:
            raise RuntimeError("an objective can ask for the head's logits once in a micro-batch")
        self._is_used = True
        return self._head(x_BTD)


class _GatherSequence(Function):
    """All-gather along the sequence in the forward pass, this rank's slice in the backward pass:
    every rank computes the same of the result, and so has the same gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return all_gather(x, axis, SEQUENCE)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.chunk(ctx.axis.size, SEQUENCE)[ctx.axis.rank], None


def gather_sequence(x: Tensor, axis: Axis) -> Tensor:
    """Return a sequence from the slices of the tensor ranks, of each of which dimension 1 is a part;
    what is computed of it must be alike on all."""
    found: Tensor = _GatherSequence.apply(x, axis)
    return found


class _CutSequence(Function):
    """This rank's slice of the sequence in the forward pass, all-gather in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.chunk(axis.size, SEQUENCE)[axis.rank].contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_gather(grad.contiguous(), ctx.axis, SEQUENCE), None


@dataclass(frozen=True)
class LastStage:
    """Knows how to read what the last stage returns."""

    model: Decoder
    tensor: Axis
    sequence: bool
    """Sequence parallelism is on: the stage returns this rank's slice of the hidden states."""
    vocab_size: int

    def read(self, out: Tensor, output: Output) -> Tensor | VocabShards | HiddenStates:
        """Return what the stage returned in the form in which an objective takes it."""
        if output == "losses":
            return out
        if output == "logits":
            return VocabShards(out, self.tensor, self.vocab_size)
        cut = self.sequence and self.tensor.size > 1
        if output == "final_states":
            return gather_sequence(out, self.tensor) if cut else out

        def head(x_BTD: Tensor) -> VocabShards:
            # The head is column-parallel and gathers the sequence itself.
            x = _CutSequence.apply(x_BTD, self.tensor) if cut else x_BTD
            return VocabShards(self.model.project(x), self.tensor, self.vocab_size)

        # Not `enter`, whose backward pass sums: an objective computes alike on all tensor ranks,
        # and a sum would count its gradient n times.
        chunked = self.model.head if isinstance(self.model.head, ChunkedHead) else None
        return HiddenStates(gather_sequence(out, self.tensor) if cut else out, head, chunked)
