"""LoRA, low-rank adapters (Hu et al. 2021): a linear module W also adds scale · B A x, and only A
and B are trained.

An adapter belongs to one Hugging Face module, as in PEFT. Where a linear module here is several of
those in one, it carries an adapter for each, which adds to its own slice of the output. Both
weights of an adapter are rows of the table, and everything about them follows from the row of the
weight they adapt:

                  of a column-parallel weight         of a row-parallel weight
    A [r, in]     whole on every tensor rank          cut as its input columns
    B [out, r]    cut as its output rows              whole on every tensor rank
    m [out]       as B: the magnitudes of DoRA (models/dora.py), where `lora.dora` asks for them"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import sqrt
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.autograd import Function

from megalite.config import LoraConfig
from megalite.errors import ConfigError
from megalite.kernels.linear import input_gradient, linear, weight_gradient
from megalite.models.dora import Total, factors
from megalite.models.dropout import Dropout
from megalite.models.layers import Decoder, SequenceInfo
from megalite.models.weights import Uniform, Weight
from megalite.utils.spelling import did_you_mean

PREFIX = "base_model.model."
"""What PEFT puts before the names of tensors."""
ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Adapter:
    """The adapter of one Hugging Face module."""

    module: str
    """As Hugging Face names it: model.layers.0.self_attn.q_proj"""
    base: Weight
    """Row of the weight that is the module, or contains it."""
    start: int
    stop: int
    """Output features of the base that are the module's."""

    @property
    def owner(self) -> str:
        """Return the name of the megalite module that carries it."""
        return self.base.name.removesuffix(".weight")

    @property
    def short(self) -> str:
        """Return the last part of the module's name: q_proj."""
        return self.module.rpartition(".")[2]

    def matches(self, target: str) -> bool:
        """Return whether a target of `lora.targets` means this module, by PEFT's rule."""
        return target == ALL_LINEAR or is_called(self.module, target)

    def local_rows(self, tensor: int) -> slice:
        """Return the module's slice of the output features on one of `tensor` ranks."""
        ranks = tensor if self.base.shard == "column" else 1
        # Parts of a weight are cut each on its own, so a module's features keep their place among
        # the local ones, scaled down.
        return slice(self.start // ranks, self.stop // ranks)

    def rows(self, lora: LoraConfig) -> tuple[Weight, ...]:
        """Return the rows of A and B, and under DoRA that of m, for an update as `lora` says."""
        rank = lora.rank
        base, name, hf = self.base, f"{self.owner}.{self.short}", f"{PREFIX}{self.module}.lora"
        column, alone = base.shard == "column", len(base.hf) == 1
        # A cuts like the base's input, B like its output. Where the base is column-parallel, A sees
        # the whole input on every rank but, under sequence parallelism, only a slice of the tokens.
        a = Weight(
            f"{name}_a", (rank, base.shape[1]), (f"{hf}_A.weight",),
            shard=None if column else "row", unit=1 if column else base.unit,
            # kaiming_uniform_ with a = √5, as PEFT initialises A.
            init=Uniform(1 / sqrt(base.shape[1])), place=base.place, partial_grad="sequence" if column else None,
        )  # fmt: skip
        # B of a row-parallel weight is whole on every rank, but is used on the rank's part of A x:
        # so its gradient is partial.
        b = Weight(
            f"{name}_b", (self.stop - self.start, rank), (f"{hf}_B.weight",),
            shard="column" if column else None, unit=base.unit if column else 1,
            # Where one tensor has all parts, so has its adapter: cut and stored alike.
            parts=base.parts if alone else (), by_unit=base.by_unit,
            init="zeros", place=base.place, partial_grad=None if column else "heads",
        )  # fmt: skip
        if not lora.dora:
            return a, b
        # What it begins as, the norms of the base's rows, is not told by the seed:
        # `checkpoint.load.for_adapters` reads it.
        m = replace(
            b, name=f"{name}_m", shape=b.shape[:1], hf=(f"{hf}_magnitude_vector",), init="ones"
        )
        return a, b, m


def is_called(module: str, target: str) -> bool:
    """Return whether a target names a Hugging Face module, by the end of its name."""
    return module == target or module.endswith(f".{target}")


def adapters_of(weights: Sequence[Weight], lora: LoraConfig) -> list[Adapter]:
    """Return the adapters of all modules that `lora` targets. Raises ConfigError for a target that
    is no linear module of the model."""
    # All adapters that the model could have, to say in the message which there are.
    every = [adapter for weight in weights for adapter in _of_weight(weight)]
    experts = [
        name.removesuffix(".weight") for weight in weights if weight.stack for name in weight.hf
    ]
    for target in lora.targets:
        # PEFT would adapt experts by these names, too.
        if experts and (
            target == ALL_LINEAR or any(is_called(module, target) for module in experts)
        ):
            raise ConfigError(
                f"lora.targets: {target!r} means experts, too, which cannot be adapted; name modules of attention, "
                "such as q_proj and v_proj"
            )
        if not any(adapter.matches(target) for adapter in every):
            known = sorted({adapter.short for adapter in every})
            hint = did_you_mean(target, known, f"those of this model are {', '.join(known)}")
            raise ConfigError(
                f"lora.targets: no linear module is called {target!r}; {hint}, or all: {ALL_LINEAR}"
            )
    return [adapter for adapter in every if any(adapter.matches(target) for target in lora.targets)]


def _of_weight(weight: Weight) -> Iterator[Adapter]:
    """Yield an adapter for each Hugging Face module of a linear weight."""
    # Tables that are looked up, as T5's of relative positions, are no linear modules.
    if weight.shard not in ("column", "row") or len(weight.shape) != 2 or weight.is_looked_up:
        return
    # A fused weight that Hugging Face stores apart (q_proj, k_proj, v_proj) has an adapter for
    # each; one that it stores fused (Wqkv) has a single one.
    stops = [*accumulate(weight.row_groups)] if len(weight.hf) > 1 else [weight.shape[0]]
    for hf, start, stop in zip(weight.hf, [0, *stops], stops, strict=False):
        yield Adapter(hf.removesuffix(".weight"), weight, start, stop)


def with_adapters(weights: Sequence[Weight], lora: LoraConfig) -> tuple[Weight, ...]:
    """Return the table of a model whose adapters alone are trained: each weight frozen, and
    quantised as `lora` says where it could have adapters, followed by the rows of its adapters."""
    rows: dict[str, list[Weight]] = {}
    for adapter in adapters_of(weights, lora):
        rows.setdefault(adapter.base.name, []).extend(adapter.rows(lora))
    found: list[Weight] = []
    for weight in weights:
        kind = lora.quantize_base if any(_of_weight(weight)) else None
        found += [replace(weight, frozen=True, quantised=kind), *rows.get(weight.name, ())]
    return tuple(found)


def merged(
    local: Tensor, adapters: Sequence[tuple[Adapter, Sequence[Tensor]]], scale: float, tensor: int
) -> Tensor:
    """Return the local tensor of a weight on one of `tensor` ranks with its adapters' updates
    added, in fp32, to be rounded once by the caller. `adapters` come with that rank's A and B;
    under DoRA also with m, and then `tensor` must be 1. `scale` multiplies the updates."""
    # A copy in any case: `local` may be the engine's own memory.
    whole = local.float() if local.dtype != torch.float32 else local.clone()
    for adapter, (a, b, *magnitudes) in adapters:
        rows = whole[adapter.local_rows(tensor)]
        rows.addmm_(b.float(), a.float(), alpha=scale)
        for m in magnitudes:
            rows *= (m.float() / rows.norm(dim=1))[:, None]
    return whole


class _AddUpdates(Function):
    """Add scale · low Bᵀ to a slice of `out` for each B, in place: `out` is always the fresh output
    of a product."""

    @staticmethod
    def forward(
        ctx: Any, out: Tensor, low: Tensor, scale: float, slices: Sequence[slice], *bs: Tensor
    ) -> Tensor:
        ctx.mark_dirty(out)
        ctx.save_for_backward(low, *bs)
        ctx.scale, ctx.slices = scale, slices
        # [B · T, O], a view: what is added to it is added to `out`.
        features = out.view(-1, out.shape[-1])
        for rows, part, b in zip(slices, _parts(low, bs), bs, strict=True):
            # One adapter's slice of the output features; those of modules without an adapter stay.
            features[:, rows].addmm_(part, b.t(), alpha=scale)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        low, *bs = ctx.saved_tensors
        features = grad.flatten(0, -2)
        grads = [features[:, rows] for rows in ctx.slices]
        of_low = torch.cat([input_gradient(g, b) for g, b in zip(grads, bs, strict=True)], -1).mul_(
            ctx.scale
        )
        of_bs = [
            weight_gradient(g, part).mul_(ctx.scale)
            for g, part in zip(grads, _parts(low, bs), strict=True)
        ]
        # `out` was only added to, so its gradient passes through.
        return grad, of_low.view_as(low), None, None, *of_bs


def _parts(low: Tensor, bs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Split the low-rank features of all adapters into each one's."""
    return low.flatten(0, -2).split([b.shape[1] for b in bs], -1)


class AdapterDropout(Dropout):
    """Dropout on the input of adapters. Linear modules are not given places: they are those of the
    layer's current call, of the encoder's tokens where `of_source`."""

    places: SequenceInfo
    of_source = False

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, self.places)


def _tell_places(layer: nn.Module) -> None:
    """Make every call of a layer, recomputation included, give its places to the dropouts
    inside."""
    forward = layer.forward
    dropouts = [module for module in layer.modules() if isinstance(module, AdapterDropout)]

    def telling(x: Tensor, shared: Any) -> Tensor:
        # GPT-2's layers are given places themselves, Llama's a tuple that has them.
        places = getattr(shared, "places", shared)
        for dropout in dropouts:
            dropout.places = places.source.places if dropout.of_source else places
        return forward(x, shared)

    layer.forward = telling


@dataclass(frozen=True)
class Updates:
    """Add the adapters' updates to the output of a linear module. The module holds their weights,
    by the names NAME_a and NAME_b, and their `dropout`."""

    adapters: tuple[Adapter, ...]
    scale: float
    dora: bool = False

    @property
    def factors(self) -> str:
        """Return the last letters of the names of an adapter's weights."""
        return "abm" if self.dora else "ab"

    def parameters(self) -> list[str]:
        """Return the names of the adapters' weights in their module."""
        return [f"{adapter.short}_{each}" for adapter in self.adapters for each in self.factors]

    def product_bias(self, bias: Tensor | None) -> Tensor | None:
        """Return the bias that the module's own product adds; DoRA adds it behind the magnitudes,
        which `add` is given it for."""
        return None if self.dora else bias

    def add(
        self,
        module: Any,
        x: Tensor,
        out: Tensor,
        tensor: int = 1,
        enter: Callable[[Tensor], Tensor] | None = None,
        bias: Tensor | None = None,
        total: Total | None = None,
    ) -> Tensor:
        """Add to `out` [B,T,O], in place, the updates from `module`'s input `x` [B,T,I]. Each of
        `tensor` ranks holds a share of the features; `enter` takes the low-rank features into the
        tensor-parallel region. Under DoRA `out` comes without the `bias`, and `total` sums over the
        ranks that have other input features."""
        of_a, of_b = (
            [getattr(module, f"{adapter.short}_{factor}") for adapter in self.adapters]
            for factor in "ab"
        )
        if module.dropout is not None:
            x = module.dropout(x)
        # [B, T, r · adapters]: the low-rank features of all adapters beside each other.
        # One read of `x` for all of them.
        low = linear(x, torch.cat(of_a) if len(of_a) > 1 else of_a[0])
        slices = [adapter.local_rows(tensor) for adapter in self.adapters]
        out = _AddUpdates.apply(out, enter(low) if enter else low, self.scale, slices, *of_b)
        if not self.dora:
            return out
        of_m = [getattr(module, f"{adapter.short}_m") for adapter in self.adapters]
        updates = list(zip(of_a, of_b, of_m, strict=True))
        out = out * factors(module.weight, slices, updates, self.scale, total)
        return out if bias is None else out + bias


class LoraLinear(nn.Linear):
    """Linear module with adapters."""

    def __init__(self, base: nn.Linear, updates: Updates, lora: LoraConfig):
        super().__init__(base.in_features, base.out_features, base.bias is not None)
        self.dropout = (
            AdapterDropout(lora.dropout, f"{updates.adapters[0].owner}.lora")
            if lora.dropout
            else None
        )
        # In place of those just made, which took no memory on the meta device.
        self.weight, self.bias, self.updates = base.weight, base.bias, updates
        for adapter in updates.adapters:
            for row in adapter.rows(lora):
                self.register_parameter(
                    row.name.rpartition(".")[2], nn.Parameter(torch.empty(row.shape))
                )

    def forward(self, x: Tensor) -> Tensor:
        out = linear(x, self.weight, self.updates.product_bias(self.bias))
        return self.updates.add(self, x, out, bias=self.bias)


def adapt(model: Decoder, weights: Sequence[Weight], lora: LoraConfig) -> None:
    """Give the linear modules of a clean model on the meta device the adapters that `lora` asks
    for. `weights` is the table without them."""
    by_owner: dict[str, list[Adapter]] = {}
    for adapter in adapters_of(weights, lora):
        by_owner.setdefault(adapter.owner, []).append(adapter)
    for owner, adapters in by_owner.items():
        parent, _, name = owner.rpartition(".")
        base = model.get_submodule(owner)
        assert isinstance(base, nn.Linear)
        with torch.device("meta"):
            adapted = LoraLinear(base, Updates(tuple(adapters), lora.scale, lora.dora), lora)
        if adapted.dropout is not None:
            adapted.dropout.of_source = model.takes_source(owner)
        setattr(model.get_submodule(parent), name, adapted)
    # A linear's forward takes x alone; its dropout must know which tokens these are.
    for layer in model.layers.values() if lora.dropout else ():
        _tell_places(layer)
