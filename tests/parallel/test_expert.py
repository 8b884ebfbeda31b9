"""Experts on several ranks, for visits that training seldom has: the rest is in test_parity.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function

from megalite.comm.collectives import start_all_to_all
from megalite.comm.mesh import ALONE, Axis, Fold
from megalite.models import model_config
from megalite.models.experts import Experts, RoutedConfig
from megalite.parallel import expert
from megalite.parallel.expert import ParallelExperts
from ranks import run_ranks

NUM_EXPERTS, HIDDEN, TOKENS = 4, 12, 5
# Experts of the tokens of each rank: none of one rank's is visited; one has all tokens; a rank has
# no token.
VISITS = {
    "one rank's": [[[0, 1]] * TOKENS] * 2,
    "one": [[[3]] * TOKENS] * 2,
    "no token": [[], [[1, 2]] * TOKENS],
    "all over": [
        [[0, 1], [0, 3], [1, 2], [2, 3], [0, 2]],
        [[1, 3], [0, 1], [2, 3], [1, 2], [1, 3]],
    ],
}


def experts() -> Experts:
    config = model_config({
        "family": "mixtral", "vocab_size": 9, "hidden_size": HIDDEN, "intermediate_size": 8, "num_layers": 1,
        "num_attention_heads": 1, "max_positions": 8, "num_experts": NUM_EXPERTS, "experts_per_token": 1,
    })  # fmt: skip
    assert isinstance(config, RoutedConfig)
    module = Experts(config)
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):
            parameter.normal_(generator=torch.Generator().manual_seed(number))
    return module


def inputs(visits: str, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states of the tokens of a rank, and the weights and numbers of their experts."""
    index = torch.tensor(VISITS[visits][rank], dtype=torch.int64).view(
        1, -1, len(VISITS[visits][1][0])
    )
    generator = torch.Generator().manual_seed(10 + rank)
    x = torch.randn(1, index.shape[1], HIDDEN, generator=generator)
    return x.requires_grad_(), torch.rand(index.shape, generator=generator).requires_grad_(), index


def parallel_experts(rank: int, gathers: bool, dtype: torch.dtype) -> ParallelExperts:
    """This rank's half of the experts. `gathers`: rows travel by all-gather, however many."""
    expert.GATHERED_BYTES = 2**40 if gathers else -1
    whole, axis = experts(), Axis(2, rank, torch.distributed.group.WORLD, "expert")
    mine = ParallelExperts(whole, Fold(axis, ALONE, ALONE, axis), own_tokens=True)
    for linear in (mine.gate_up, mine.down):
        linear.weight = nn.Parameter(linear.weight.detach().chunk(2)[rank].to(dtype, copy=True))
    return mine


def of_rank(
    rank: int,
    world_size: int,
    visits: str,
    gathers: bool = False,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """The output, and gradients of inputs and of this rank's experts."""
    mine = parallel_experts(rank, gathers, dtype)
    x, weight, index = inputs(visits, rank)
    x = x.detach().to(dtype).requires_grad_()
    out = mine(x, weight, index)
    out.square().sum().backward()
    found = [out.detach(), x.grad, weight.grad, mine.gate_up.weight.grad, mine.down.weight.grad]
    assert all(each is not None for each in found)
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("visits", VISITS)
def test_ranks_and_experts_may_have_no_rows(visits: str) -> None:
    found = run_ranks(2, of_rank, visits)
    whole = experts()
    both = [inputs(visits, rank) for rank in range(2)]
    outs = [whole(*each) for each in both]
    sum(out.square().sum() for out in outs).backward()  # type: ignore[union-attr]
    for rank, (out, x, weight, gate_up, down) in enumerate(found):
        wanted = (
            outs[rank].detach(), both[rank][0].grad, both[rank][1].grad,
            whole.gate_up.weight.grad.chunk(2)[rank], whole.down.weight.grad.chunk(2)[rank],
        )  # fmt: skip
        for mine, theirs in zip((out, x, weight, gate_up, down), wanted, strict=True):
            # fp32 sums of at most ten rows, in another order.
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("visits", ["one rank's", "one", "all over"])
def test_both_ways_to_travel_give_the_same_bits(visits: str, dtype: torch.dtype) -> None:
    """Results and gradients of an all-to-all, and of an all-gather with its reduce-scatter."""
    ways = (run_ranks(2, of_rank, visits, gathers, dtype) for gathers in (False, True))
    for there, here in zip(*ways, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(there, here, strict=True))


def test_few_rows_travel_by_all_gather() -> None:
    # A token's row of 4 KiB: 256 of them to another rank are 1 MiB, as are 64 each to four others.
    assert expert.goes_to_all(256, 4096, 2)
    assert not expert.goes_to_all(257, 4096, 2)
    assert expert.goes_to_all(64, 4096, 5)
    assert not expert.goes_to_all(64, 4096, 6)


class Noted(Function):
    """Stands for the experts that every token visits, and notes when they are computed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, events: list[str]) -> Tensor:
        ctx.events = events
        events.append("shared")
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.events.append("shared, backward")
        return 2 * grad, None


def order_of_events(rank: int, world_size: int) -> list[str]:
    events: list[str] = []

    def noted(*arguments: Any) -> Callable[[], None]:
        wait = start_all_to_all(*arguments)
        events.append("start")
        return lambda: (events.append("wait"), wait())[1]

    mine = parallel_experts(rank, gathers=False, dtype=torch.float32)
    x, weight, index = inputs("one", rank)
    expert.start_all_to_all = noted  # type: ignore[assignment]
    out = mine(x, weight, index, lambda: Noted.apply(x, events))
    events.append("backward")
    out.sum().backward()
    return events


def test_what_every_token_visits_is_computed_while_rows_travel() -> None:
    # How many rows there are, the rows, and their results; then the gradients of the results, and
    # of the rows.
    forward = ["start", "wait", "start", "shared", "wait", "start", "wait"]
    backward = ["start", "wait", "start", "shared, backward", "wait"]
    for events in run_ranks(2, order_of_events):
        assert events == [*forward, "backward", *backward]
