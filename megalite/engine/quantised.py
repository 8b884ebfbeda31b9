"""Frozen weights that a rank holds in few bits (QLoRA). They are whole on each replica, have no
gradient and lie in no bucket's memory."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from megalite.comm.mesh import Mesh
from megalite.engine import ReadState
from megalite.engine.layout import Bucket
from megalite.kernels.quantised import KINDS, Int8, Nf4, QuantisedWeight
from megalite.models.sharding import local_part
from megalite.models.weights import Weight


class QuantisedBucket:
    """Holds the quantised weights of one bucket on one rank."""

    def __init__(self, layout: Bucket, mesh: Mesh):
        self.layout, self.mesh = layout, mesh
        self.weights: dict[str, QuantisedWeight] = {}
        for slot in layout.slots:
            assert slot.weight.quantised is not None
            self.weights[slot.weight.name] = QuantisedWeight(slot.weight.quantised, mesh.device)

    def load(self, read: ReadState) -> None:
        """Quantise each weight as a whole, one after another, and keep this rank's part."""
        for slot in self.layout.slots:
            self._load(slot.weight, read)

    def _load(self, weight: Weight, read: ReadState) -> None:
        parameter, device = self.weights[weight.name], self.mesh.device
        # A weight that no rank shares is read whole.
        uncut = replace(weight, shard=None)
        whole = read(uncut, "weight", 0, weight.numel).to(device).view(weight.shape)
        numbers, place = in_few_bits(weight, whole)
        rows, columns = local_part(weight, self.mesh.tensor.rank, self.mesh.tensor.size)
        parameter.adopt(numbers.part(place[rows].to(device), columns))


def in_few_bits(weight: Weight, whole: Tensor) -> tuple[Nf4 | Int8, Tensor]:
    """Return the numbers of a whole matrix, and in which row of them each of its rows is, int64 on
    the host."""
    assert weight.quantised is not None
    # Each of the tensors that the hub has it as is quantised on its own, in its own order of rows,
    # as another program would that knows no fused weights.
    order = weight.hf_order()
    numbers = KINDS[weight.quantised].of([whole[rows.to(whole.device)] for rows in order])
    place = torch.empty(weight.num_rows, dtype=torch.int64)
    place[torch.cat(order)] = torch.arange(weight.num_rows)
    return numbers, place
