"""What is done to a clean model, in the order in which it is done."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn as nn
from torch import Tensor

from megalite.mesh import Axis, Mesh
from megalite.models.layers import CrossEntropy, Dropout
from megalite.models.weights import Weight
from megalite.parallel.tensor import (
    ColumnParallelLinear,
    RowParallelLinear,
    SequenceCutEmbedding,
    VocabParallelCrossEntropy,
    VocabParallelEmbedding,
)


def apply_parallelism(model: nn.Module, weights: Sequence[Weight], mesh: Mesh, sequence: bool) -> None:
    """Turn a clean model on the meta device into this rank's part of it, in place."""
    if mesh.tensor.size > 1:
        apply_tensor_parallelism(model, {weight.name: weight for weight in weights}, mesh.tensor, sequence)


def apply_tensor_parallelism(model: nn.Module, table: dict[str, Weight], axis: Axis, sequence: bool) -> None:
    """Swap each module for its parallel counterpart, as the table says how its weight is cut. Tied weights stay
    tied."""
    shrunk: dict[Tensor, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        local = parameter.new_empty(table[name].local_shape(axis.size))
        shrunk[parameter] = nn.Parameter(local)
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    for parent in list(model.modules()):
        for child_name, child in list(parent.named_children()):
            swapped = _counterpart(child, shrunk, names, table, axis, sequence)
            if swapped is not None:
                setattr(parent, child_name, swapped)


def _counterpart(
    child: nn.Module,
    shrunk: dict[Tensor, nn.Parameter],
    names: dict[Tensor, str],
    table: dict[str, Weight],
    axis: Axis,
    sequence: bool,
) -> nn.Module | None:
    if isinstance(child, CrossEntropy):
        vocab_size = next(weight.shape[0] for weight in table.values() if weight.shard == "vocab")
        return VocabParallelCrossEntropy(axis, vocab_size)
    if isinstance(child, Dropout):
        # Attention probabilities are cut by heads in any case, hidden states only along a cut sequence.
        if sequence or child.over_heads:
            child.shard_rank = axis.rank
        return None
    if not isinstance(child, nn.Linear | nn.Embedding):
        return None
    weight = shrunk[child.weight]
    shard = table[names[child.weight]].shard
    if isinstance(child, nn.Linear):
        bias = None if child.bias is None else shrunk[child.bias]
        if shard == "row":
            return RowParallelLinear(weight, bias, axis, sequence)
        assert shard in ("column", "vocab"), f"{names[child.weight]}: replicated linear modules are not supported yet"
        return ColumnParallelLinear(weight, bias, axis, sequence)
    if shard == "vocab":
        return VocabParallelEmbedding(weight, axis, sequence)
    return SequenceCutEmbedding(weight, axis) if sequence else None
