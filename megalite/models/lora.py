"""Low-rank adapters (Hu et al. 2021): a linear module W also adds scale · B A x, and of the model only A and B are
trained.

An adapter belongs to one Hugging Face module, as PEFT has it. Where a linear module here is several of those in one, it
carries an adapter for each, which adds to its own slice of the output. Both weights of an adapter are rows of the
table, and everything about them follows from the row of the weight they adapt:

                  of a column-parallel weight         of a row-parallel weight
    A [r, in]     whole on every tensor rank          cut as its input columns
    B [out, r]    cut as its output rows              whole on every tensor rank
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import sqrt
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from megalite.config import LoraConfig
from megalite.errors import ConfigError
from megalite.models.layers import Decoder, Dropout, Places
from megalite.models.weights import Uniform, Weight

PREFIX = "base_model.model."
"""Of PEFT's names."""
ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Adapter:
    """Of one Hugging Face module."""

    module: str
    """As Hugging Face names it: model.layers.0.self_attn.q_proj"""
    base: Weight
    """The row of the weight that the module is, or is a part of."""
    start: int
    stop: int
    """Output features of the base that are the module's."""

    @property
    def owner(self) -> str:
        """The megalite module that carries it."""
        return self.base.name.removesuffix(".weight")

    @property
    def short(self) -> str:
        return self.module.rpartition(".")[2]

    def matches(self, target: str) -> bool:
        """PEFT's rule."""
        return target == ALL_LINEAR or self.module == target or self.module.endswith(f".{target}")

    def local_rows(self, tensor: int) -> slice:
        """Output features of one of `tensor` ranks that are the module's."""
        ranks = tensor if self.base.shard == "column" else 1
        return slice(self.start // ranks, self.stop // ranks)

    def rows(self, rank: int) -> tuple[Weight, Weight]:
        """Of A and B."""
        base, name, hf = self.base, f"{self.owner}.{self.short}", f"{PREFIX}{self.module}.lora"
        column, alone = base.shard == "column", len(base.hf) == 1
        a = Weight(
            f"{name}_a", (rank, base.shape[1]), (f"{hf}_A.weight",),
            shard=None if column else "row", unit=1 if column else base.unit,
            # kaiming_uniform_ with a = √5, which is what PEFT does.
            init=Uniform(1 / sqrt(base.shape[1])), place=base.place, partial_grad="sequence" if column else None,
        )  # fmt: skip
        b = Weight(
            f"{name}_b", (self.stop - self.start, rank), (f"{hf}_B.weight",),
            shard="column" if column else None, unit=base.unit if column else 1,
            parts=base.parts if alone else (), by_unit=base.by_unit,
            init="zeros", place=base.place, partial_grad=None if column else "heads",
        )  # fmt: skip
        return a, b


def adapters_of(weights: Sequence[Weight], lora: LoraConfig) -> list[Adapter]:
    """Of all modules that `lora` asks for. Raises ConfigError for a target that is no linear module of the model."""
    every = [adapter for weight in weights for adapter in _of_weight(weight)]
    for target in lora.targets:
        if not any(adapter.matches(target) for adapter in every):
            known = sorted({adapter.short for adapter in every})
            close = difflib.get_close_matches(target, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"those of this model are {', '.join(known)}"
            raise ConfigError(f"lora.targets: no linear module is called {target!r}; {hint}, or all: {ALL_LINEAR}")
    return [adapter for adapter in every if any(adapter.matches(target) for target in lora.targets)]


def _of_weight(weight: Weight) -> Iterator[Adapter]:
    if weight.shard not in ("column", "row") or len(weight.shape) != 2:
        return
    stops = [*accumulate(weight.row_groups)] if len(weight.hf) > 1 else [weight.shape[0]]
    for hf, start, stop in zip(weight.hf, [0, *stops], stops, strict=False):
        yield Adapter(hf.removesuffix(".weight"), weight, start, stop)


def with_adapters(weights: Sequence[Weight], lora: LoraConfig) -> tuple[Weight, ...]:
    """The table of a model of which only adapters are trained: each weight frozen, and behind it the rows of its
    adapters."""
    rows: dict[str, list[Weight]] = {}
    for adapter in adapters_of(weights, lora):
        rows.setdefault(adapter.base.name, []).extend(adapter.rows(lora.rank))
    return tuple(row for w in weights for row in (replace(w, frozen=True), *rows.get(w.name, ())))


def merged(local: Tensor, adapters: Sequence[tuple[Adapter, Tensor, Tensor]], scale: float, tensor: int) -> Tensor:
    """Return the local tensor of a weight on one of `tensor` ranks with what its adapters, given with that rank's A and
    B, add to it: in fp32, which whoever takes it rounds once."""
    whole = local.float() if local.dtype != torch.float32 else local.clone()
    for adapter, a, b in adapters:
        whole[adapter.local_rows(tensor)].addmm_(b.float(), a.float(), alpha=scale)
    return whole


class _AddUpdates(Function):
    """Adds scale · low Bᵀ to a slice of `out` for each B, in place: `out` is always the fresh output of a product."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, low: Tensor, scale: float, slices: Sequence[slice], *bs: Tensor) -> Tensor:
        ctx.mark_dirty(out)
        ctx.save_for_backward(low, *bs)
        ctx.scale, ctx.slices = scale, slices
        features = out.view(-1, out.shape[-1])
        for rows, part, b in zip(slices, _parts(low, bs), bs, strict=True):
            features[:, rows].addmm_(part, b.t(), alpha=scale)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        low, *bs = ctx.saved_tensors
        features = grad.flatten(0, -2)
        grads = [features[:, rows] for rows in ctx.slices]
        of_low = torch.cat([g @ b for g, b in zip(grads, bs, strict=True)], -1).mul_(ctx.scale)
        of_bs = [(g.t() @ part).mul_(ctx.scale) for g, part in zip(grads, _parts(low, bs), strict=True)]
        return grad, of_low.view_as(low), None, None, *of_bs


def _parts(low: Tensor, bs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return low.flatten(0, -2).split([b.shape[1] for b in bs], -1)


class AdapterDropout(Dropout):
    """Of what the adapters of a linear module take. Linear modules are not told places: those are of the layer's call
    under way."""

    places: Places

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, self.places)


def _tell_places(layer: nn.Module) -> None:
    """Let every call of a layer, also one that computes it again, tell the dropouts in it whose places it is about."""
    forward, dropouts = layer.forward, [module for module in layer.modules() if isinstance(module, AdapterDropout)]

    def telling(x: Tensor, shared: Any) -> Tensor:
        for dropout in dropouts:
            dropout.places = getattr(shared, "places", shared)
        return forward(x, shared)

    layer.forward = telling


@dataclass(frozen=True)
class Updates:
    """What the adapters of a linear module add to its output. The module holds their weights, by the names NAME_a and
    NAME_b, and their `dropout`."""

    adapters: tuple[Adapter, ...]
    scale: float

    def parameters(self) -> list[str]:
        return [f"{adapter.short}_{factor}" for adapter in self.adapters for factor in "ab"]

    def add(
        self,
        module: Any,
        x: Tensor,
        out: Tensor,
        tensor: int = 1,
        enter: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """To `out` [B,T,O], in place, from the module's input `x` [B,T,I]. Of `tensor` ranks each holds a share of
        the features; `enter` is the way from what all ranks share to what each goes on with for its own."""
        of_a, of_b = ([getattr(module, f"{adapter.short}_{factor}") for adapter in self.adapters] for factor in "ab")
        if module.dropout is not None:
            x = module.dropout(x)
        low = F.linear(x, torch.cat(of_a) if len(of_a) > 1 else of_a[0])  # one look at `x` for all of them
        slices = [adapter.local_rows(tensor) for adapter in self.adapters]
        return _AddUpdates.apply(out, enter(low) if enter else low, self.scale, slices, *of_b)


class LoraLinear(nn.Linear):
    """A linear module with adapters."""

    def __init__(self, base: nn.Linear, updates: Updates, rank: int, dropout: float):
        super().__init__(base.in_features, base.out_features, base.bias is not None)
        self.dropout = AdapterDropout(dropout, f"{updates.adapters[0].owner}.lora") if dropout else None
        self.weight, self.bias, self.updates = base.weight, base.bias, updates
        for adapter in updates.adapters:
            for row in adapter.rows(rank):
                self.register_parameter(row.name.rpartition(".")[2], nn.Parameter(torch.empty(row.shape)))

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        # With a bias it comes as a view, which autograd would let nobody change in place.
        return self.updates.add(self, x, torch.ops.aten._unsafe_view(out, out.shape))


def adapt(model: Decoder, weights: Sequence[Weight], lora: LoraConfig) -> None:
    """Give the linear modules of a clean model on the meta device their adapters. `weights` is the table without
    them."""
    by_owner: dict[str, list[Adapter]] = {}
    for adapter in adapters_of(weights, lora):
        by_owner.setdefault(adapter.owner, []).append(adapter)
    for owner, adapters in by_owner.items():
        parent, _, name = owner.rpartition(".")
        base = model.get_submodule(owner)
        assert isinstance(base, nn.Linear)
        with torch.device("meta"):
            adapted = LoraLinear(base, Updates(tuple(adapters), lora.scale), lora.rank, lora.dropout)
        setattr(model.get_submodule(parent), name, adapted)
    for layer in model.layers.values() if lora.dropout else ():
        _tell_places(layer)
