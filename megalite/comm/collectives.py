"""Collectives over one axis of the mesh, each a short cut for a group of one. Which primitive
serves a backend best is decided here and nowhere else.

On the CPU, reduce-scatter and all-gather are direct messages between the ranks: gloo's own take 1.4
to 2.5 times as long. Medians over 2 ranks of one machine, 16 MB of fp32: reduce-scatter 17.1
against 6.9 ms, all-gather 8.1 against 5.7; its all-reduce, at 9.8 ms, is quicker than both together
and is used as it is. NCCL's collectives are used as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megalite.comm.mesh import Axis, Mesh
from megalite.runtime.activity import NOW

# torch 2.13 renamed these two; megalite supports the older names as well.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

Wait = Callable[[], object]
"""Waits for a collective; call it before touching the result."""

Result = Callable[[], Tensor]
"""Waits for a collective and returns its result."""


def _done() -> None:
    """Wait for a collective over one rank: nothing to do."""


def noted(kind: str, axis: Axis, wait: Wait) -> Wait:
    """Return the wait of a collective that has just begun, which also notes for the hang report
    that this rank waits."""
    # Counted when it begins and not when it is waited for: collectives of an axis begin in one
    # order on all ranks, so equal numbers in a hang report mean one and the same collective.
    number = NOW.count(axis.name)

    def noted_wait() -> None:
        NOW.wait(kind, axis.name, number)
        wait()
        NOW.go_on()

    return noted_wait


def all_reduce(x: Tensor, axis: Axis, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """Reduce `x`, which is contiguous, over the axis in place."""
    if axis.size > 1:
        NOW.enter("all_reduce", axis.name)
        dist.all_reduce(x, op, axis.group)
        NOW.go_on()
    return x


def broadcast_text(text: str) -> str:
    """Return rank 0's text on all ranks, which all call it; what the others give is not looked
    at."""
    # As bytes in a tensor: torch.distributed's own way for objects unpickles what it gets.
    data = torch.tensor(list(text.encode()), dtype=torch.uint8)
    size = torch.tensor([len(data)])
    dist.broadcast(size, 0)
    if dist.get_rank() > 0:
        data = torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(data, 0)
    return bytes(data.tolist()).decode()


def all_agree(yes: bool, mesh: Mesh) -> bool:
    """Return whether every rank says yes. What one rank alone has found must be known to all before
    they part ways."""
    # MAX of "no" is a logical or: one rank that refuses is enough.
    no = torch.tensor(int(not yes), device=mesh.device)
    return not all_reduce(no, mesh.world, dist.ReduceOp.MAX)


def start_highest(number: int, mesh: Mesh) -> Callable[[], int]:
    """Start finding the highest of all ranks' numbers, between the hosts: no device is waited for,
    on any rank."""
    if mesh.world.size == 1:
        return lambda: number
    # A tensor on the host goes by gloo also where the device is a GPU: the group of all ranks has
    # both (`Launch.join`), those of axes need not.
    highest = torch.tensor(number)
    work = dist.all_reduce(highest, dist.ReduceOp.MAX, mesh.world.group, async_op=True)
    wait = noted("all_reduce", mesh.world, work.wait)

    def result() -> int:
        wait()
        return int(highest)

    return result


def start_sharing(number: float, mesh: Mesh) -> Result:
    """Start sharing every rank's number, [world] float64 in rank order, between the hosts: no
    device is waited for."""
    # A gather as a sum: each rank puts its number at its own place among zeros.
    numbers = torch.zeros(mesh.world.size, dtype=torch.float64)
    numbers[mesh.world.rank] = number
    return start_reduce_whole(numbers, mesh.world)


def all_gather(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """Concatenate every rank's `x` along `dim` (not negative) of the axis's ranks."""
    return start_gather_along(x, axis, dim)()


def reduce_scatter(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """Sum `x` over the ranks of the axis, each of which keeps its own slice of `dim`."""
    return start_scatter_along(x, axis, dim)()


def start_gather_along(x: Tensor, axis: Axis, dim: int) -> Result:
    """Start concatenating every rank's `x` along `dim` (not negative) over the axis."""
    if axis.size == 1:
        return lambda: x
    gathered = x.new_empty(axis.size, *x.shape)
    gathered[axis.rank] = x
    # [ranks, *x.shape]; `result` moves the ranks into `dim`.
    wait = start_all_gather(gathered.view(-1), axis)

    # [ranks, …, T, …] → […, ranks, T, …] → […, ranks · T, …]. A copy, unless `dim` is 0.
    def result() -> Tensor:
        wait()
        return gathered.movedim(0, dim).flatten(dim, dim + 1)

    return result


def start_reduce_whole(x: Tensor, axis: Axis) -> Result:
    """Start summing `x` over the ranks; the result is in `x` itself."""
    wait = start_reduce(x.view(-1), axis)

    def result() -> Tensor:
        wait()
        return x

    return result


def start_scatter_along(x: Tensor, axis: Axis, dim: int) -> Result:
    """Start summing `x`, which must not change meanwhile, over the ranks of the axis; the result is
    this rank's slice of `dim`, in memory of its own."""
    if axis.size == 1:
        return lambda: x
    # A reduce-scatter cuts flat memory, so each rank's slice of `dim` must be contiguous in it: of
    # one sequence they are, and nothing is copied.
    pieces = x.unflatten(dim, (axis.size, -1)).movedim(dim, 0).contiguous()
    own = torch.empty_like(pieces[0])
    wait = start_reduce_scatter(pieces.view(-1), axis, own.view(-1))

    def result() -> Tensor:
        wait()
        return own

    return result


def start_reduce(flat: Tensor, axis: Axis) -> Wait:
    """Start summing `flat` over the axis, in place."""
    if axis.size == 1:
        return _done
    return noted("all_reduce", axis, dist.all_reduce(flat, group=axis.group, async_op=True).wait)


def start_reduce_scatter(flat: Tensor, axis: Axis, out: Tensor | None = None) -> Wait:
    """Start summing `flat` over the axis. This rank's shard of the sum, the `axis.rank`-th equal
    slice, is put into `out`; without one in its place in `flat`, of which the rest is then no
    longer valid."""
    if axis.size == 1:
        return _done
    mine = flat.view(axis.size, -1)[axis.rank]
    shard = mine if out is None else out
    if flat.device.type != "cpu":
        work = _reduce_scatter(shard, flat, group=axis.group, async_op=True)
        return noted("reduce_scatter", axis, work.wait)
    others = [rank for rank in range(axis.size) if rank != axis.rank]
    received = {rank: torch.empty_like(shard) for rank in others}
    # gloo: every rank sends each other rank its shard, and adds up what it receives for its own.
    works = _exchange({rank: flat.view(axis.size, -1)[rank] for rank in others}, received, axis)

    def finish() -> None:
        # In the order of ranks, with this rank's own first: another order on each rank, but each
        # element is summed by one rank alone, so that all get the same bits of it.
        _wait_for(works)
        if out is not None:
            out.copy_(mine)
        for part in received.values():
            shard.add_(part)

    return noted("reduce_scatter", axis, finish)


def start_all_gather(flat: Tensor, axis: Axis) -> Wait:
    """Start filling `flat` with every rank's shard of it, in place."""
    if axis.size == 1:
        return _done
    shards = flat.view(axis.size, -1)
    if flat.device.type != "cpu":
        work = _all_gather(flat, shards[axis.rank], group=axis.group, async_op=True)
        return noted("all_gather", axis, work.wait)
    others = [rank for rank in range(axis.size) if rank != axis.rank]
    # gloo: this rank's shard goes to every other rank, and theirs come straight to their place in
    # `flat`.
    works = _exchange(
        dict.fromkeys(others, shards[axis.rank]), {rank: shards[rank] for rank in others}, axis
    )
    return noted("all_gather", axis, partial(_wait_for, works))


def start_all_to_all(to_send: Sequence[Tensor], to_receive: Sequence[Tensor], axis: Axis) -> Wait:
    """Start sending the flat tensor `to_send[r]` to each rank r of the axis, and receiving theirs
    in `to_receive`: some may be empty, and those of this rank itself are left alone."""
    if axis.size == 1:
        return _done
    others = [rank for rank in range(axis.size) if rank != axis.rank]
    # Only messages with something in them: both ends know which.
    works = _exchange(
        {rank: to_send[rank] for rank in others if to_send[rank].numel()},
        {rank: to_receive[rank] for rank in others if to_receive[rank].numel()},
        axis,
    )
    return noted("all_to_all", axis, partial(_wait_for, works))


def add_from_other_end(x: Tensor, axis: Axis) -> None:
    """Add to `x`, in place, the tensor of the other end of the axis. Its first and last rank call
    it, and hold the same bits afterwards: of two terms, the order does not matter."""
    other = axis.size - 1 - axis.rank
    received = torch.empty_like(x)
    works = _exchange({other: x}, {other: received}, axis)
    # Without a number, since the ranks between do not count it.
    NOW.wait("exchange with the other end", axis.name)
    _wait_for(works)
    NOW.go_on()
    x += received


def start_shift(x: Tensor, axis: Axis) -> Result:
    """Start passing `x`, which is contiguous and must not change meanwhile, to the next rank of the
    axis (the first comes after the last). The result is the previous rank's."""
    if axis.size == 1:
        return lambda: x
    received = torch.empty_like(x)
    after, before = (axis.rank + 1) % axis.size, (axis.rank - 1) % axis.size
    messages = [
        # Sent and received in one batch: were each rank to send first and then receive, a ring of
        # NCCL sends would wait for itself.
        dist.P2POp(dist.isend, x, group=axis.group, group_peer=after),
        dist.P2POp(dist.irecv, received, group=axis.group, group_peer=before),
    ]
    wait = noted("shift", axis, partial(_wait_for, dist.batch_isend_irecv(messages)))

    def result() -> Tensor:
        wait()
        return received

    return result


def _exchange(
    to_send: dict[int, Tensor], to_receive: dict[int, Tensor], axis: Axis
) -> list[dist.Work]:
    """Start a message to each rank in `to_send` and from each in `to_receive`, ranks of the
    axis."""
    messages = []
    # By peer, and to each before from each, on every rank: the pairs of messages match up.
    for rank in sorted(to_send.keys() | to_receive.keys()):
        peer = dist.get_global_rank(axis.group, rank)  # type: ignore[arg-type]
        if rank in to_send:
            messages.append(dist.P2POp(dist.isend, to_send[rank], peer, axis.group))
        if rank in to_receive:
            messages.append(dist.P2POp(dist.irecv, to_receive[rank], peer, axis.group))
    return dist.batch_isend_irecv(messages) if messages else []


def _wait_for(works: list[dist.Work]) -> None:
    for work in works:
        work.wait()


def gather_rows(own: Tensor, axis: Axis) -> tuple[Tensor, int]:
    """Return the rows [n,D] of all ranks of `axis`, which may have other numbers of them each, and
    the number of the first of this rank's."""
    if axis.size == 1:
        return own, 0
    counts = all_gather(torch.tensor([len(own)], device=own.device), axis, 0).tolist()
    padded = F.pad(own, (0, 0, 0, max(counts) - len(own)))
    pieces = all_gather(padded, axis, 0).chunk(axis.size)
    rows = torch.cat([piece[:count] for piece, count in zip(pieces, counts, strict=True)])
    return rows, sum(counts[: axis.rank])
