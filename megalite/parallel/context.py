"""Context parallelism: attention over a sequence that is cut over the ranks of an axis.

Every rank keeps its queries. Keys and values travel around the ring of ranks, each block while
attention to the one before it is computed (ring attention, Liu et al. 2023), and the results of the
blocks are merged by their log-sum-exp. In the backward pass the blocks travel again and their
gradients with them, home after a whole round.

Which rank has which tokens, and which of its queries meet which keys, says `ContextCut`. Only what
meets is computed: document by document where several are packed, and near the diagonal where there
is a window.

Letters in shapes: B batch, T tokens at hand, S keys at hand, H heads, G key/value heads, K head
size of queries and keys, V of values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megalite.comm.collectives import Result, start_shift
from megalite.comm.mesh import Axis
from megalite.kernels.attention_kinds import AttentionKind
from megalite.kernels.largest_logits import largest_of
from megalite.kernels.partial_attention import attend, attend_backward
from megalite.kernels.sinks import sinks_gradient, with_sinks
from megalite.models.context_cut import Block, ContextCut, take
from megalite.models.layers import SequenceInfo, Source

Slices = tuple[slice, slice, slice]


def part_of_source(source: Source, axis: Axis) -> Source:
    """Return this rank's part of what an encoder reads, from all of it."""
    if axis.size == 1:
        return source
    places, length = source.places, source.tokens_BS.shape[1]
    cut = ContextCut.of(length, axis.size, device=source.tokens_BS.device)
    index, document = cut.device_RBT[axis.rank], places.document_BT
    part = replace(
        places,
        index_BT=index,
        position_BT=take(places.position_BT, index),
        document_BT=None if document is None else take(document, index),
        whole_document_BT=document,
        cut=cut,
    )
    return Source(take(source.tokens_BS, index), part)


class RingAttention:
    """Attend from this rank's tokens to those of all ranks of the axis, each of which holds the
    tokens that `places.cut` gives it: the strategy of attention under context parallelism. Who
    attends to whom follows from that."""

    def __init__(self, axis: Axis):
        self.axis = axis

    def attend(
        self,
        q_BTHK: Tensor,
        k_BTGK: Tensor,
        v_BTGV: Tensor,
        places: SequenceInfo,
        kind: AttentionKind,
        sinks_H: Tensor | None = None,
    ) -> Tensor:
        """Attend with the tokens of this rank to those of all ranks: [B,T,H·V]. The rule that sets
        this strategy refuses soft-capped scores and dropout."""
        kind = kind.within(q_BTHK.shape[1] * self.axis.size)
        cut = _cut_of(places, self.axis)
        return _RingAttention.apply(q_BTHK, k_BTGK, v_BTGV, sinks_H, cut, self.axis, kind)

    @torch.no_grad()
    def largest_logits(
        self,
        q_BTHK: Tensor,
        k_BTGK: Tensor,
        places: SequenceInfo,
        kind: AttentionKind,
        source: SequenceInfo | None = None,
    ) -> Tensor:
        """Return the largest logit of each head over this rank's queries and the keys of all ranks,
        fp32 [H]; see `kernels.largest_logits`. The keys travel the ring for it once
        more."""
        kind, q = kind.within(q_BTHK.shape[1] * self.axis.size), q_BTHK.transpose(1, 2)
        cut, rank = _cut_of(places, self.axis), self.axis.rank
        largest = torch.full((q.shape[1],), -torch.inf, device=q.device)
        # Values of size 0: only the keys travel.
        for _, number, (k, _) in _arriving(_Message.of(k_BTGK, k_BTGK[..., :0]), self.axis):
            for block in cut.blocks(rank, number, kind):
                mask = cut.mask(block, rank, number, kind)
                attended = partial(_attended, block, mask, k.device)
                found = largest_of(
                    q[block.batch, :, block.rows],
                    k[block.batch, :, block.keys],
                    attended,
                    kind.scale_of(q.shape[-1]),
                )
                largest = torch.maximum(largest, found)
        return largest


def _cut_of(places: SequenceInfo, axis: Axis) -> ContextCut:
    """Return how the sequences at hand are cut: without documents there is only one way."""
    if places.cut is not None:
        return places.cut
    if places.document_BT is not None and axis.size > 1:
        raise ValueError("ring attention needs to know how documents are cut over the ranks")
    length, own = places.index_BT.shape[1] * axis.size, places.document_BT
    return ContextCut.of(length, axis.size, own, device=places.index_BT.device)


def _attended(
    block: Block, mask: Tensor | None, device: torch.device, rows: slice
) -> tuple[slice, Tensor | None]:
    """Return the keys of a block that a range of its queries attends to, and the mask for them, as
    `largest_of` asks."""
    if not block.causal:
        return slice(None), None if mask is None else mask[:, :, rows]
    # The queries are the keys' own tokens: none behind the last query.
    ones = torch.ones(rows.stop - rows.start, rows.stop, dtype=torch.bool, device=device)
    before = ones.tril(rows.start)
    return slice(rows.stop), before


class _RingAttention(Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_BTHK: Tensor,
        k_BTGK: Tensor,
        v_BTGV: Tensor,
        sinks_H: Tensor | None,
        cut: ContextCut,
        axis: Axis,
        kind: AttentionKind,
    ) -> Tensor:
        # SDPA's kernels take [B, H, T, K].
        q, rank = q_BTHK.transpose(1, 2), axis.rank
        # Kept in fp32 between blocks: rounded to bf16 at each merge, errors would grow with the
        # ranks.
        exact = torch.float64 if q.dtype == torch.float64 else torch.float32
        merged = q.new_empty((*q.shape[:3], v_BTGV.shape[-1]), dtype=exact)
        merged_lse = q.new_empty(q.shape[:3], dtype=exact)
        for _, number, (k, v) in _arriving(_Message.of(k_BTGK, v_BTGV), axis):
            for block in cut.blocks(rank, number, kind):
                here, there = _sliced(block.batch, block.rows), _sliced(block.batch, block.keys)
                mask = cut.mask(block, rank, number, kind)
                out, lse = attend(q[here], k[there], v[there], block.causal, mask, kind.scale)
                if block.first:
                    # Every token attends to itself, so that this lse is finite and no row of the
                    # merges is empty.
                    merged[here], merged_lse[here] = out, lse
                else:
                    _merge(merged[here], merged_lse[here], out, lse)
        if sinks_H is not None:
            merged, merged_lse = with_sinks(merged, merged_lse, sinks_H)
        out_BTHV = merged.to(q.dtype).transpose(1, 2).contiguous()
        ctx.save_for_backward(q_BTHK, k_BTGK, v_BTGV, out_BTHV, merged_lse, sinks_H)
        # Only this rank's keys and values are saved, and sent around once more in the backward
        # pass: to keep all blocks would take the memory that context parallelism is there to save.
        ctx.axis, ctx.kind, ctx.cut = axis, kind, cut
        return out_BTHV.flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q_BTHK, k_BTGK, v_BTGV, out_BTHV, lse, sinks_H = ctx.saved_tensors
        axis, kind, cut = ctx.axis, ctx.kind, ctx.cut
        # GPU kernels need a last stride of 1; the gradient of a sum comes expanded, with stride 0
        grad_BTHV = grad.contiguous().view_as(out_BTHV)
        q, out, grad = (x.transpose(1, 2) for x in (q_BTHK, out_BTHV, grad_BTHV))
        # Summed in fp32 (fp64 for fp64): each gets a term from every rank's block.
        dq_BHTK = torch.zeros_like(q, dtype=lse.dtype)
        kv = _Message.of(k_BTGK, v_BTGV)
        dkv = kv.with_data(torch.zeros_like(kv.data, dtype=lse.dtype))
        # dK and dV follow their keys and values around the ring, one shift a block. After as many
        # shifts as there are ranks they are back at the rank that owns them, with every rank's
        # share added.
        travelling: Result | None = None
        for _, number, (k, v) in _arriving(kv, axis):
            parts: list[tuple[Slices, Tensor, Tensor]] = []
            for block in cut.blocks(axis.rank, number, kind):
                here, there = _sliced(block.batch, block.rows), _sliced(block.batch, block.keys)
                mask = cut.mask(block, axis.rank, number, kind)
                # `out` and `lse` are those of the attention to all keys, so the block's
                # probabilities come out normalised over all blocks, and gradients of blocks simply
                # add up.
                dq, dk, dv = attend_backward(
                    grad[here],
                    q[here],
                    k[there],
                    v[there],
                    out[here],
                    lse[here],
                    block.causal,
                    mask,
                    kind.scale,
                )
                dq_BHTK[here] += dq
                parts.append((there, dk, dv))
            # Wait for the gradients of these keys only here: they travelled while attend_backward
            # computed.
            if travelling is not None:
                dkv = dkv.with_data(travelling())
            # Add in place only once they have arrived, and send them on only after this: the shift
            # reads this very buffer.
            sums = [whole_BTGK.transpose(1, 2) for whole_BTGK in dkv.parts()]
            for place, *some in parts:
                for whole, part in zip(sums, some, strict=True):
                    whole[place] += part
            travelling = start_shift(dkv.data, axis)
        assert travelling is not None
        grads = (dq_BHTK.transpose(1, 2), *dkv.with_data(travelling()).parts())
        # Of this rank's queries: the engine sums gradients over the ranks of the axis.
        grad_sinks = None if sinks_H is None else sinks_gradient(grad, out, lse, sinks_H)
        return *(x.to(q.dtype) for x in grads), grad_sinks, None, None, None


def _sliced(batch: slice, tokens: slice) -> Slices:
    """Return the index of some tokens in [B,H,T,K]."""
    return batch, slice(None), tokens


class _Message(NamedTuple):
    """Keys and values as one message, which may have heads of different sizes."""

    data: Tensor
    """The numbers of both, one behind the other."""
    k_shape: torch.Size
    v_shape: torch.Size

    @classmethod
    def of(cls, k: Tensor, v: Tensor) -> _Message:
        return cls(torch.cat((k.flatten(), v.flatten())), k.shape, v.shape)

    def with_data(self, data: Tensor) -> _Message:
        """Return a message of the same shapes that has arrived."""
        return self._replace(data=data)

    def parts(self) -> tuple[Tensor, Tensor]:
        """Return keys and values as views of the message."""
        k, v = self.data.split((self.k_shape.numel(), self.v_shape.numel()))
        return k.view(self.k_shape), v.view(self.v_shape)


def _arriving(kv: _Message, axis: Axis) -> Iterator[tuple[int, int, tuple[Tensor, Tensor]]]:
    """Yield for every rank of the ring, this one first, the number of the step, the rank, and its
    keys [B,G,S,K] and values [B,G,S,V]. The next ones travel while the caller works on these."""
    at_hand = kv.data
    for step in range(axis.size):
        # Before these are handed out, so that they travel while the caller computes. Shifted by one
        # rank a step: in step s this rank has the keys of rank - s.
        arriving = start_shift(at_hand, axis) if step + 1 < axis.size else None
        k, v = (x.transpose(1, 2) for x in kv.with_data(at_hand).parts())
        yield step, (axis.rank - step) % axis.size, (k, v)
        if arriving is not None:
            at_hand = arriving()


def _merge(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> None:
    """Merge in place the attention of the same queries to `more` keys. Each result weighs as much
    as the sum of exponentials behind it; a difference of logarithms gives the share, and is safe
    because `lse` is finite."""
    # e^m / (e^l + e^m) = sigmoid(m - l). An empty row has m = -inf and weighs 0.
    out.lerp_(more.to(out.dtype), torch.sigmoid(more_lse - lse)[..., None])
    lse.copy_(torch.logaddexp(lse, more_lse))
