"""From the shards of many ranks to whole tensors, each on one owner, a bucket at a time."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from megalite.engine.native import NativeEngine
from megalite.mesh import Axis, Mesh


def gather_logical(
    kind: str, owners: Mapping[str, tuple[int, int]], mesh: Mesh, engine: NativeEngine
) -> dict[str, Tensor]:
    """The logical tensors this rank owns, on the host. `kind` is "weight", "grad" or an optimizer state.

    Shards travel over the data axis to the owner of their bucket, then local tensors over the tensor axis to the owner
    of the weight: the groups that training uses anyway, and memory for one bucket. All ranks call it."""
    owned: dict[str, Tensor] = {}
    for bucket in engine.buckets:
        slots = bucket.layout.slots
        data_rank = owners[slots[0].weight.name][0]
        shards = _gather(bucket.state(kind), mesh.data, data_rank)
        if data_rank != mesh.data.rank:
            continue
        flat = torch.cat(shards) if len(shards) > 1 else shards[0]
        for slot in slots:
            tensor_rank = owners[slot.weight.name][1]
            locals_ = [flat[slot.start : slot.stop]]
            if bucket.layout.cut:
                locals_ = _gather(locals_[0], mesh.tensor, tensor_rank)
            if tensor_rank == mesh.tensor.rank:
                shape = slot.weight.local_shape(mesh.tensor.size)
                # Assembled on the host: the largest weights must not be on the device twice.
                owned[slot.weight.name] = slot.weight.assemble([_on_host(part).view(shape) for part in locals_])
    return owned


def _gather(part: Tensor, axis: Axis, owner: int) -> list[Tensor]:
    """Everybody's `part`, in rank order, on the owner; nothing on the others."""
    if axis.size == 1:
        return [part]
    parts = [torch.empty_like(part) for _ in range(axis.size)] if axis.rank == owner else None
    dist.gather(part.contiguous(), parts, group=axis.group, group_dst=owner)
    return parts or []


def _on_host(part: Tensor) -> Tensor:
    """A copy that training does not change any more."""
    return part.cpu() if part.device.type != "cpu" else part.clone()
