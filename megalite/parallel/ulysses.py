"""Ulysses attention (Jacobs et al. 2023): context parallelism by heads.

Between attention layers every rank has some tokens of all heads, those that `ContextCut` gives it; for
attention it has all tokens of some heads. One all-to-all before attention changes the first into
the second, another one behind it changes back, and each is the backward pass of the other.
Attention itself is that of one process.

Of the keys and values, a rank sends and receives its own share only, where a ring passes on those
of all ranks; but nothing is computed beside the messages, and the ranks must divide the key/value
heads. All ranks have as much to do, whatever documents are packed.

Letters in shapes: B batch, T tokens at hand, S tokens of the whole sequence, H heads, G key/value
heads, K and V sizes of heads, R ranks, F features of a token that go to one rank."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megalite.comm.collectives import start_all_to_all
from megalite.comm.mesh import Axis
from megalite.kernels.attention import attention, self_attention
from megalite.kernels.attention_kinds import AttentionKind
from megalite.kernels.largest_logits import largest_logits
from megalite.kernels.sinks import attention_with_sinks, self_attention_with_sinks
from megalite.models.layers import SequenceInfo


class UlyssesAttention:
    """Attend within this rank's heads to the tokens of all ranks of the axis: a strategy of
    attention under context parallelism. Raises ValueError for heads that the ranks do not
    divide."""

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
        this strategy refuses dropout."""
        found, heads, groups = self._whole(q_BTHK, k_BTGK, v_BTGV)
        document_BS = _documents(places)
        # Heads of one size lie as a fused projection's output does, q then k then v: the fast path.
        if sinks_H is not None:
            sinks_H = sinks_H.chunk(self.axis.size)[self.axis.rank]
        if k_BTGK.shape == v_BTGV.shape and sinks_H is not None:
            qkv_BSNK = found.unflatten(2, (-1, k_BTGK.shape[-1]))
            out = self_attention_with_sinks(qkv_BSNK, heads, groups, sinks_H, document_BS, kind)
        elif k_BTGK.shape == v_BTGV.shape:
            out = self_attention(
                found.unflatten(2, (-1, k_BTGK.shape[-1])), heads, groups, document_BS, kind
            )
        else:
            sizes = (heads * q_BTHK.shape[-1], groups * k_BTGK.shape[-1], groups * v_BTGV.shape[-1])
            split = zip(found.split(sizes, 2), (heads, groups, groups), strict=True)
            q, k, v = (x.unflatten(2, (number, -1)) for x, number in split)
            if sinks_H is None:
                out = attention(q, k, v, document_BS, kind)
            else:
                out = attention_with_sinks(q, k, v, sinks_H, document_BS, kind)
        return _Exchange.apply(out, self.axis, False).flatten(2)

    @torch.no_grad()
    def largest_logits(
        self,
        q_BTHK: Tensor,
        k_BTGK: Tensor,
        places: SequenceInfo,
        kind: AttentionKind,
        source: SequenceInfo | None = None,
    ) -> Tensor:
        """Return the largest logit of each of this rank's heads, fp32 [H], and -inf for those of
        other ranks; see `kernels.largest_logits`. Queries and keys travel for it once
        more."""
        found, heads, groups = self._whole(q_BTHK, k_BTGK)
        q, k = found.unflatten(2, (-1, k_BTGK.shape[-1])).split((heads, groups), 2)
        largest = torch.full((q_BTHK.shape[2],), -torch.inf, device=q.device)
        largest[self.axis.rank * heads :][:heads] = largest_logits(q, k, _documents(places), kind)
        return largest

    def _whole(self, *parts_BTNK: Tensor) -> tuple[Tensor, int, int]:
        """Return all tokens of this rank's heads of the parts, beside each other: [B,S,F]; and its
        numbers of queries' and of keys' heads."""
        ranks = self.axis.size
        if any(part.shape[2] % ranks for part in parts_BTNK):
            numbers = " and ".join(str(part.shape[2]) for part in parts_BTNK[:2])
            raise ValueError(
                f"Ulysses attention: {numbers} heads of queries and keys do not divide by {ranks} ranks"
            )
        # [B, T, R, F]: of q, k and v the heads that go to rank r, side by side, so that one message
        # has all three. Query heads go with the key heads they share, since both are cut into R
        # equal runs.
        features = torch.cat([part.unflatten(2, (ranks, -1)).flatten(3) for part in parts_BTNK], 3)
        heads, groups = (part.shape[2] // ranks for part in parts_BTNK[:2])
        return _Exchange.apply(features, self.axis, True), heads, groups


def _documents(places: SequenceInfo) -> Tensor | None:
    """Return the documents of the whole sequence, [B,S]."""
    if places.document_BT is not None and places.whole_document_BT is None:
        raise ValueError(
            "Ulysses attention needs the documents of the whole sequence, beside those of the part here"
        )
    return places.whole_document_BT


class _Exchange(Function):
    """[B,T,R,F] → [B,S,F] where `to_heads`, else back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, to_heads: bool) -> Tensor:
        ctx.axis, ctx.to_heads = axis, to_heads
        return (_to_heads if to_heads else _to_tokens)(x, axis)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return (_to_tokens if ctx.to_heads else _to_heads)(grad, ctx.axis), None, None


def _to_heads(x_BTRF: Tensor, axis: Axis) -> Tensor:
    """Send every rank its features of this rank's tokens; return this rank's features of all
    tokens, [B,S,F]."""
    received_RBTF = _all_to_all(x_BTRF.permute(2, 0, 1, 3).contiguous(), axis)
    out = x_BTRF.new_empty(x_BTRF.shape[0], x_BTRF.shape[1] * axis.size, x_BTRF.shape[3])
    with x_BTRF.device:
        order = _order(out.shape[1], axis.size)
    # Tokens come rank by rank; `order` says where in the sequence each belongs.
    out[:, order] = received_RBTF.transpose(0, 1).flatten(1, 2)
    return out


def _to_tokens(x_BSF: Tensor, axis: Axis) -> Tensor:
    """Send every rank its tokens of this rank's features; return this rank's tokens of all
    features, [B,T,R,F]."""
    with x_BSF.device:
        order = _order(x_BSF.shape[1], axis.size)
    parts_BRTF = x_BSF[:, order].unflatten(1, (axis.size, -1))
    return _all_to_all(parts_BRTF.transpose(0, 1).contiguous(), axis).permute(1, 2, 0, 3)


def _order(length: int, ranks: int) -> Tensor:
    """Return the tokens of a sequence that rank 0 has, then those of rank 1, and so on: [length]. A
    rank has one piece from the front and one from the back, as `ContextCut` says."""
    pieces_NT = torch.arange(length).view(2 * ranks, -1)
    return torch.stack((pieces_NT, pieces_NT.flip(0)), 1)[:ranks].flatten()


def _all_to_all(x: Tensor, axis: Axis) -> Tensor:
    """Send x[r] to each rank r; return what they send, one behind another."""
    received = torch.empty_like(x)
    wait = start_all_to_all(list(x.flatten(1)), list(received.flatten(1)), axis)
    received[axis.rank] = x[axis.rank]
    wait()
    return received
