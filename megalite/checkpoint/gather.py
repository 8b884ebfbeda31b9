"""From the shards of many ranks to whole tensors, each on one owner."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from megalite.engine.native import NativeEngine
from megalite.mesh import Mesh
from megalite.models.weights import Weight

BATCH_BYTES = 256 << 20
"""State under way at a time, so that a gather needs little more memory than what it gathers."""


def choose_owners(weights: Sequence[Weight], ranks: int) -> dict[str, int]:
    """One rank a weight, so that all ranks write about the same number of bytes. Equal on every rank."""
    load = [0] * ranks
    owners = {}
    for weight in sorted(weights, key=lambda w: -w.numel):
        rank = load.index(min(load))
        load[rank] += weight.numel
        owners[weight.name] = rank
    return owners


def gather_logical(
    weights: Sequence[Weight], kind: str, owners: dict[str, int], mesh: Mesh, engine: NativeEngine
) -> dict[str, Tensor]:
    """The logical tensors this rank owns, on the host. `kind` is "weight", "grad" or an optimizer state. All ranks
    call it."""
    owned: dict[str, Tensor] = {}
    batch: list[Weight] = []
    size = 0
    for weight in weights:
        batch.append(weight)
        size += weight.numel * 4
        if size >= BATCH_BYTES or weight is weights[-1]:
            owned |= _gather_batch(batch, kind, owners, mesh, engine)
            batch, size = [], 0
    return owned


def _gather_batch(
    weights: Sequence[Weight], kind: str, owners: dict[str, int], mesh: Mesh, engine: NativeEngine
) -> dict[str, Tensor]:
    dtype = engine.dtype if kind == "weight" else torch.float32
    locals_: dict[str, list[Tensor]] = {}
    transfers: list[dist.P2POp] = []
    me, tag = mesh.world.rank, 0
    for weight in weights:
        owner = owners[weight.name]
        sources = mesh.tensor.size if weight.shard else 1  # replicated weights come from tensor rank 0
        numel = prod(weight.local_shape(mesh.tensor.size))
        if owner == me:
            locals_[weight.name] = [torch.empty(numel, dtype=dtype, device=mesh.device) for _ in range(sources)]
        mine = dict(engine.local_state(weight.name, kind))
        for tensor_rank in range(sources):
            for piece in engine.pieces[weight.name]:
                source = mesh.rank_at(piece.data_rank, tensor_rank)
                tag += 1  # the same transfer has the same tag on both sides
                if owner == me:
                    place = locals_[weight.name][tensor_rank][piece.start : piece.stop]
                    if source == me:
                        place.copy_(mine[piece])
                    else:
                        transfers.append(dist.P2POp(dist.irecv, place, source, tag=tag))
                elif source == me:
                    transfers.append(dist.P2POp(dist.isend, mine[piece], owner, tag=tag))
    if transfers:
        for work in dist.batch_isend_irecv(transfers):
            work.wait()
    shapes = {weight.name: weight.local_shape(mesh.tensor.size) for weight in weights}
    return {
        weight.name: weight.assemble([part.view(shapes[weight.name]) for part in locals_[weight.name]]).cpu()
        for weight in weights
        if weight.name in locals_
    }
