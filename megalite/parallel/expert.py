"""A mixture of experts on several ranks, which share the experts, or the inner features of each, or
both.

Expert-tensor ranks hold some inner features of every expert, so that experts are cut as a dense MLP
is. Tokens enter their region together with the weights of their experts, whose gradient is partial,
too.

Expert ranks hold some of the experts. Rows of tokens travel to the ranks of their experts and back:
by all-to-all (how many, the rows, and their results), or, where they are few, by all-gather (all
tokens and where they go, then the results by reduce-scatter). Either gives the same bits. What an
expert rank computes is no partial sum, and its gradients are whole.

Each rank routes the tokens that it has between blocks (its slice of the sequence under sequence
parallelism). Ranks that all have the same tokens, as in inference, send none: each computes the
rows of its own experts, and the results are summed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from megalite.comm.collectives import (
    Result,
    all_gather,
    start_all_to_all,
    start_gather_along,
    start_scatter_along,
)
from megalite.comm.mesh import Axis, Fold
from megalite.kernels.experts import (
    GroupedWgradCallback,
    Groups,
    RowCounts,
    add_biases,
    count_rows,
    group_by_expert,
    grouped_linear,
    permute,
    sort_by_expert,
    unpermute,
)
from megalite.kernels.linear import AS_GIVEN, Recipe, WeightGradStore
from megalite.models.experts import Experts, GroupedLinear
from megalite.parallel.tensor import SEQUENCE, enter, leave

GATHERED_BYTES = 2**20
"""Most bytes of rows, all those that a rank gets of other ranks, that travel by all-gather."""


def goes_to_all(num_rows: int, row_bytes: int, num_ranks: int) -> bool:
    """Return whether rows travel by all-gather, where each of `num_ranks` ranks has `num_rows` of
    `row_bytes` each, the same number on all of them.

    It sends `num_ranks` times as much as an all-to-all, but nothing in it waits for the host to
    know how many rows go where: it is for messages so small that only their latency counts, of few
    tokens and to few ranks."""
    return (num_ranks - 1) * num_rows * row_bytes <= GATHERED_BYTES


class ParallelGroupedLinear(GroupedLinear):
    """Hold this rank's part of a stack of matrices.

    An engine that takes weight-gradient GEMMs sets `wgrad_callback`; `later` defers them; `apply_fp8`
    sets `recipe` (see `ParallelLinear`)."""

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
        self.recipe: Recipe = AS_GIVEN

    def forward(self, x: Tensor, groups: Groups, gather: bool = False) -> Tensor:
        out_NO = grouped_linear(
            x, self.weight, groups, gather, self.wgrad_callback, self.later, self.recipe
        )
        if self.bias is None:
            return out_NO
        first = (
            0 if self.bias.shape[1] == out_NO.shape[1] else self.tensor.rank * self.bias.shape[1]
        )
        return add_biases(out_NO, self.bias, groups.counts, first)


class ParallelExperts(Experts):
    """Hold some of the experts, or some inner features of each, or both."""

    def __init__(self, experts: Experts, fold: Fold, own_tokens: bool, all_tokens: bool = False):
        """Take the place of `experts`, shared as `fold` says. `own_tokens`: each rank has tokens of
        its own between blocks, and not those of its tensor ranks. `all_tokens`: every rank that
        shares the experts has the same tokens."""
        nn.Module.__init__(self)
        self.gate_up, self.down, self.gate = experts.gate_up, experts.down, experts.gate
        self.fold, self.own_tokens, self.all_tokens = fold, own_tokens, all_tokens

    def forward(
        self,
        x_BTD: Tensor,
        weight_BTK: Tensor,
        index_BTK: Tensor,
        beside: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        tensor, own_tokens = self.fold.tensor, self.own_tokens
        if self.all_tokens:
            out_BTD = self._visit_those_here(x_BTD, weight_BTK, index_BTK)
            return out_BTD if beside is None else out_BTD + beside()
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

    def _visit_those_here(self, x_BTD: Tensor, weight_BTK: Tensor, index_BTK: Tensor) -> Tensor:
        """Return each token's weighted sum of its experts on all ranks: each rank computes the rows
        of its own experts, and nothing travels but the sum."""
        axis, here = self.fold.expert, len(self.down.weight)
        x_BTD = enter(x_BTD, self.fold.holders, False)
        weight_BTK = enter(weight_BTK, self.fold.holders, False)
        groups = group_by_expert(index_BTK, axis.size * here)
        counts = groups.counts.on_host
        own = slice(axis.rank * here, (axis.rank + 1) * here)
        # Sorted by expert, the rows of experts here lie together.
        before, after = sum(counts[: own.start]), sum(counts[own.stop :])
        own_counts = RowCounts(groups.counts.on_device[own], counts[own])
        by_expert = groups._replace(counts=own_counts)
        rows_ND = permute(x_BTD, groups)[before : index_BTK.numel() - after]
        out_ND = self.activation_and_down_proj(self.gate_up(rows_ND, by_expert), by_expert)
        # Zeros stand for the rows of other ranks' experts.
        out_BTD = unpermute(F.pad(out_ND, (0, 0, before, after)), weight_BTK, groups)
        return leave(out_BTD, self.fold.holders, False)

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
        axis, here = self.fold.expert, len(self.down.weight)
        row_bytes = x_BTD.shape[-1] * x_BTD.element_size()
        make_routes = by_all_to_all
        if goes_to_all(index_BTK.numel(), row_bytes, axis.size):
            make_routes = by_all_gather
        groups, there, back, arriving, arrives = make_routes(x_BTD, index_BTK, axis, here)
        arriving_ND = there.start(permute(x_BTD, groups))
        found = beside and beside()  # while rows travel, as do their gradients in its backward pass
        arrived_ND = there.finish(arriving_ND)
        # Rows arrive sorted by rank, then by expert. To this rank's experts each is a token that
        # visits one of them.
        experts = torch.arange(here, device=arriving.device).repeat(axis.size)
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
        back_ND = back(permute(self.activation_and_down_proj(gate_up_NI, by_expert), as_arrived))
        return unpermute(back_ND, weight_BTK, groups), found


class Routes(NamedTuple):
    """How this rank's rows travel to the ranks of their experts, and those of other ranks to it."""

    groups: Groups
    """This rank's rows. Sorted by expert is sorted by rank as well, as ranks hold experts in order:
    what goes to one rank lies together. Nothing is multiplied in this order."""
    there: Exchange
    back: Exchange
    arriving: Tensor
    """Rows that arrive from each rank for each expert here, [ranks, here] int64."""
    arrives: list[list[int]]
    """The same on the host."""


def by_all_to_all(x_BTD: Tensor, index_BTK: Tensor, axis: Axis, here: int) -> Routes:
    """Prepare an all-to-all of the rows of tokens that visit the experts `index`, `here` of which
    each rank has. A collective."""
    # counts [ranks, here]: how many rows this rank sends to each expert of each rank.
    counts_E = count_rows(index_BTK, axis.size * here)
    counts = counts_E.view(axis.size, here)
    arriving = torch.empty_like(counts)
    start_all_to_all(counts.unbind(), arriving.unbind(), axis)()
    arriving[axis.rank] = counts[axis.rank]
    # The only host synchronisation: how many rows each rank sends to each other.
    leaves, arrives = read_counts(counts, arriving, axis.rank, index_BTK.numel())
    sent = [sum(by_expert) for by_expert in leaves]
    received = [sum(by_expert) for by_expert in arrives]
    groups = _groups_of(index_BTK, counts_E, leaves)
    there, back = Exchange(sent, received, axis), Exchange(received, sent, axis)
    return Routes(groups, there, back, arriving, arrives)


def by_all_gather(x_BTD: Tensor, index_BTK: Tensor, axis: Axis, here: int) -> Routes:
    """Prepare an all-gather of the tokens `x` of all ranks, which each have as many, and of the
    experts `index` that they visit. A collective."""
    tokens = start_gather_along(x_BTD.detach().flatten(0, -2), axis, 0)
    index_TK = index_BTK.flatten(0, -2)
    num_rows = index_BTK.numel()
    rank, ranks = axis.rank, axis.size
    number_R = torch.arange(ranks, device=index_BTK.device)
    # As if each rank's tokens visited experts of their own: sorted by rank, then by expert, the
    # order in which rows arrive.
    index_RTK = all_gather(index_TK, axis, 0).view(ranks, *index_TK.shape)
    first_expert_R = number_R * (ranks * here)
    apart = (index_RTK + first_expert_R[:, None, None]).flatten(0, 1)
    counts_N = count_rows(apart, ranks * ranks * here)
    counts = counts_N.view(ranks, ranks, here)  # from each rank, to each rank, to each expert there
    token_N, _ = sort_by_expert(apart, counts_N)
    leaving, arriving = counts[rank], counts[:, rank].contiguous()
    leaves, arrives = read_counts(leaving, arriving, rank, num_rows)
    # Rows of one rank for this one lie together: behind those for the ranks before it.
    received_R = arriving.sum(1)
    before_R = counts[:, :rank].sum((1, 2))
    total = sum(sum(by_expert) for by_expert in arrives)
    # Where a rank's rows begin among those of all ranks, and among those that this rank takes.
    among_all_R = number_R * num_rows + before_R
    among_taken_R = received_R.cumsum(0) - received_R
    first_R = among_all_R - among_taken_R
    place_M = first_R.repeat_interleave(received_R, output_size=total)
    place_M = place_M + torch.arange(total, device=place_M.device)
    groups = _groups_of(index_BTK, leaving.flatten(), leaves)
    there = Gathering(place_M, num_rows, axis, False, tokens, token_N[place_M])
    back = Gathering(place_M, num_rows, axis, True)
    return Routes(groups, there, back, arriving, arrives)


def _groups_of(index_BTK: Tensor, counts_E: Tensor, leaves: list[list[int]]) -> Groups:
    """Return this rank's rows sorted by expert. `counts_E` has how many visit each expert of all
    ranks, `leaves` the same on the host, by rank."""
    on_host = [count for by_expert in leaves for count in by_expert]
    order_N, row_TK = sort_by_expert(index_BTK, counts_E)
    return Groups(order_N, row_TK, RowCounts(counts_E, on_host))


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


class Gathering(Exchange):
    """The same by all-gather: every rank gets all that the others send, and takes what is for its
    experts. The way back is a reduce-scatter of a place for each row, of which one rank fills each
    and the others have zeros, so that its sum is exact."""

    def __init__(
        self,
        place_M: Tensor,
        num_rows: int,
        axis: Axis,
        collects: bool,
        tokens: Result | None = None,
        token_M: Tensor | None = None,
    ):
        """`place_M` are the places of this rank's rows among those of all ranks, which have
        `num_rows` each. `collects`: it is the way back. `tokens`, which are on their way, spare the
        way there the rows: these are of the tokens `token_M`."""
        super().__init__((), (), axis)
        self.place_M, self.num_rows, self.collects = place_M, num_rows, collects
        self.tokens, self.token_M = tokens, token_M

    def send(self, rows_ND: Tensor, back: bool) -> Tensor:
        width = rows_ND.shape[1]
        if self.collects != back:
            slots = rows_ND.new_zeros(self.axis.size * self.num_rows, width)
            slots.index_copy_(0, self.place_M, rows_ND)
            result = start_scatter_along(slots, self.axis, 0)
            self._arriving = arriving = rows_ND.new_empty(self.num_rows, width)
            self._wait = lambda: arriving.copy_(result())
            return arriving
        places = self.place_M
        if self.tokens is not None and self.token_M is not None and not back:
            result, places, self.tokens = self.tokens, self.token_M, None
        else:
            result = start_gather_along(rows_ND.contiguous(), self.axis, 0)
        self._arriving = arriving = rows_ND.new_empty(len(places), width)
        self._wait = lambda: torch.index_select(result(), 0, places, out=arriving)
        return arriving


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
