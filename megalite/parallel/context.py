"""Context parallelism: attention over a sequence that is cut over the ranks of an axis.

Every rank keeps its queries. Keys and values travel around the ring of ranks, each block while
attention to the one before it is computed (ring attention, Liu et al. 2023), and the results of the
blocks are merged by their log-sum-exp. In the backward pass the blocks travel again and their
gradients with them, home after a whole round.

Blocks in which no query attends to any key, because of documents or a window, travel on uncomputed.

The sequence is cut into twice as many chunks as there are ranks, and rank r takes chunks r and
2n-1-r, "zigzag" (Llama 3, Dubey et al. 2024). So all ranks have as much to do, and of another
rank's keys either all queries attend to exactly the first half, or exactly the second half of the
queries attends to all.

Letters in shapes: B batch, T tokens at hand, S keys at hand, H heads, G key/value heads, K head
size of queries and keys, V of values.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megalite.comm.collectives import Result, start_shift
from megalite.comm.mesh import Axis
from megalite.kernels.attention import AttentionKind, largest_of
from megalite.kernels.partial_attention import attend, attend_backward
from megalite.kernels.sinks import sinks_gradient, with_sinks
from megalite.models.layers import SequenceInfo


def zigzag(length: int, axis: Axis) -> Tensor:
    """Return the tokens of a sequence of `length` that this rank takes: [T] int64, ascending.

    Raises ValueError where the sequence cannot be cut into 2 · `axis.size` equal chunks."""
    if length % (2 * axis.size):
        raise ValueError(
            f"a sequence of {length} tokens cannot be cut into 2 × {axis.size} equal chunks"
        )
    return _zigzag_of(axis.rank, length, axis.size)


def _zigzag_of(rank: int, length: int, ranks: int) -> Tensor:
    """Return the tokens that `rank` of `ranks` takes of a sequence of `length`."""
    # With 2 ranks and chunks 0 1 2 3: rank 0 takes 0 and 3, rank 1 takes 1 and 2. Under a causal
    # mask chunk c attends to c + 1 chunks, so the two of each rank come to 2n + 1 in all.
    chunks = torch.arange(length).view(2 * ranks, -1)
    return torch.cat((chunks[rank], chunks[2 * ranks - 1 - rank]))


def zigzag_order(length: int, ranks: int) -> Tensor:
    """Return the tokens of a sequence of `length` that rank 0 takes, then those of rank 1, and so
    on: [length]."""
    return torch.cat([_zigzag_of(rank, length, ranks) for rank in range(ranks)])


def document_overlaps(document_BS: Tensor, axis: Axis) -> tuple[tuple[bool, bool], ...]:
    """Return `SequenceInfo.overlaps` of this rank: from the documents of whole sequences, on the
    host, which ascend."""
    ranks = axis.size
    # N = 2 · ranks chunks of C tokens, in the order of the sequence.
    chunks_BNC = document_BS.unflatten(1, (2 * ranks, -1))
    first_BN, last_BN = chunks_BNC[..., 0], chunks_BNC[..., -1]

    def goes_on(before: int, behind: int) -> bool:
        """Return whether a document of one chunk is in a later one, too; then it is in all between
        them."""
        return bool((last_BN[:, before] == first_BN[:, behind]).any())

    found = []
    for rank in range(ranks):
        # Rank r's chunks are r (in front) and 2n-1-r (at the back): so in front the lower rank's
        # comes first, at the back the higher rank's.
        low, high = sorted((rank, axis.rank))
        is_own = low == high
        found.append(
            (
                is_own or goes_on(low, high),
                is_own or goes_on(2 * ranks - 1 - high, 2 * ranks - 1 - low),
            )
        )
    return tuple(found)


class RingAttention:
    """Attend from this rank's tokens to those of all ranks of the axis, each of which holds the
    tokens that `zigzag` gives it: the strategy of attention under context parallelism. Who attends
    to whom follows from that; `places.index_T` is not read."""

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
        found = places.document_BT, self.axis, kind, places.overlaps
        return _RingAttention.apply(q_BTHK, k_BTGK, v_BTGV, sinks_H, *found)

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
        fp32 [H]; see `kernels.attention.largest_logits`. The keys travel the ring for it once
        more."""
        kind, q = kind.within(q_BTHK.shape[1] * self.axis.size), q_BTHK.transpose(1, 2)
        largest = torch.full((q.shape[1],), -torch.inf, device=q.device)
        # Values of size 0: only the keys travel.
        kv = _Message.of(k_BTGK, k_BTGK[..., :0])
        for block in _blocks(kv, places.document_BT, kind, self.axis, places.overlaps):
            if not block.has_any:
                continue
            attended = partial(_attended, block)
            found = largest_of(q[:, :, block.rows], block.k, attended, kind.scale_of(q.shape[-1]))
            largest = torch.maximum(largest, found)
        return largest


def _attended(block: _Block, rows: slice) -> tuple[slice, Tensor | None]:
    """Return the keys that a range of a block's queries attends to, and the mask for them, as
    `largest_of` asks."""
    # In the block of this rank's own keys, `rows` counts as the keys do: none behind the last
    # query.
    keys = slice(0, rows.stop if block.causal else block.k.shape[2])
    mask = None if block.mask is None else block.mask[:, :, rows, keys]
    if block.causal:
        ones = torch.ones(
            rows.stop - rows.start, keys.stop, dtype=torch.bool, device=block.k.device
        )
        before = ones.tril(rows.start)
        mask = before if mask is None else mask & before
    return keys, mask


class _RingAttention(Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_BTHK: Tensor,
        k_BTGK: Tensor,
        v_BTGV: Tensor,
        sinks_H: Tensor | None,
        document_BT: Tensor | None,
        axis: Axis,
        kind: AttentionKind,
        overlaps: tuple[tuple[bool, bool], ...] | None,
    ) -> Tensor:
        # SDPA's kernels take [B, H, T, K].
        q = q_BTHK.transpose(1, 2)
        for block in _blocks(_Message.of(k_BTGK, v_BTGV), document_BT, kind, axis, overlaps):
            if not block.has_any:
                continue
            out, lse = attend(
                q[:, :, block.rows], block.k, block.v, block.causal, block.mask, kind.scale
            )
            if block.step == 0:
                # Every token attends to itself, so that this lse is finite and no row of the merges
                # is empty. Kept in fp32 between blocks: rounded to bf16 at each merge, errors would
                # grow with the ranks.
                merged, merged_lse = out.to(lse.dtype), lse
            else:
                _merge(merged[:, :, block.rows], merged_lse[:, :, block.rows], out, lse)
        if sinks_H is not None:
            merged, merged_lse = with_sinks(merged, merged_lse, sinks_H)
        out_BTHV = merged.to(q.dtype).transpose(1, 2).contiguous()
        ctx.save_for_backward(q_BTHK, k_BTGK, v_BTGV, out_BTHV, merged_lse, document_BT, sinks_H)
        # Only this rank's keys and values are saved, and sent around once more in the backward
        # pass: to keep all blocks would take the memory that context parallelism is there to save.
        ctx.axis, ctx.kind, ctx.overlaps = axis, kind, overlaps
        return out_BTHV.flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q_BTHK, k_BTGK, v_BTGV, out_BTHV, lse, document_BT, sinks_H = ctx.saved_tensors
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
        for block in _blocks(kv, document_BT, ctx.kind, ctx.axis, ctx.overlaps):
            rows = block.rows
            # `out` and `lse` are those of the attention to all keys, so the block's probabilities
            # come out normalised over all blocks, and gradients of blocks simply add up.
            parts: list[Tensor] = []
            if block.has_any:
                dq, *parts = attend_backward(
                    grad[:, :, rows],
                    q[:, :, rows],
                    block.k,
                    block.v,
                    out[:, :, rows],
                    lse[:, :, rows],
                    block.causal,
                    block.mask,
                    ctx.kind.scale,
                )
                dq_BHTK[:, :, rows] += dq
            # Wait for the gradients of this block only here: they travelled while attend_backward
            # computed.
            if travelling is not None:
                dkv = dkv.with_data(travelling())
            # Add in place only once they have arrived, and send them on only after this: the shift
            # reads this very buffer.
            for whole_BTGK, part in zip(dkv.parts(), parts, strict=False):
                whole_BTGK[:, block.keys] += part.transpose(1, 2)
            travelling = start_shift(dkv.data, ctx.axis)
        assert travelling is not None
        grads = (dq_BHTK.transpose(1, 2), *dkv.with_data(travelling()).parts())
        # Of this rank's queries: the engine sums gradients over the ranks of the axis.
        grad_sinks = None if sinks_H is None else sinks_gradient(grad, out, lse, sinks_H)
        return *(x.to(q.dtype) for x in grads), grad_sinks, None, None, None, None


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


class _Block(NamedTuple):
    """Which of a rank's queries meet which keys of the block at hand."""

    step: int
    has_any: bool
    """False where no query attends to any key; then only `step` is of use, and nothing is to be
    computed."""
    rows: slice
    keys: slice
    causal: bool
    mask: Tensor | None
    """[B or 1,1,rows,keys] bool, true where query and key are in one document and one window."""
    k: Tensor
    v: Tensor


def _blocks(
    kv: _Message,
    document_BT: Tensor | None,
    kind: AttentionKind,
    axis: Axis,
    overlaps: tuple[tuple[bool, bool], ...] | None = None,
) -> Iterator[_Block]:
    """Yield the blocks of keys and values of all ranks, this rank's own first. The next block
    travels while the caller works on the one it was given."""
    half, window = kv.k_shape[1] // 2, kind.window
    # The documents of a block's tokens travel with it, to compare with those of this rank's
    # queries.
    at_hand = [kv.data] if document_BT is None else [kv.data, document_BT.contiguous()]
    for step in range(axis.size):
        # Before the block is handed out, so that it travels while the caller computes. Shifted by
        # one rank a step: in step s this rank has the keys of rank - s.
        arriving = [start_shift(x, axis) for x in at_hand] if step + 1 < axis.size else []
        source = (axis.rank - step) % axis.size
        # Zigzag: of a higher rank's keys only our second half of the queries sees any, and it sees
        # all; of a lower rank's keys all our queries see the first half and none the second. Only
        # our own block needs a causal mask. Where attention is not causal, all see all.
        rows = slice(half if kind.causal and source > axis.rank else 0, None)
        keys = slice(0, half if kind.causal and source < axis.rank else None)
        has_any = _has_any(
            kind, axis.rank, source, half, None if overlaps is None else overlaps[source]
        )
        mask = None
        if document_BT is not None and has_any:
            # [B, 1, rows, keys]
            mask = document_BT[:, None, rows, None] == at_hand[1][:, None, None, keys]
        if window is not None and has_any:
            # abs, as both directions count where attention is not causal; where it is, `causal` and
            # the choice of `rows` and `keys` have left out the keys behind a query.
            near = _distances(kv, axis, source)[rows, keys].abs() < window
            mask = near[None, None] if mask is None else mask & near
        k, v = (x[:, keys].transpose(1, 2) for x in kv.with_data(at_hand[0]).parts())
        yield _Block(step, has_any, rows, keys, kind.causal and step == 0, mask, k, v)
        at_hand = [arrived() for arrived in arriving]


def _has_any(
    kind: AttentionKind, rank: int, source: int, half: int, overlap: tuple[bool, bool] | None
) -> bool:
    """Return whether any query of a rank may attend to a key of the rank `source`, by what is known
    on the host. `half` is the length of a chunk, `overlap` the entry of `source` in
    `SequenceInfo.overlaps`."""
    # Chunks are as far apart in the front half of the sequence as in the back half.
    # Between the last token of one chunk and the first of the next but one lies a chunk: half + 1.
    if kind.window is not None and (abs(rank - source) - 1) * half + 1 >= kind.window:
        return False
    if overlap is None:
        return True
    if not kind.causal or source == rank:
        return any(overlap)
    # Keys of a lower rank are seen in front, and those of a higher one at the back.
    # (in front, at the back), see `document_overlaps`; a bool is the index.
    return overlap[source > rank]


def _distances(kv: _Message, axis: Axis, source: int) -> Tensor:
    """Return how far back in the sequence rank `source`'s keys lie from this rank's queries:
    [T,T]."""
    length = kv.k_shape[1] * axis.size
    with kv.data.device:
        return zigzag(length, axis)[:, None] - _zigzag_of(source, length, axis.size)


def _merge(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> None:
    """Merge in place the attention of the same queries to `more` keys. Each result weighs as much
    as the sum of exponentials behind it; a difference of logarithms gives the share, and is safe
    because `lse` is finite."""
    # e^m / (e^l + e^m) = sigmoid(m - l). An empty row has m = -inf and weighs 0.
    out.lerp_(more.to(out.dtype), torch.sigmoid(more_lse - lse)[..., None])
    lse.copy_(torch.logaddexp(lse, more_lse))
