"""A mixture of experts on several ranks, which share the experts, or the inner features of each, or
both.

Expert-tensor ranks hold some inner features of every expert, so that experts are cut as a dense MLP
is. Tokens enter their region together with the weights of their experts, whose gradient is partial,
too.

Expert ranks hold some of the experts. Rows of tokens travel to the ranks of their experts and back
(all-to-all: how many, the rows, and their results). What an expert rank computes is no partial sum,
and its gradients are whole.

Each rank routes the tokens that it has between blocks (its slice of the sequence under sequence
parallelism)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.autograd import Function

from megalite.comm.collectives import all_gather, start_all_to_all
from megalite.comm.mesh import Axis, Fold
from megalite.kernels.experts import (
    GroupedWgradCallback,
    Groups,
    RowCounts,
    add_biases,
    count_rows,
    grouped_linear,
    permute,
    sort_by_expert,
    unpermute,
)
from megalite.kernels.linear import WeightGradStore
from megalite.models.experts import Experts, GroupedLinear
from megalite.parallel.tensor import SEQUENCE, enter, leave


class ParallelGroupedLinear(GroupedLinear):
    """Hold this rank's part of a stack of matrices.

    An engine that takes weight-gradient GEMMs sets `wgrad_callback`; `later` defers them (see
    `ParallelLinear`)."""

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        tensor: Axis,
        later: WeightGradStore | None,
    ):
        """`tensor` are the ranks that share each matrix, and the features of its bias. Where these
        are of an output that is summed over the ranks, each adds its own."""
        nn.Module.__init__(self)
        self.weight, self.bias, self.tensor, self.later = weight, bias, tensor, later
        self.wgrad_callback: GroupedWgradCallback | None = None

    def forward(self, x: Tensor, groups: Groups, gather: bool = False) -> Tensor:
        out_NO = grouped_linear(x, self.weight, groups, gather, self.wgrad_callback, self.later)
        if self.bias is None:
            return out_NO
        first = (
            0 if self.bias.shape[1] == out_NO.shape[1] else self.tensor.rank * self.bias.shape[1]
        )
        return add_biases(out_NO, self.bias, groups.counts, first)


class ParallelExperts(Experts):
    """Hold some of the experts, or some inner features of each, or both."""

    def __init__(self, experts: Experts, fold: Fold, own_tokens: bool):
        """Take the place of `experts`, shared as `fold` says. `own_tokens`: each rank has tokens of
        its own between blocks, and not those of its tensor ranks."""
        nn.Module.__init__(self)
        self.gate_up, self.down, self.gate = experts.gate_up, experts.down, experts.gate
        self.fold, self.own_tokens = fold, own_tokens

    def forward(
        self,
        x_BTD: Tensor,
        weight_BTK: Tensor,
        index_BTK: Tensor,
        beside: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        tensor, own_tokens = self.fold.tensor, self.own_tokens
        # Expert-tensor ranks each hold a slice of every expert's inner features, so all of them
        # need all tokens: `enter` gathers hidden states and weights, and the choice of experts must
        # come along.
        if own_tokens:
            index_BTK = all_gather(index_BTK, tensor, SEQUENCE)
        x_BTD, weight_BTK = (enter(part, tensor, own_tokens) for part in (x_BTD, weight_BTK))
        # Inside, as on one device: `gate_up` and `down` have this rank's features, `leave` sums the
        # parts.
        if self.fold.expert.size == 1:
            out_BTD, found = super().forward(x_BTD, weight_BTK, index_BTK), beside and beside()
        else:
            out_BTD, found = self._dispatch(x_BTD, weight_BTK, index_BTK, beside)
        out_BTD = leave(out_BTD, tensor, own_tokens)
        return out_BTD if found is None else out_BTD + found

    def _dispatch(
        self,
        x_BTD: Tensor,
        weight_BTK: Tensor,
        index_BTK: Tensor,
        beside: Callable[[], Tensor] | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return each token's weighted sum of its experts, wherever they are, and what `beside`
        computes.

        Rows travel to the ranks of their experts and back, where they are added up in the order of
        the experts, as on one rank."""
        # `here`: experts on this rank, numbered rank · here and up. counts [ranks, here]: how many
        # rows this rank sends to each expert of each rank.
        axis, here = self.fold.expert, len(self.down.weight)
        counts_E = count_rows(index_BTK, axis.size * here)
        counts = counts_E.view(axis.size, here)
        arriving = torch.empty_like(counts)
        start_all_to_all(counts.unbind(), arriving.unbind(), axis)()
        arriving[axis.rank] = counts[axis.rank]
        # The only host synchronisation: how many rows each rank sends to each other.
        leaves, arrives = read_counts(counts, arriving, axis.rank, index_BTK.numel())
        sent, received = ([sum(by_expert) for by_expert in rows] for rows in (leaves, arrives))
        # Sorted by expert is sorted by rank as well, as ranks hold experts in order: what goes to
        # one rank lies together. `counts` is left empty, since nothing is multiplied in this order.
        leaving = RowCounts(counts_E, [count for by_expert in leaves for count in by_expert])
        groups = Groups(*sort_by_expert(index_BTK, counts_E), leaving)
        there = Exchange(sent, received, axis)
        arriving_ND = there.start(permute(x_BTD, groups))
        found = beside and beside()  # while rows travel, as do their gradients in its backward pass
        arrived_ND = there.finish(arriving_ND)
        # Rows arrive sorted by rank, then by expert. To this rank's experts each is a token that
        # visits one of them.
        experts = torch.arange(here, device=counts.device).repeat(axis.size)
        # [ranks · here] numbers of experts, each repeated for its rows. `output_size` is known on
        # the host already: without it, repeat_interleave would wait for the device.
        expert_N = experts.repeat_interleave(arriving.flatten(), output_size=len(arrived_ND))
        # arrives [ranks][here]: an expert's rows are those of all ranks together.
        of_each = RowCounts(arriving.sum(0), [sum(column) for column in zip(*arrives, strict=True)])
        order_N, row_N1 = sort_by_expert(expert_N[:, None], of_each.on_device)
        by_expert = Groups(order_N, row_N1, of_each)
        gate_up_NI = self.gate_up(arrived_ND, by_expert, gather=True)
        # The inverse permutation, so order and row change places: results go back in the order in
        # which their rows came, since the sender knows no other.
        as_arrived = Groups(row_N1[:, 0], order_N[:, None], of_each)
        # No name for what is only on its way: a name would keep it alive.
        back_ND = Exchange(received, sent, axis)(
            permute(self.activation_and_down_proj(gate_up_NI, by_expert), as_arrived)
        )
        return unpermute(back_ND, weight_BTK, groups), found


def read_counts(
    leaving: Tensor, arriving: Tensor, rank: int, num_rows: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Return on the host how many rows leave to each rank, and arrive from it, for each expert
    there, and here. A dry run, whose device knows no numbers, sets this aside: it has `num_rows`
    leave this `rank` in balance."""
    leaves, arrives = torch.stack((leaving, arriving)).tolist()
    return leaves, arrives


class Exchange:
    """Rows on their way between ranks (all-to-all), and later their gradients on the way back. What
    is computed between `start` and `finish` does not wait for them, and nor does its backward pass,
    which comes between the other two."""

    def __init__(self, sent: Sequence[int], received: Sequence[int], axis: Axis):
        """The first `sent[0]` rows go to rank 0 of the axis, the next `sent[1]` to rank 1, and so
        on; of each rank r `received[r]` rows arrive, one after another."""
        self.sent, self.received, self.axis = list(sent), list(received), axis
        self._wait: Callable[[], object] = lambda: None
        self._arriving: Tensor | None = None

    def start(self, rows_ND: Tensor) -> Tensor:
        """Send rows; return where they arrive, [M,D], which nothing may read before `finish`."""
        return _Start.apply(rows_ND, self)

    def finish(self, arriving_MD: Tensor) -> Tensor:
        """Return the rows that have arrived, [M,D]."""
        return _Finish.apply(arriving_MD, self)

    def __call__(self, rows_ND: Tensor) -> Tensor:
        """Send rows and return those that arrive: [N,D] → [M,D]."""
        return self.finish(self.start(rows_ND))

    def send(self, rows_ND: Tensor, back: bool) -> Tensor:
        """Start sending rows, or `back` their gradients; return where they arrive."""
        sent, received = (self.received, self.sent) if back else (self.sent, self.received)
        arriving = rows_ND.new_empty(sum(received), rows_ND.shape[1])
        parts, places = rows_ND.contiguous().split(sent), arriving.split(received)
        self._wait = start_all_to_all(parts, places, self.axis)
        places[self.axis.rank].copy_(parts[self.axis.rank])
        self._arriving = arriving
        return arriving

    def wait(self) -> Tensor:
        """Wait for what was sent last, and return what has arrived."""
        self._wait()
        arrived, self._arriving, self._wait = self._arriving, None, lambda: None
        assert arrived is not None
        return arrived


class _Start(Function):
    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.send(rows_ND, back=False)

    @staticmethod
    # An all-to-all is a permutation of rows over ranks; its transpose is the way back.
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.wait(), None  # the gradients of what was sent


class _Finish(Function):
    @staticmethod
    def forward(ctx: Any, arriving_MD: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        exchange.wait()
        return arriving_MD.view_as(arriving_MD)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.exchange.send(grad, back=True)
        return grad, None  # which `_Start` exchanges for those of the rows that were sent
