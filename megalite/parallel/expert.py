"""A mixture of experts on tensor ranks: each rank holds some inner features of every expert, so that experts are cut
as a dense MLP is, and the same tokens visit them on all ranks.

Each rank routes the tokens that it has between blocks (its slice of the sequence under sequence parallelism). Then the
tokens enter the tensor-parallel region together with the weights of their experts, whose gradient is partial, too."""

from __future__ import annotations

import torch.nn as nn
from torch import Tensor

from megalite.comm.collectives import all_gather
from megalite.comm.mesh import Axis
from megalite.kernels.experts import GroupedWgradCallback, Groups, grouped_linear
from megalite.kernels.linear import WeightGradStore
from megalite.models.experts import Experts, GroupedLinear
from megalite.parallel.tensor import SEQUENCE, enter, leave


class ParallelGroupedLinear(GroupedLinear):
    """Hold this rank's part of a stack of matrices.

    An engine that takes weight-gradient GEMMs sets `wgrad_callback`; `later` defers them (see `ParallelLinear`)."""

    def __init__(self, weight: nn.Parameter, later: WeightGradStore | None):
        nn.Module.__init__(self)
        self.weight, self.later = weight, later
        self.wgrad_callback: GroupedWgradCallback | None = None

    def forward(self, x: Tensor, groups: Groups, gather: bool = False) -> Tensor:
        return grouped_linear(x, self.weight, groups, gather, self.wgrad_callback, self.later)


class TensorParallelExperts(Experts):
    """Hold some inner features of every expert. The partial outputs are summed over the tensor ranks."""

    def __init__(self, experts: Experts, axis: Axis, sequence: bool):
        nn.Module.__init__(self)
        self.gate_up, self.down = experts.gate_up, experts.down
        self.axis, self.sequence = axis, sequence

    def forward(self, x_BTD: Tensor, weight_BTK: Tensor, index_BTK: Tensor) -> Tensor:
        if self.sequence:
            index_BTK = all_gather(index_BTK, self.axis, SEQUENCE)
        x_BTD, weight_BTK = (enter(part, self.axis, self.sequence) for part in (x_BTD, weight_BTK))
        return leave(super().forward(x_BTD, weight_BTK, index_BTK), self.axis, self.sequence)
