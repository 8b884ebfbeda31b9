"""Context parallelism of attention whose scores have a bias, or whose keys are another sequence's:
a rank's queries attend to the keys and values of all ranks, which it gathers (Llama 3, Dubey et al.
2024).

A ring hands fused kernels one block of keys after another, and these give no gradient of a bias.
Here attention is that of one process, with some of its queries: biases, documents and dropout are
for whole rows of scores, so that a rank writes out its share of them, [B,H,T,S].

Letters in shapes: B batch, T tokens at hand, S tokens of the whole sequence of keys, H heads, G
key/value heads, K and V sizes of heads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megalite.comm.collectives import all_gather, reduce_scatter
from megalite.comm.mesh import Axis
from megalite.kernels.attention import attention, eager_attention
from megalite.kernels.attention_kinds import AttentionKind
from megalite.models.context_cut import take
from megalite.models.layers import SequenceInfo

SEQUENCE = 1


@dataclass(frozen=True)
class GatheredAttention:
    """Attend from this rank's tokens to those of all ranks of the axis, whose keys and values it
    gathers: `CoreAttention.gathering` under context parallelism."""

    axis: Axis

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
        """Attend with the tokens of this rank: [B,T,H·V]. Keys and values are this rank's part of
        them, at `source`, or at `places` where that is None. `bias` [1,H,T,S] has the keys of the
        whole sequence in its order; `drop` is the dropout of probabilities. Raises ValueError for a
        window."""
        if kind.window is not None:
            raise ValueError("gathered attention knows no window")
        keys = places if source is None else source
        if keys.cut is None:
            raise ValueError(
                "gathered attention needs to know how sequences are cut over the ranks"
            )
        order_BS = keys.cut.device_RBT.transpose(0, 1).flatten(1)
        k, v = (_GatherTokens.apply(x, self.axis, order_BS) for x in (k_BSGK, v_BSGV))
        if kind.causal:
            ahead_BTS = keys.index_S > places.index_BT[..., None]
            bias = q_BTHK.new_zeros(1, 1, *ahead_BTS.shape[1:]) if bias is None else bias
            bias = bias.masked_fill(ahead_BTS[:, None], -torch.inf)
        found = q_BTHK, k, v, places.document_BT, replace(kind, causal=False)
        documents_BS = None if places.document_BT is None else keys.whole_document_BT
        if drop is not None:
            return eager_attention(*found, documents_BS, bias, drop)
        return attention(*found, documents_BS, bias)


class _GatherTokens(Function):
    """[B,T,…] → [B,S,…], every rank's tokens in the order of the sequence. `order_BS`, B or 1 rows,
    says where in the sequence each belongs, as they come rank by rank."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, order_BS: Tensor) -> Tensor:
        ctx.axis, ctx.order_BS = axis, order_BS
        gathered = all_gather(x.contiguous(), axis, SEQUENCE)
        out = torch.empty_like(gathered)
        out[torch.arange(len(x), device=x.device)[:, None], order_BS] = gathered
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        # In fp32: every rank's queries add a term.
        exact = torch.promote_types(grad.dtype, torch.float32)
        parts = take(grad, ctx.order_BS).to(exact)
        return reduce_scatter(parts, ctx.axis, SEQUENCE).to(grad.dtype), None, None
