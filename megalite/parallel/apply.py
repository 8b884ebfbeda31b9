"""What is done to a clean model, in the order in which it is done."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megalite.config import TrainConfig
from megalite.kernels import library
from megalite.mesh import Axis, Mesh
from megalite.models.layers import CausalAttention, CrossEntropy, Decoder, Dropout, RMSNorm
from megalite.models.lora import AdapterDropout, LoraLinear
from megalite.models.weights import Weight
from megalite.parallel.context import RingAttention
from megalite.parallel.stage import cut
from megalite.parallel.tensor import (
    ChunkedHead,
    ColumnParallelLinear,
    FeatureCutRMSNorm,
    PutOff,
    RowParallelLinear,
    SequenceCutEmbedding,
    VocabParallelCrossEntropy,
    VocabParallelEmbedding,
)
from megalite.plan import Plan, StageSpan


def apply_parallelism(
    model: Decoder,
    weights: Sequence[Weight],
    plan: Plan,
    span: StageSpan,
    mesh: Mesh,
    train: TrainConfig,
    later: PutOff | None = None,
) -> None:
    """Turn a clean model on the meta device into this rank's part of one stage of it, in place. `weights` is the whole
    table; `later` puts weight gradients off."""
    cut(model, span, tied=any(weight.place == "both" for weight in weights))
    if mesh.tensor.size > 1 or plan.engine == "native":  # whose linear modules give it their weight gradients
        table = {weight.name: weight for weight in weights}
        # A compiler sees nothing of what linear modules do beside computing: inside of layers they stay plain.
        parents = [model] if train.compile else list(model.modules())
        apply_tensor_parallelism(model, table, mesh.tensor, plan.sequence, later, parents)
    if train.loss_chunk and span.last:
        apply_chunked_loss(model, weights, mesh.tensor, plan.sequence, train.loss_chunk)
    if mesh.context.size > 1:
        apply_context_parallelism(model, mesh.context)
    apply_recompute(model, train)
    if train.compile:
        compile_layers(model)


def compile_layers(model: Decoder) -> None:
    library.tell_compiler()
    for layer in model.layers.values():
        for module in layer.modules():
            if isinstance(module, Dropout):
                # Of products that wrap around int64 a compiler makes constants that do not fit.
                module.drop = torch.compiler.disable(module.drop)  # type: ignore[method-assign]
        layer.forward = torch.compile(layer.forward, dynamic=False)


def apply_chunked_loss(model: Decoder, weights: Sequence[Weight], axis: Axis, sequence: bool, rows: int) -> None:
    assert isinstance(model.head.weight, nn.Parameter)
    head = ChunkedHead(model.head.weight, axis, sequence, _vocab_size(weights), rows)
    model.head, model.loss = head, nn.Identity()  # which is not asked
    model.losses = lambda x_BTD, labels_BT: head(model.norm(x_BTD), labels_BT)  # type: ignore[method-assign]


def _vocab_size(weights: Iterable[Weight]) -> int:
    """Rows of the head; where it is tied, the embedding's."""
    return [weight.shape[0] for weight in weights if weight.shard == "vocab"][-1]


def apply_context_parallelism(model: nn.Module, axis: Axis) -> None:
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, CausalAttention):
                setattr(parent, name, RingAttention(axis, child.kind))


def apply_recompute(model: Decoder, train: TrainConfig) -> None:
    """Keep less for the backward pass, and compute it again there (Chen et al. 2016). `selective` (Korthikanti et al.
    2022) takes what is large and cheap: the element-wise part of an MLP (its `shrink`), and attention where it writes
    its probabilities out; SDPA never does."""
    for layer in list(model.layers.values())[: train.recompute_layers]:
        if train.recompute == "full":
            _recompute(layer, "forward")
        elif train.recompute == "selective":
            for module in layer.modules():
                if hasattr(module, "shrink"):
                    _recompute(module, "shrink")
                if isinstance(module, CausalAttention) and module.writes_scores:
                    _recompute(module, "forward")


def _recompute(module: nn.Module, method: str) -> None:
    # Dropout takes its masks from keys, so that there is no generator to be put back.
    again = partial(checkpoint, getattr(module, method), use_reentrant=False, preserve_rng_state=False)
    setattr(module, method, again)


def apply_tensor_parallelism(
    model: nn.Module,
    table: dict[str, Weight],
    axis: Axis,
    sequence: bool,
    later: PutOff | None,
    parents: Sequence[nn.Module],
) -> None:
    """Swap each child of `parents` for its parallel counterpart, as the table says how its weight is cut. Tied weights
    stay tied."""
    shrunk: dict[Tensor, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        local = parameter.new_empty(table[name].local_shape(axis.size))
        shrunk[parameter] = nn.Parameter(local) if axis.size > 1 else parameter  # a swapped head stays tied
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    for parent in parents:
        for child_name, child in list(parent.named_children()):
            swapped = _counterpart(child, shrunk, names, table, axis, sequence, later)
            if swapped is not None:
                setattr(parent, child_name, swapped)


def _counterpart(
    child: nn.Module,
    shrunk: dict[Tensor, nn.Parameter],
    names: dict[Tensor, str],
    table: dict[str, Weight],
    axis: Axis,
    sequence: bool,
    later: PutOff | None,
) -> nn.Module | None:
    if axis.size == 1 and not isinstance(child, nn.Linear):
        return None
    if isinstance(child, CrossEntropy):
        return VocabParallelCrossEntropy(axis, _vocab_size(table.values()))
    if isinstance(child, Dropout) and not isinstance(child, AdapterDropout):
        # Attention probabilities are cut by heads in any case, hidden states only along a cut sequence.
        if sequence or child.over_heads:
            child.shard = (axis.rank, axis.size)
        return None
    if not isinstance(child, nn.Linear | nn.Embedding | RMSNorm):
        return None
    weight = shrunk[child.weight]
    shard = table[names[child.weight]].shard
    if isinstance(child, RMSNorm):
        return FeatureCutRMSNorm(weight, child.eps, axis) if shard == "column" else None
    if isinstance(child, nn.Linear):
        bias = None if child.bias is None else shrunk[child.bias]
        assert shard in ("row", "column", "vocab"), (
            f"{names[child.weight]}: replicated linear modules are not supported"
        )
        kind = RowParallelLinear if shard == "row" else ColumnParallelLinear
        swapped = kind(weight, bias, axis, sequence, later)
        if isinstance(child, LoraLinear):
            swapped.adapt(child, {name: shrunk[getattr(child, name)] for name in child.updates.parameters()})
        return swapped
    if shard == "vocab":
        return VocabParallelEmbedding(weight, axis, sequence)
    return SequenceCutEmbedding(weight, axis) if sequence else None
