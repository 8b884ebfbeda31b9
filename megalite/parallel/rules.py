"""Rules that replace a module by its tensor-, sequence- or context-parallel counterpart, by its
type.

A model is written for one device. `apply_rules` walks over its modules and asks the rule of each
one's type (or of the nearest base class that has one) for a counterpart on this rank, which takes
its place. A module without a rule stays, and every parameter that is cut becomes this rank's part
of it. So a module of a new family needs a rule only where it must communicate, or must know which
part it holds:

    @rule(MyRouter)
    def _(router: MyRouter, layout: Layout) -> nn.Module | None: ..."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, Literal, TypeVar

import torch.nn as nn
from torch import Tensor

from megalite.comm.mesh import Axis, Fold, Mesh
from megalite.errors import ConfigError
from megalite.kernels.linear import WeightGradStore
from megalite.models.bert import SentenceHead
from megalite.models.core_attention import CoreAttention
from megalite.models.dropout import Dropout
from megalite.models.experts import Experts, GroupedLinear
from megalite.models.latent import LatentAttention
from megalite.models.layer_loss import LayerLoss
from megalite.models.layers import ColumnLoss, CrossEntropy, RMSNorm
from megalite.models.lora import AdapterDropout, LoraLinear
from megalite.models.weights import Weight
from megalite.parallel.context import RingAttention
from megalite.parallel.expert import ParallelExperts, ParallelGroupedLinear
from megalite.parallel.gathered import GatheredAttention
from megalite.parallel.outputs import gather_sequence
from megalite.parallel.overlap import OVERLAPPED
from megalite.parallel.tensor import (
    ColumnParallelLinear,
    FeatureCutRMSNorm,
    ReplicatedLinear,
    RowParallelLinear,
    SequenceCutEmbedding,
    VocabParallelCrossEntropy,
    VocabParallelEmbedding,
    enter,
    leave,
    vocab_columns,
)
from megalite.parallel.ulysses import UlyssesAttention
from megalite.plan import Plan

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Layout:
    """Everything a rule may ask about this rank and about the weights of the module at hand."""

    tensor: Axis
    context: Axis
    context_method: Literal["ring", "ulysses"]
    experts: Fold
    """How experts are shared."""
    sequence: bool
    """Sequence parallelism is on: between blocks, activations are cut along the sequence over the
    tensor ranks."""
    tensor_overlap: bool
    """Whether the collectives of that overlap with products; see `parallel.overlap`."""
    vocab_size: int
    rows: Mapping[Tensor, Weight]
    """Row of the weight table, by the parameter of the whole model."""
    locals: Mapping[Tensor, nn.Parameter]
    """This rank's part, by the parameter of the whole model."""
    gives_products: bool
    """Whether the engine takes the weight-gradient GEMMs of linear modules."""
    later: WeightGradStore | None
    """Store that defers these GEMMs; see `WeightGradStore`."""

    def local(self, parameter: Tensor | None) -> nn.Parameter | None:
        """Return this rank's part of `parameter`, a parameter of the whole model; None for None."""
        return None if parameter is None else self.locals[parameter]

    def take_locals(self, module: nn.Module) -> None:
        """Give a module this rank's part of each of its own parameters."""
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, self.locals[parameter])


Rule = Callable[[Any, Layout], nn.Module | None]
"""(module, layout) → the module that takes its place, or None where it stays, perhaps changed."""

_rules: dict[type[nn.Module], Rule] = {}


def rule(kind: type[Module]) -> Callable[[Callable[[Module, Layout], nn.Module | None]], Rule]:
    """Return a decorator that makes a function the rule of a type of module, and of subclasses
    without their own."""

    def add(function: Rule) -> Rule:
        if kind in _rules:
            raise ConfigError(
                f"{kind.__name__} has a rule for parallelism already; give one to a subclass of it"
            )
        _rules[kind] = function
        return function

    return add


def apply_rules(parents: Sequence[nn.Module], layout: Layout) -> None:
    """Replace each child of `parents`, a model and modules in it, by its counterpart, and all
    parameters by this rank's part of them. Tied weights stay tied."""
    # A parent's rule may look at its children, and should find them parallel already. modules()
    # lists parents first.
    for parent in reversed(parents):  # children before their parents
        for name, child in list(parent.named_children()):
            found = _counterpart(child, layout)
            if found is not None:
                setattr(parent, name, found)
            else:
                layout.take_locals(child)
    # The model's own parameters; it is nobody's child.
    layout.take_locals(parents[0])


def _counterpart(module: nn.Module, layout: Layout) -> nn.Module | None:
    """Return what takes the place of `module` by the rule of its nearest type; None where it
    stays."""
    # From the type itself up through its base classes: the nearest with a rule decides.
    for kind in type(module).__mro__:
        if kind in _rules:
            return _rules[kind](module, layout)
    return None


def make_layout(
    model: nn.Module,
    weights: Iterable[Weight],
    plan: Plan,
    mesh: Mesh,
    later: WeightGradStore | None,
) -> Layout:
    """Describe a model with whole weights, of which this rank is to have its part under `plan` and
    `mesh`. `weights` is the whole table; `later` defers weight-gradient GEMMs."""
    table = {weight.name: weight for weight in weights}
    rows: dict[Tensor, Weight] = {}
    locals_: dict[Tensor, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        # By parameter and not by name: a tied weight is one parameter under two names, and
        # named_parameters gives it once, so both modules get the same local part.
        rows[parameter] = table[name]
        cut = mesh.fold_of(table[name]).cut
        local = parameter.new_empty(table[name].local_shape(*cut))
        locals_[parameter] = nn.Parameter(local) if cut.holders > 1 else parameter
    return Layout(
        mesh.tensor,
        mesh.context,
        plan.context_method,
        mesh.experts,
        plan.sequence,
        plan.tensor_overlap,
        vocab_size_of(table.values()),
        rows,
        locals_,
        gives_products=plan.engine == "native",
        later=later,
    )


def vocab_size_of(weights: Iterable[Weight]) -> int:
    """Return the number of rows of the head or, where it is tied, of the embedding."""
    # The table ends with the head, where there is one of its own.
    return [weight.shape[0] for weight in weights if weight.shard == "vocab"][-1]


# --- the rules ------------------------------------------------------------------------------------


@rule(nn.Linear)
def _(linear: nn.Linear, layout: Layout) -> nn.Module | None:
    # On one rank it is still replaced where the engine takes weight-gradient GEMMs: `native` adds
    # them in fp32 straight into its buckets.
    if layout.tensor.size == 1 and not layout.gives_products:
        return None
    weight = layout.locals[linear.weight]
    # How a weight is cut in the table decides which linear it becomes; no family says it twice.
    linears = LINEAR | OVERLAPPED if layout.tensor_overlap else LINEAR
    kind = linears[layout.rows[linear.weight].shard if layout.tensor.size > 1 else None]
    found = kind(weight, layout.local(linear.bias), layout.tensor, layout.sequence, layout.later)
    if isinstance(linear, LoraLinear):
        found.adapt(
            linear,
            {name: layout.locals[getattr(linear, name)] for name in linear.updates.parameters()},
        )
    return found


LINEAR = {
    "column": ColumnParallelLinear, "vocab": ColumnParallelLinear, "row": RowParallelLinear, None: ReplicatedLinear
}  # fmt: skip


@rule(GroupedLinear)
def _(linear: GroupedLinear, layout: Layout) -> nn.Module | None:
    if layout.experts.holders.size == 1 and not layout.gives_products:
        return None
    weight, bias = layout.locals[linear.weight], layout.local(linear.bias)
    return ParallelGroupedLinear(weight, bias, layout.experts.tensor, layout.later)


@rule(Experts)
def _(experts: Experts, layout: Layout) -> nn.Module | None:
    if layout.experts.holders.size == 1:
        return None
    # Only tensor ranks can have the same tokens. All others have their own, as slices of a sequence
    # are. Then the ranks that share each expert's features are the tensor ranks, and all of these
    # hold the whole sequence.
    fold = layout.experts
    same_tokens = fold.tensor.size == layout.tensor.size and not layout.sequence
    # Expert ranks within the tensor ranks.
    all_tokens = fold.holders.size == layout.tensor.size and not (layout.sequence or same_tokens)
    return ParallelExperts(experts, fold, not same_tokens, all_tokens)


@rule(LatentAttention)
def _(attention: LatentAttention, layout: Layout) -> None:
    # Queries, keys and values enter the tensor-parallel region in their column-parallel linears;
    # the keys' part with positions goes through none of these, and enters on its own.
    attention.enter = partial(enter, axis=layout.tensor, sequence=layout.sequence)


@rule(nn.Embedding)
def _(embedding: nn.Embedding, layout: Layout) -> nn.Module | None:
    if layout.tensor.size == 1:
        return None
    weight = layout.locals[embedding.weight]
    if layout.rows[embedding.weight].shard == "vocab":
        return VocabParallelEmbedding(weight, layout.tensor, layout.sequence)
    # Position and token-type embeddings are whole on each rank.
    return SequenceCutEmbedding(weight, layout.tensor) if layout.sequence else None


@rule(RMSNorm)
def _(norm: RMSNorm, layout: Layout) -> nn.Module | None:
    # Norms over whole hidden states are replicated and stay as they are.
    if layout.tensor.size > 1 and layout.rows[norm.weight].shard == "column":
        return FeatureCutRMSNorm(layout.locals[norm.weight], norm.eps, layout.tensor)
    return None


@rule(CrossEntropy)
def _(loss: CrossEntropy, layout: Layout) -> nn.Module | None:
    return (
        VocabParallelCrossEntropy(layout.tensor, layout.vocab_size)
        if layout.tensor.size > 1
        else None
    )


@rule(SentenceHead)
def _(head: SentenceHead, layout: Layout) -> None:
    # Its linears are replicated, and see this rank's tokens where a sequence is cut.
    if layout.sequence and layout.tensor.size > 1:
        head.gather = partial(gather_sequence, axis=layout.tensor)


@rule(ColumnLoss)
def _(loss: ColumnLoss, layout: Layout) -> None:
    if layout.tensor.size > 1:
        loss.columns = partial(vocab_columns, axis=layout.tensor, vocab_size=layout.vocab_size)
        loss.over_ranks = partial(leave, axis=layout.tensor, sequence=False)


@rule(Dropout)
def _(dropout: Dropout, layout: Layout) -> None:
    if dropout.over_features:
        dropout.features = (layout.tensor.rank, layout.tensor.size)
    # Attention probabilities are cut by heads in any case, hidden states only along a cut sequence.
    elif layout.sequence or dropout.over_heads:
        dropout.shard = (layout.tensor.rank, layout.tensor.size)
    dropout.parts = layout.context.size


@rule(LayerLoss)
def _(loss: LayerLoss, layout: Layout) -> None:
    tensor = [layout.tensor] if layout.sequence else []
    axes = [axis for axis in (layout.context, *tensor) if axis.size > 1]

    def over_row(x: Tensor) -> Tensor:
        # A loss over a row of the batch (load balance) needs the row's sum over all ranks that have
        # a slice of it. Each of them then counts its share of the loss, or it would be counted n
        # times.
        for axis in axes:
            x = leave(x, axis, sequence=False)
        return x

    loss.over_row, loss.row_share = over_row, 1 / prod(axis.size for axis in axes)
    # Without sequence parallelism tensor ranks see the same tokens; one of them reports.
    loss.counts = layout.sequence or layout.tensor.rank == 0


@rule(AdapterDropout)
def _(dropout: AdapterDropout, layout: Layout) -> None:
    """Leave it to the rule of its linear module, which knows how its input is cut."""


@rule(CoreAttention)
def _(attention: CoreAttention, layout: Layout) -> None:
    if layout.context.size == 1:
        return
    if attention.biased or attention.crosses:
        attention.gathering = GatheredAttention(layout.context)
        return
    by_heads = layout.context_method == "ulysses"
    if attention.writes_scores and not (by_heads and attention.dropout is None):
        raise ConfigError(
            f"parallel.context = {layout.context.size} must be 1 for this model: "
            + (
                "Ulysses attention drops nothing"
                if by_heads
                else "ring attention has no scores to cap or to drop"
            )
        )
    strategy = UlyssesAttention(layout.context) if by_heads else RingAttention(layout.context)
    attention.strategy, attention.logits_of = strategy, strategy.largest_logits
