"""How much the parts of a model do, by what they give on calibration rows (Minitron, Muralidharan et
al. 2024): means over a row's tokens, and over rows the root of the sum of their squares."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megalite.models.experts import Router
from megalite.models.weights import Weight
from megalite.quantization.layers import LayerRuns


@dataclass
class Importance:
    """What each part does; larger is more."""

    heads: list[Tensor] = field(default_factory=list)
    """By layer [H]: the length of what a head of queries gives."""
    inner: list[Tensor | None] = field(default_factory=list)
    """By layer [I], or [E,I] of experts: the size of an inner feature, as the down projection takes
    it; of experts the sum over a row's visits. None: the layer is a dense one among others with
    experts."""
    experts: list[Tensor | None] = field(default_factory=list)
    """By layer [E]: the sum of the weights with which a row's tokens visit an expert; None: the
    layer has none."""
    hidden: Tensor = field(default_factory=lambda: torch.zeros(()))
    """[D]: the size of a channel behind the norms of a layer, summed over layers."""
    layers: list[float] = field(default_factory=list)
    """How much a layer turns the residual stream: 1 − cos(in, out), the Block Influence of Men et
    al. 2024."""
    perplexity: float = 0.0
    """Of the held-out rows."""


def measure(runs: LayerRuns, readers: Mapping[str, Sequence[Weight]], heads: int) -> Importance:
    """Run the calibration rows of `runs` through the model, a layer in memory at a time. `readers`
    are the matrices that read what `heads` heads of queries give, `inner` features and `hidden`
    channels, by these words."""
    found = Importance()
    measures: dict[str, Callable[..., Tensor]] = {
        "heads": partial(_of_heads, heads), "inner": _of_inner, "hidden": _sizes
    }  # fmt: skip

    @contextmanager
    def watching(layer: int, model: nn.Module) -> Iterator[None]:
        # Of the squares of what each row gives: `watch` sends one row at a time.
        sums: dict[str, Tensor] = {}

        def add(what: str, value: Tensor) -> None:
            sums[what] = sums.get(what, 0.0) + value.double().square()

        def before(what: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
            add(what, measures[what](*inputs))

        def behind_router(module: Router, inputs: Any, out: tuple[Tensor, ...]) -> None:
            add("experts", _visits(len(module.weight), *out[1:]))  # weights, and which experts

        def behind_layer(module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
            cosine = torch.cosine_similarity(inputs[0].double(), out.double(), dim=-1)
            add("layer", 1 - cosine.mean())

        handles = []
        for what, weights in readers.items():
            for weight in weights:
                if weight.place == layer:
                    module = model.get_submodule(weight.name.removesuffix(".weight"))
                    hook = partial(before, what)
                    handles.append(module.register_forward_pre_hook(hook))
        routers = [module for module in model.modules() if isinstance(module, Router)]
        handles += [module.register_forward_hook(behind_router) for module in routers]
        handles.append(model.get_submodule(f"layers.{layer}").register_forward_hook(behind_layer))
        yield
        for handle in handles:
            handle.remove()
        # Layers come in order, so that an element's place is its layer.
        found.heads.append(sums["heads"].sqrt())
        found.inner.append(sums["inner"].sqrt() if "inner" in sums else None)
        found.experts.append(sums["experts"].sqrt() if routers else None)
        found.hidden = found.hidden + sums["hidden"].sqrt()
        found.layers.append(float(sums["layer"].sqrt()))

    found.perplexity = runs.watch(watching)
    return found


def _sizes(x_BTD: Tensor, *_: Any) -> Tensor:
    """Return the mean size of each channel, [D]."""
    return x_BTD.float().abs().mean((0, 1))


def _of_heads(heads: int, x_BTD: Tensor) -> Tensor:
    """Return the mean length of what each head gives, [H]."""
    x_BTHK = x_BTD.float().unflatten(-1, (heads, -1))
    return x_BTHK.norm(dim=-1).mean((0, 1))


def _of_inner(x: Tensor, *groups: Any) -> Tensor:
    """Return the sizes of inner features [I]; given the groups of an expert's rows, [E,I]."""
    if not groups:
        return _sizes(x)
    # Rows are sorted by their expert. An expert that was not visited has none, and the sum 0.
    by_expert = x.split(groups[0].counts.on_host)
    return torch.stack([rows.float().abs().sum(0) for rows in by_expert])


def _visits(num_experts: int, weight_BTK: Tensor, index_BTK: Tensor) -> Tensor:
    """Return the sum of the weights with which tokens visit each expert, [E]."""
    visits_E = torch.zeros(num_experts, dtype=torch.float64)
    return visits_E.index_add_(0, index_BTK.flatten(), weight_BTK.flatten().double())
