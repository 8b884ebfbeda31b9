"""Gather what many ranks hold of a weight into the whole tensor, on one owner."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megalite.comm.mesh import Axis, Fold, Mesh
from megalite.engine.layout import is_cut
from megalite.models.weights import Weight
from megalite.runtime.activity import NOW


def gather_parts(part: Tensor, axis: Axis, owner: int) -> list[Tensor]:
    """Return every rank's `part`, in rank order, on rank `owner` of the axis; an empty list on the others."""
    if axis.size == 1:
        return [part]
    parts = [torch.empty_like(part) for _ in range(axis.size)] if axis.rank == owner else None
    NOW.enter("gather", axis.name)
    dist.gather(part.contiguous(), parts, group=axis.group, group_dst=owner)
    NOW.go_on()
    return parts or []


class HostBuffers:
    """Reuse memory on the host each time the same tensors are copied in the same order. New memory costs ten times the
    copy in page faults, and a device copies quickly to pinned memory only."""

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []
        self._next = 0

    def reuse(self) -> None:
        """Start over: what was copied before is overwritten from now on."""
        self._next = 0

    def copy(self, part: Tensor) -> Tensor:
        """Return a copy of `part` on the host, whose content is there once the device has come to it."""
        known = self._buffers[self._next] if self._next < len(self._buffers) else None
        if known is None or (known.shape, known.dtype) != (part.shape, part.dtype):
            known = torch.empty_like(part, device="cpu", pin_memory=part.device.type == "cuda")
            self._buffers[self._next :] = [known]
        self._next += 1
        return known.copy_(part, non_blocking=True)


def assemble_on(
    owner: int, weight: Weight, local: Tensor, fold: Fold, buffers: HostBuffers | None = None
) -> Tensor | None:
    """Return the logical tensor on the host of rank `owner` among the weight's holders; None on the others. `local` is
    flat; where the `weight` is cut, all holders call this. An uncut weight is copied to `buffers`, if given."""
    cut = is_cut(weight, fold.cut)
    locals_ = gather_parts(local, fold.holders, owner) if cut else [local]
    if owner != fold.holders.rank:
        return None
    shape = weight.local_shape(*fold.cut)
    if buffers is not None and not cut:
        return buffers.copy(local).view(shape)
    # Assembled on the host: the largest weights must not be on the device twice.
    return weight.assemble([_on_host(part).view(shape) for part in locals_], fold.expert.size)


class Gather(Protocol):
    """A way for tensors to reach their owner."""

    def parts(self, part: Tensor, axis: Axis, owner: int) -> list[Tensor]:
        """Return every rank's `part`, in rank order, on rank `owner` of the axis; an empty list on the others."""

    def assemble(self, owner: int, weight: Weight, local: Tensor, fold: Fold) -> Tensor | None:
        """Return the logical tensor on the host of rank `owner` among the weight's holders; None on the others. `local`
        is flat; where the `weight` is cut, all holders call this."""


class GatherOnHost:
    """Gather with the mesh's own groups, as part of the training loop."""

    def __init__(self, buffers: HostBuffers | None = None):
        self._buffers = buffers

    def parts(self, part: Tensor, axis: Axis, owner: int) -> list[Tensor]:
        return gather_parts(part, axis, owner)

    def assemble(self, owner: int, weight: Weight, local: Tensor, fold: Fold) -> Tensor | None:
        return assemble_on(owner, weight, local, fold, self._buffers)


class GatherAside:
    """Gather by messages over a separate group, from a thread beside the loop, tensors that are copies already.
    Creating one is a collective."""

    def __init__(self, mesh: Mesh):
        self._group = dist.new_group(backend="gloo") if mesh.world.size > 1 else None

    def parts(self, part: Tensor, axis: Axis, owner: int) -> list[Tensor]:
        if axis.size == 1:
            return [part]
        ranks = dist.get_process_group_ranks(axis.group)
        if axis.rank != owner:
            dist.send(part.contiguous(), ranks[owner], self._group)
            return []
        parts = [part if rank == owner else torch.empty_like(part) for rank in range(axis.size)]
        for rank, received in enumerate(parts):
            if rank != owner:
                dist.recv(received, ranks[rank], self._group)
        return parts

    def assemble(self, owner: int, weight: Weight, local: Tensor, fold: Fold) -> Tensor | None:
        locals_ = self.parts(local, fold.holders, owner) if is_cut(weight, fold.cut) else [local]
        if owner != fold.holders.rank:
            return None
        shape = weight.local_shape(*fold.cut)
        return weight.assemble([part.view(shape) for part in locals_], fold.expert.size)


def _on_host(part: Tensor) -> Tensor:
    """Return a copy on the host that training does not change any more."""
    return part.cpu() if part.device.type != "cpu" else part.clone()
