"""Gather what many ranks hold of a weight into the whole tensor, on one owner."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megalite.comm.mesh import Axis, Fold, Mesh
from megalite.engine.layout import is_cut
from megalite.models.sharding import assemble
from megalite.models.weights import Weight
from megalite.runtime.activity import NOW

PIECE = 2**24
"""Elements that a gather to the host brings together on the device at a time. Whole, the largest
weights would need more memory than a step does."""


def gather_parts(part: Tensor, axis: Axis, owner: int) -> Tensor | None:
    """Return every rank's flat `part`, [ranks, numel], on rank `owner` of the axis; None on the
    others."""
    if axis.size == 1:
        return part[None]
    parts = part.new_empty(axis.size, part.numel()) if axis.rank == owner else None
    NOW.enter("gather", axis.name)
    dist.gather(
        part.contiguous(), None if parts is None else [*parts], group=axis.group, group_dst=owner
    )
    NOW.go_on()
    return parts


def gather_to_host(part: Tensor, axis: Axis, owner: int, whole: Tensor | None) -> None:
    """Fill `whole` [ranks, numel], which is on the host, with every rank's flat `part`, on rank
    `owner` of the axis; the others give None. Where `whole` is pinned, its content is there once
    the device has come to it."""
    # `PIECE` bounds what the owner holds on the device: a piece from each rank of the axis.
    step = max(1, PIECE // axis.size)
    for start in range(0, part.numel(), step):
        piece = gather_parts(part[start : start + step], axis, owner)
        if whole is not None and piece is not None:
            for row, arrived in zip(whole, piece, strict=True):
                row[start : start + step].copy_(arrived, non_blocking=row.is_pinned())
            del arrived
        del piece  # before the next one is made


def host_memory(like: Tensor, *shape: int, pinned: bool = False) -> Tensor:
    """Return new memory on the host of this `shape`, in the dtype of `like`."""
    return torch.empty(shape, dtype=like.dtype, pin_memory=pinned)


class HostBuffers:
    """Reuse memory on the host each time the same tensors are copied in the same order. New memory
    costs ten times the copy in page faults, and a device copies quickly to pinned memory only.
    `allocate` makes it, as `host_memory` does."""

    def __init__(self, allocate: Callable[..., Tensor] = host_memory) -> None:
        self._allocate = allocate
        self._buffers: list[Tensor] = []
        self._next = 0
        self._scratch: dict[torch.dtype, Tensor] = {}

    def reuse(self) -> None:
        """Start over: what was copied before is overwritten from now on."""
        self._next = 0

    def take(self, like: Tensor, *shape: int) -> Tensor:
        """Return memory of this `shape` in the dtype of `like`, pinned where `like` is on a
        device."""
        known = self._buffers[self._next] if self._next < len(self._buffers) else None
        # Another order of copies than last time: what was kept from here on fits no more.
        if known is None or (known.shape, known.dtype) != (shape, like.dtype):
            known = self._allocate(like, *shape, pinned=like.device.type == "cuda")
            self._buffers[self._next :] = [known]
        self._next += 1
        return known

    def scratch(self, like: Tensor, *shape: int) -> Tensor:
        """Return such memory whose content is needed until the next call only."""
        known = self._scratch.get(like.dtype)
        if known is None or known.numel() < prod(shape):
            known = self._allocate(like, prod(shape), pinned=like.device.type == "cuda")
            self._scratch[like.dtype] = known
        return known[: prod(shape)].view(shape)

    def copy(self, part: Tensor) -> Tensor:
        """Return a copy of `part` on the host, whose content is there once the device has come to
        it."""
        return self.take(part, *part.shape).copy_(part, non_blocking=True)


def assemble_on(
    owner: int, weight: Weight, local: Tensor, fold: Fold, buffers: HostBuffers | None = None
) -> Tensor | None:
    """Return the logical tensor on the host of rank `owner` among the weight's holders; None on the
    others. `local` is flat; where the `weight` is cut, all holders call this. It comes from a
    device through `buffers`, if given."""
    shape, is_owner = weight.local_shape(*fold.cut), owner == fold.holders.rank
    if not is_cut(weight, fold.cut):
        if not is_owner:
            return None
        whole = buffers.copy(local) if buffers else host_memory(local, local.numel()).copy_(local)
        return whole.view(shape)
    take = buffers.scratch if buffers and local.device.type == "cuda" else host_memory
    parts = take(local, fold.holders.size, local.numel()) if is_owner else None
    gather_to_host(local, fold.holders, owner, parts)
    if parts is not None and take is not host_memory:
        torch.cuda.current_stream(local.device).synchronize()  # once, not for every piece
    return (
        None
        if parts is None
        else assemble(weight, [part.view(shape) for part in parts], fold.expert.size)
    )


class Gather(Protocol):
    """A way for tensors to reach their owner."""

    def parts(self, part: Tensor, axis: Axis, owner: int, is_cut: bool) -> Tensor | None:
        """Return every rank's flat `part`, one behind the other, on rank `owner` of the axis; None
        on the others. `is_cut` says that what they are parts of is cut over tensor ranks, and is
        assembled from here."""

    def assemble(self, owner: int, weight: Weight, local: Tensor, fold: Fold) -> Tensor | None:
        """Return the logical tensor on the host of rank `owner` among the weight's holders; None on
        the others. `local` is flat; where the `weight` is cut, all holders call this."""


class GatherOnHost:
    """Gather with the mesh's own groups, as part of the training loop."""

    def __init__(self, device: torch.device, buffers: HostBuffers | None = None):
        """Gather what is on `device`, to memory of `buffers`, if given."""
        self._device, self._buffers = device, buffers

    def parts(self, part: Tensor, axis: Axis, owner: int, is_cut: bool) -> Tensor | None:
        # A cut weight is needed on the device once more, to send it over the holders. What is uncut
        # is whole now and goes to the host piece by piece, which saves the device a whole bucket.
        if is_cut or axis.size == 1 or part.device.type == "cpu":
            gathered = gather_parts(part, axis, owner)
            return None if gathered is None else gathered.view(-1)
        take = self._buffers.take if self._buffers else host_memory
        whole = take(part, axis.size, part.numel()) if axis.rank == owner else None
        gather_to_host(part, axis, owner, whole)
        return None if whole is None else whole.view(-1)

    def assemble(self, owner: int, weight: Weight, local: Tensor, fold: Fold) -> Tensor | None:
        if local.device.type != self._device.type:  # on the host already
            return local.view(weight.local_shape(*fold.cut)) if owner == fold.holders.rank else None
        return assemble_on(owner, weight, local, fold, self._buffers)


class GatherAside:
    """Gather by messages over a separate group, from a thread beside the loop, tensors that are
    copies already. Creating one is a collective."""

    def __init__(self, mesh: Mesh):
        # A group of its own, since the loop goes on with collectives over the mesh's groups
        # meanwhile: two threads on one group would mix their messages. gloo, as what is copied lies
        # on the host.
        self._group = dist.new_group(backend="gloo") if mesh.world.size > 1 else None

    def parts(self, part: Tensor, axis: Axis, owner: int, is_cut: bool) -> Tensor | None:
        if axis.size == 1:
            return part
        ranks = dist.get_process_group_ranks(axis.group)
        if axis.rank != owner:
            # Sends to one peer arrive in the order of their sending, and every rank goes through
            # the buckets in one order: so no tags are needed to tell them apart.
            dist.send(part.contiguous(), ranks[owner], self._group)
            return None
        parts = part.new_empty(axis.size, part.numel())
        for rank, received in enumerate(parts):
            if rank == owner:
                received.copy_(part)
            else:
                dist.recv(received, ranks[rank], self._group)
        return parts.view(-1)

    def assemble(self, owner: int, weight: Weight, local: Tensor, fold: Fold) -> Tensor | None:
        cut = is_cut(weight, fold.cut)
        parts = self.parts(local, fold.holders, owner, cut) if cut else local
        if owner != fold.holders.rank:
            return None
        assert parts is not None
        shape = weight.local_shape(*fold.cut)
        pieces = parts.chunk(fold.holders.size if cut else 1)
        return assemble(weight, [part.view(shape) for part in pieces], fold.expert.size)
