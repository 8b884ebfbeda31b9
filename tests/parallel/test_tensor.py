"""Collectives, their conjugate pairs and the parallel modules on real ranks, against torch on one
process.

A check is a function that runs on every rank and returns what it found and what it wanted, both
tensors by name. All ranks draw the same numbers, so each can work out the whole on its own. All
checks of a number of ranks share one spawn.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from megalite.comm import collectives
from megalite.comm.collectives import (
    all_gather,
    all_reduce,
    reduce_scatter,
    start_all_gather,
    start_reduce,
    start_reduce_scatter,
)
from megalite.comm.mesh import Axis
from megalite.models.layers import IGNORE
from megalite.models.weights import Weight
from megalite.parallel import overlap
from megalite.parallel.tensor import (
    ColumnParallelLinear,
    RowParallelLinear,
    SequenceCutEmbedding,
    VocabParallelCrossEntropy,
    VocabParallelEmbedding,
    leave,
)
from ranks import run_ranks

WORLDS = (2, 4)
OVERLAPPED_LINEARS = (overlap.OverlappedColumnLinear, overlap.OverlappedRowLinear)
BATCH, LENGTH, HIDDEN, INNER = 3, 8, 12, 16

Result = dict[str, tuple[Tensor, Tensor]]
Check = Callable[[Axis], Result]


def numbers(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """fp64: what remains between two orders of summation is then far below any mistake."""
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def integers(seed: int, *shape: int, dtype: torch.dtype) -> Tensor:
    """Small ones: their sums are exact in every dtype, so that collectives can be compared bit by
    bit."""
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def part(x: Tensor, axis: Axis, dim: int) -> Tensor:
    return x.chunk(axis.size, dim)[axis.rank]


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


def gather_and_scatter(axis: Axis, dtype: torch.dtype) -> Result:
    found: Result = {}
    for dim in range(3):
        ones = [integers(10 * dim + rank, 2, 3, 4, dtype=dtype) for rank in range(axis.size)]
        found[f"all_gather {dim}"] = all_gather(ones[axis.rank], axis, dim), torch.cat(ones, dim)
        shape = [2, 3, 4]
        shape[dim] *= axis.size
        all_ = [integers(10 * dim + rank, *shape, dtype=dtype) for rank in range(axis.size)]
        mine = all_[axis.rank].clone()
        found[f"reduce_scatter {dim}"] = (
            reduce_scatter(mine, axis, dim),
            part(sum(all_[1:], all_[0]), axis, dim),
        )
        found[f"reduce_scatter {dim} leaves its input alone"] = mine, all_[axis.rank]
        kept = reduce_scatter(mine, axis, dim).untyped_storage().nbytes() * axis.size
        found[f"reduce_scatter {dim} keeps its slice alone"] = (
            torch.tensor(kept),
            torch.tensor(mine.nbytes),
        )
        strided = [x.transpose(0, 2) for x in ones]  # gradients of views are seldom contiguous
        found[f"all_gather {dim} strided"] = (
            all_gather(strided[axis.rank], axis, dim),
            torch.cat(strided, dim),
        )
        across = [x.transpose(0, 2) for x in all_]
        found[f"reduce_scatter {dim} strided"] = (
            reduce_scatter(across[axis.rank], axis, 2 - dim), part(sum(across[1:], across[0]), axis, 2 - dim)
        )  # fmt: skip
    return found


def started(axis: Axis, dtype: torch.dtype) -> Result:
    all_ = [integers(rank, axis.size * 6, dtype=dtype) for rank in range(axis.size)]
    total = sum(all_[1:], all_[0])
    reduced, scattered, gathered = (all_[axis.rank].clone() for _ in range(3))
    start_reduce(reduced, axis)()
    start_reduce_scatter(scattered, axis)()
    start_all_gather(gathered, axis)()
    return {
        "start_reduce": (reduced, total),
        "start_reduce_scatter": (part(scattered, axis, 0), part(total, axis, 0)),
        "start_all_gather": (
            gathered,
            torch.cat([x.chunk(axis.size)[rank] for rank, x in enumerate(all_)]),
        ),
    }


def in_flight(axis: Axis, backwards: bool) -> Result:
    """Many messages of different sizes between the same ranks, waited for in either order."""
    sizes = [1 + 37 * i % 101 for i in range(30)]
    gathers = [
        torch.full((axis.size * size,), float(100 * i + axis.rank)) for i, size in enumerate(sizes)
    ]
    scatters = [
        torch.full((axis.size * size,), float(i + axis.rank)) for i, size in enumerate(sizes)
    ]
    waits = []
    for gathered, scattered in zip(gathers, scatters, strict=True):
        waits += [start_all_gather(gathered, axis), start_reduce_scatter(scattered, axis)]
    all_reduce(torch.ones(3), axis)  # another collective passes between them
    for wait in reversed(waits) if backwards else waits:
        wait()
    ranks = torch.arange(float(axis.size))
    found: Result = {}
    for i, size in enumerate(sizes):
        found[f"gather {i}"] = gathers[i], (100 * i + ranks).repeat_interleave(size)
        found[f"scatter {i}"] = (
            part(scatters[i], axis, 0),
            torch.full((size,), float(axis.size * i + ranks.sum())),
        )
    return found


def strided_group(axis: Axis) -> Result:
    """A group of every second rank, as data groups are: ranks of the axis are not ranks of the
    world."""
    groups = [list(range(first, axis.size, 2)) for first in (0, 1)]
    made = [dist.new_group(group) for group in groups]  # every rank makes all of them
    mine = axis.rank % 2
    inner = Axis(len(groups[mine]), groups[mine].index(axis.rank), made[mine])
    gathered = all_gather(torch.tensor([float(axis.rank)]), inner, 0)
    scattered = reduce_scatter(torch.arange(2.0 * inner.size) * (axis.rank + 1), inner, 0)
    total = torch.arange(2.0 * inner.size) * sum(rank + 1 for rank in groups[mine])
    return {
        "gather": (gathered, torch.tensor(groups[mine]).float()),
        "scatter": (scattered, part(total, inner, 0)),
    }


def ways_alone(axis: Axis, sequence: bool) -> Result:
    """Each way on its own. The loss is the sum over ranks of ⟨weights of the rank, output of the
    rank⟩."""
    full = (BATCH, LENGTH, HIDDEN)
    weights = [numbers(rank, *full) for rank in range(axis.size)]
    total = sum(weights[1:], weights[0])

    whole = numbers(50, *full)
    x = leaf(part(whole, axis, 1) if sequence else whole)
    entered = ColumnParallelLinear(nn.Parameter(torch.eye(HIDDEN).to(x)), None, axis, sequence)(x)
    (entered * weights[axis.rank]).sum().backward()

    inputs = [numbers(60 + rank, *full) for rank in range(axis.size)]
    summed = sum(inputs[1:], inputs[0])
    z = leaf(inputs[axis.rank])
    left = leave(z * 1.0, axis, sequence)
    # Without a cut sequence every rank computes the same loss of the same output; with it, each
    # that of its slice.
    (left * (part(weights[0], axis, 1) if sequence else weights[0])).sum().backward()
    return {
        "enter": (entered, whole),
        "enter, gradient": (x.grad, part(total, axis, 1) if sequence else total),
        "leave": (left, part(summed, axis, 1) if sequence else summed),
        "leave, gradient": (z.grad, weights[0]),
    }


Linears = tuple[type[ColumnParallelLinear], type[RowParallelLinear]]


def block(
    axis: Axis, sequence: bool, linears: Linears = (ColumnParallelLinear, RowParallelLinear)
) -> Result:
    """Column-parallel, a function of each feature alone, row-parallel: two linear layers on one
    process."""
    column, row = linears
    up, down = nn.Linear(HIDDEN, INNER).double(), nn.Linear(INNER, HIDDEN).double()
    with torch.no_grad():
        for i, parameter in enumerate((up.weight, up.bias, down.weight, down.bias)):
            parameter.copy_(numbers(i, *parameter.shape))
    x = leaf(numbers(9, BATCH, LENGTH, HIDDEN))
    y = down(torch.tanh(up(x)))
    weights = numbers(8, *y.shape)
    (y * weights).sum().backward()

    def local(parameter: Tensor, dim: int) -> nn.Parameter:
        return nn.Parameter(part(parameter.detach(), axis, dim).clone())

    up_local = column(local(up.weight, 0), local(up.bias, 0), axis, sequence)
    bias = nn.Parameter(down.bias.detach().clone())
    down_local = row(local(down.weight, 1), bias, axis, sequence)
    x_local = leaf(part(x, axis, 1) if sequence else x)
    y_local = down_local(torch.tanh(up_local(x_local)))
    (y_local * (part(weights, axis, 1) if sequence else weights)).sum().backward()
    # The engine's part: `partial_grad`.
    bias_grad = all_reduce(bias.grad.clone(), axis) if sequence else bias.grad
    return {
        "y": (y_local, part(y, axis, 1) if sequence else y),
        "x.grad": (x_local.grad, part(x.grad, axis, 1) if sequence else x.grad),
        "up.weight.grad": (up_local.weight.grad, part(up.weight.grad, axis, 0)),
        "up.bias.grad": (up_local.bias.grad, part(up.bias.grad, axis, 0)),
        "down.weight.grad": (down_local.weight.grad, part(down.weight.grad, axis, 1)),
        "down.bias.grad": (bias_grad, down.bias.grad),
    }


def overlapped_block(axis: Axis) -> Result:
    """The block with torch's operations for GPUs that read each other's memory. On the CPU they are
    what torch itself says they compute: its own statement of them stands in."""
    calls: list[str] = []

    def noted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            calls.append(function.__name__)
            return function(*arguments, **named)

        return call

    library = torch.library.Library("symm_mem", "IMPL")
    gathers = symmetric_memory._fused_all_gather_matmul_fallback
    scatters = symmetric_memory._fused_matmul_reduce_scatter_fallback
    library.impl("fused_all_gather_matmul", noted(gathers), "CPU")
    library.impl("fused_matmul_reduce_scatter", noted(scatters), "CPU")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(overlap, "has_symmetric_memory", lambda x, axis: True)
        found = block(axis, True, OVERLAPPED_LINEARS)
    # On the way in, on the way out, and the gradient on its way back.
    assert calls == [gathers.__name__, scatters.__name__, gathers.__name__]
    return found


def padded_part(x: Tensor, axis: Axis, dim: int, fill: float) -> Tensor:
    """This rank's rows of the vocabulary, with `fill` where there is padding."""
    rows = Weight("w", (x.shape[dim], 1), ("h",), "vocab").local_shape(axis.size)[0]
    shape = list(x.shape)
    shape[dim] = rows * axis.size - x.shape[dim]
    return part(torch.cat((x, x.new_full(shape, fill)), dim), axis, dim).clone()


def embeddings(axis: Axis, sequence: bool) -> Result:
    vocab = 100  # over 4 ranks: 64, 36, 0 and 0 rows
    weight, positions = leaf(numbers(0, vocab, HIDDEN)), leaf(numbers(1, LENGTH, HIDDEN))
    tokens = torch.randint(0, vocab, (BATCH, LENGTH), generator=torch.Generator().manual_seed(2))
    numbers_1T = torch.arange(LENGTH)[None]
    y = F.embedding(tokens, weight) + F.embedding(numbers_1T, positions)
    weights = numbers(3, *y.shape)
    (y * weights).sum().backward()

    table = nn.Parameter(padded_part(weight.detach(), axis, 0, 9.0))
    places = nn.Parameter(positions.detach().clone())
    embed = VocabParallelEmbedding(table, axis, sequence)
    place: nn.Module = (
        SequenceCutEmbedding(places, axis)
        if sequence
        else nn.Embedding(LENGTH, HIDDEN, _weight=places)
    )
    y_local = embed(tokens) + place(numbers_1T)
    (y_local * (part(weights, axis, 1) if sequence else weights)).sum().backward()
    places_grad = places.grad if sequence else place.weight.grad
    return {
        "y": (y_local, part(y, axis, 1) if sequence else y),
        "weight.grad": (table.grad, padded_part(weight.grad, axis, 0, 0.0)),
        "positions.grad": (
            all_reduce(places_grad.clone(), axis) if sequence else places_grad,
            positions.grad,
        ),
    }


def cross_entropy(
    axis: Axis, vocab: int, scale: float = 1.0, dtype: torch.dtype = torch.float32
) -> Result:
    """Padded columns hold huge logits, which must neither count nor get a gradient."""
    logits = leaf((numbers(0, BATCH, LENGTH, vocab) * scale).to(dtype))
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, vocab, (BATCH, LENGTH), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.25] = IGNORE
    labels[0] = IGNORE
    losses = F.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORE
    )
    weights = numbers(2, BATCH * LENGTH, dtype=torch.float32)
    (losses * weights).sum().backward()

    local = leaf(padded_part(logits.detach(), axis, 2, 3e4))
    found = VocabParallelCrossEntropy(axis, vocab)(local, labels)
    (found.flatten() * weights).sum().backward()
    assert found.dtype == torch.float32
    assert local.grad.dtype == dtype
    assert (found[0] == 0).all()
    assert (local.grad[0] == 0).all()
    assert found.isfinite().all()
    return {
        "losses": (found.flatten(), losses),
        "gradient": (local.grad, padded_part(logits.grad, axis, 2, 0.0)),
    }


# fp64 sums of a few hundred numbers near 1: 1e-12 is a thousand roundings. Exact: integers, whose
# sums do not round.
EXACT, FP64 = 0.0, 1e-12
# fp32 losses up to 10 and their gradients below 1: some ten roundings of 6e-8 relative to the
# largest.
FP32 = 1e-6
DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int64)
CHECKS: dict[str, tuple[Check, float]] = {
    **{f"gather and scatter {d}": (partial(gather_and_scatter, dtype=d), EXACT) for d in DTYPES},
    **{f"started {d}": (partial(started, dtype=d), EXACT) for d in DTYPES},
    "in flight, in order": (partial(in_flight, backwards=False), EXACT),
    "in flight, backwards": (partial(in_flight, backwards=True), EXACT),
    "strided group": (strided_group, EXACT),
    **{f"ways alone, sequence {s}": (partial(ways_alone, sequence=s), FP64) for s in (False, True)},
    **{f"block, sequence {s}": (partial(block, sequence=s), FP64) for s in (False, True)},
    "block, overlapped": (partial(block, sequence=True, linears=OVERLAPPED_LINEARS), FP64),
    "block, overlapped over symmetric memory": (overlapped_block, FP64),
    **{f"embeddings, sequence {s}": (partial(embeddings, sequence=s), FP64) for s in (False, True)},
    # 256: no padding. 193: a ragged last rank. 100: two wholly padded ones of four. 5: all but the
    # first padded.
    **{
        f"loss, vocabulary {v}": (partial(cross_entropy, vocab=v), FP32) for v in (256, 193, 100, 5)
    },
    "loss, huge logits": (partial(cross_entropy, vocab=193, scale=1e4), FP32),
    # Both round one fp32 gradient to bf16: at most one step of 2⁻⁸ apart where they fall on either
    # side of a tie.
    "loss, bf16": (partial(cross_entropy, vocab=193, dtype=torch.bfloat16), 2.0**-8),
}


def run_checks(rank: int, world_size: int) -> dict[str, Result]:
    axis = Axis(world_size, rank, dist.group.WORLD)
    return {
        name: {
            key: (found.detach(), wanted.detach()) for key, (found, wanted) in check(axis).items()
        }
        for name, (check, _) in CHECKS.items()
    }


@cache
def results_of(world_size: int) -> list[dict[str, Result]]:
    return run_ranks(world_size, run_checks)


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("name", CHECKS)
def test_on_every_rank(name: str, world_size: int) -> None:
    tolerance = CHECKS[name][1]
    for rank, results in enumerate(results_of(world_size)):
        for key, (found, wanted) in results[name].items():
            assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype), (
                f"{key} on rank {rank}"
            )
            largest = max(1.0, wanted.abs().max().item()) if wanted.numel() else 1.0
            error = (found.double() - wanted.double()).abs().max().item() / largest
            assert error <= tolerance, f"{key} on rank {rank} is off by {error:.1e}"


def test_a_group_of_one_communicates_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def called(*args: Any, **more: Any) -> None:
        raise AssertionError("a collective over one rank")

    monkeypatch.setattr(collectives.dist, "all_reduce", called)
    monkeypatch.setattr(collectives.dist, "batch_isend_irecv", called)
    x, axis = torch.arange(6.0), Axis()
    for result in (all_reduce(x, axis), all_gather(x, axis, 0), reduce_scatter(x, axis, 0)):
        assert result is x
    for start in (start_reduce, start_all_gather, start_reduce_scatter):
        start(x, axis)()
    assert torch.equal(x, torch.arange(6.0))


def test_loss_of_one_rank_equals_torch() -> None:
    for found, wanted in cross_entropy(Axis(), 193).values():
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)  # as FP32, for losses up to 10
