"""Scales the inputs of matrices before these are rounded, and by the inverse whatever makes the
inputs, so that the model computes what it did: AWQ (Lin et al. 2023) so that weights of large
inputs lose less, SmoothQuant (Xiao et al. 2022) so that inputs have fewer outliers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megalite.errors import ConfigError
from megalite.kernels.schemes import Scheme

STEPS = 20
"""Exponents that AWQ tries: 0, 1/20, … 19/20."""
SMOOTHING = 0.5
"""SmoothQuant's share of the outliers that weights take over, as an exponent."""


@dataclass(frozen=True)
class InputStats:
    """What went into a matrix of K input features, over all tokens."""

    products: Tensor
    """Sum of x xᵀ, fp64 [K, K]."""
    mean: Tensor
    """Mean of |x|, fp32 [K]."""
    largest: Tensor
    """Largest |x|, fp32 [K]."""


Scales = Callable[[Tensor, InputStats], Tensor]
"""(weight, fp32 [N, K], what goes into it) → the factors of its inputs' weights, fp32 [K]."""


def awq(weight: Tensor, inputs: InputStats, scheme: Scheme, dtype: torch.dtype) -> Tensor:
    """Return the power of the mean inputs with which rounding under `scheme` changes the outputs
    least. `dtype` is that of the stored scales."""
    best, least = torch.ones_like(inputs.mean), float("inf")
    for step in range(STEPS):
        factors = inputs.mean.pow(step / STEPS).clamp(min=1e-4)
        # Around 1, as AWQ's own code has it: only their ratios matter, within the range of a dtype.
        factors = factors / (factors.max() * factors.min()).sqrt()
        scaled = weight * factors
        spread = scheme.spread(scheme.scales(scaled, dtype), tuple(weight.shape))
        off = (scheme.decode(scheme.encode(scaled, spread), spread) / factors - weight).double()
        # Σ |off · x|², of all tokens at once.
        lost = float(((off @ inputs.products) * off).sum())
        if lost < least:
            best, least = factors, lost
    return best


def smoothquant(weight: Tensor, inputs: InputStats) -> Tensor:
    """Return max|x|^α / max|w|^(1−α) of each input feature."""
    of_weights = weight.abs().amax(0).clamp(min=1e-5)
    factors = inputs.largest.pow(SMOOTHING) / of_weights.pow(1 - SMOOTHING)
    return factors.clamp(min=1e-5)


class Site(NamedTuple):
    """A matrix whose inputs can be scaled."""

    producer: str
    """Module that makes them, a norm, or a linear whose last outputs they are."""
    consumer: str


def sites(layer: str, shapes: Mapping[str, tuple[int, ...]], norms_only: bool) -> list[Site]:
    """Return the matrices of a layer, by the beginning of their names, that may be scaled, from
    first to last. `shapes` are those of the weights, by name."""

    def shape(module: str) -> tuple[int, ...]:
        return shapes.get(f"{layer}.{module}.weight", ())

    first = "mlp.gate_up" if shape("mlp.gate_up") else "mlp.up"
    found = [Site("attention_norm", "attention.qkv"), Site("mlp_norm", first)]
    if not norms_only:
        # Values reach the output projection as they are, where each head has its own.
        found.insert(1, Site("attention.qkv", "attention.out"))
        # The linear part of a gated MLP multiplies what the activation lets through.
        found.append(Site("mlp.gate_up", "mlp.down"))
    # How many times as many outputs the producer has: queries, keys and values; gate and linear part.
    # Fewer are shared by several heads, and cannot be scaled for each.
    times = {"attention.out": 3, "mlp.down": 2}
    fitting = []
    for site in found:
        made, taken = shape(site.producer), shape(site.consumer)
        if made and taken and made[0] == taken[1] * times.get(site.consumer, 1):
            fitting.append(site)
    return fitting


class Scaling:
    """Scales the layers of a model, one after another."""

    def __init__(self, scales: Scales, norms_only: bool):
        self.scales, self.norms_only = scales, norms_only

    def apply(
        self,
        model: nn.Module,
        layer: int,
        inputs: Mapping[str, InputStats],
        run: Callable[[], Tensor],
    ) -> dict[str, Tensor]:
        """Scale a layer, in place. `inputs` are those of its matrices, by their weights' names;
        `run` runs the layer.

        Returns the parameters that changed, by name, fp32. Raises ConfigError where there is
        nothing to scale."""
        prefix = f"layers.{layer}"
        parameters = {n: p for n, p in model.named_parameters() if n.startswith(f"{prefix}.")}
        shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        found = []
        for site in sites(prefix, shapes, self.norms_only):
            fold = partial(_fold, model, prefix, site, parameters)
            if _keeps(fold, parameters, run):
                found.append(site)
        if not found:
            raise ConfigError(
                f"layer {layer} has no norm in front of a matrix alone, whose inputs could be scaled; quantise this "
                "model by --method rtn or gptq"
            )
        exact = {name: parameter.float().clone() for name, parameter in parameters.items()}
        # From first to last: the factors of one are of weights that those before it have changed.
        for site in found:
            name = f"{prefix}.{site.consumer}.weight"
            _fold(model, prefix, site, exact, self.scales(exact[name], inputs[name]))
        changed = {n: x for n, x in exact.items() if not torch.equal(x, parameters[n].float())}
        for name, value in changed.items():
            parameters[name].copy_(value)
        return changed


def _keeps(
    fold: Callable[[Tensor], None], parameters: Mapping[str, Tensor], run: Callable[[], Tensor]
) -> bool:
    """Return whether scaling changes nothing: a norm may feed other modules as well, or stand
    behind the matrix. Parameters are as before."""
    before, kept = run(), {name: x.clone() for name, x in parameters.items()}
    fold(torch.tensor(2.0))  # a power of two, by which nothing is rounded
    after = run()
    for name, parameter in parameters.items():
        parameter.copy_(kept[name])
    # 1 + weight, of Gemma's norms, is rounded anew; anything else is exact.
    return bool((after - before).float().norm() <= 1e-2 * before.float().norm())


def _fold(
    model: nn.Module, layer: str, site: Site, parameters: Mapping[str, Tensor], factors: Tensor
) -> None:
    """Multiply the weights of a matrix's inputs by `factors`, and divide what makes the inputs."""
    taken = parameters[f"{layer}.{site.consumer}.weight"]
    taken.mul_(factors)
    producer = f"{layer}.{site.producer}"
    # Gemma's norms multiply by 1 + weight.
    unit = getattr(model.get_submodule(producer), "UNIT", 0.0)
    # The last of them: values behind queries and keys, the linear part behind the gate.
    weight = parameters[f"{producer}.weight"][-taken.shape[1] :]
    divisor = factors if weight.dim() == 1 or factors.dim() == 0 else factors[:, None]
    weight.add_(unit).div_(divisor).sub_(unit)
    if (bias := parameters.get(f"{producer}.bias")) is not None:
        bias[-taken.shape[1] :].div_(factors)
