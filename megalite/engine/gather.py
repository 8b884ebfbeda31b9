"""From what many ranks hold of a weight to the whole tensor, on one owner."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megalite.activity import NOW
from megalite.mesh import Axis, Mesh
from megalite.models.weights import Weight


def gather_parts(part: Tensor, axis: Axis, owner: int) -> list[Tensor]:
    """Everybody's `part`, in rank order, on the owner; nothing on the others."""
    if axis.size == 1:
        return [part]
    parts = [torch.empty_like(part) for _ in range(axis.size)] if axis.rank == owner else None
    NOW.enter("gather", axis.name)
    dist.gather(part.contiguous(), parts, group=axis.group, group_dst=owner)
    NOW.go_on()
    return parts or []


def assemble_on(owner: int, weight: Weight, local: Tensor, mesh: Mesh) -> Tensor | None:
    """The logical tensor on the host of tensor rank `owner`, None on the others. `local` is flat, and all tensor ranks
    call it where the weight is cut."""
    cut = weight.shard is not None and mesh.tensor.size > 1
    locals_ = gather_parts(local, mesh.tensor, owner) if cut else [local]
    if owner != mesh.tensor.rank:
        return None
    shape = weight.local_shape(mesh.tensor.size)
    # Assembled on the host: the largest weights must not be on the device twice.
    return weight.assemble([_on_host(part).view(shape) for part in locals_])


def _on_host(part: Tensor) -> Tensor:
    """A copy that training does not change any more."""
    return part.cpu() if part.device.type != "cpu" else part.clone()
