"""Changes the matrices of a stored model's layers, and nothing else, as the model is written: one
after another, or layer by layer with what goes into them. What quantising and pruning share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megalite.checkpoint.convert import Model
from megalite.models.weights import Weight
from megalite.quantization.layers import LayerRuns
from megalite.quantization.scaling import Scaling


@dataclass
class Report:
    """What the change cost."""

    errors: dict[str, float] = field(default_factory=dict)
    """Share of the squared outputs of each matrix that was changed, Σ|(Q−W)x|² / Σ|Wx|², by the
    name of its Hugging Face tensor; without calibration rows of the weights themselves."""
    perplexities: tuple[float, float] | None = None
    """Of held-out rows, before and after."""

    @property
    def mean_error(self) -> float:
        # In an order that does not tell who has found which.
        return sum(self.errors[name] for name in sorted(self.errors)) / len(self.errors)


class MatrixChanges:
    """Base of what changes matrices. `encode` goes with `Model.encode`, in the order of the
    table."""

    def __init__(self, model: Model, runs: LayerRuns | None = None):
        """`runs` gives the inputs of the matrices; without it there are none."""
        self.model, self.runs = model, runs
        self.report = Report()
        self._ready: dict[str, Mapping[str, Tensor]] = {}
        """What is to be written for tensors of the layer that was changed last, by their names."""
        self._scaled: dict[str, Tensor] = {}
        """Norms and biases of that layer that were scaled."""
        self._layer = -1

    def change(
        self, name: str, value: Tensor, dtype: torch.dtype, inputs: Tensor | None
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return what becomes of the Hugging Face tensor `name`, [out, in], in fp32, and the
        tensors that are written in its place. `dtype` is the one that it is stored in; `inputs` is
        the sum of x xᵀ, fp64 [in, in], over what went into it."""
        raise NotImplementedError

    def scaling(self, dtype: torch.dtype) -> Scaling | None:
        """Return how inputs of matrices stored in `dtype` are scaled first."""
        return None

    def takes(self, weight: Weight) -> bool:
        """Return whether a weight is changed."""
        return weight.is_matrix

    @property
    def matrices(self) -> list[Weight]:
        return [weight for weight in self.model.weights if self.takes(weight)]

    def encode(self, weight: Weight, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return what is written in place of a weight's Hugging Face `tensors`."""
        # The first of a layer's weights, which may be a norm.
        if self.runs and isinstance(weight.place, int) and weight.place != self._layer:
            self._layer = weight.place
            scaling = self.scaling(next(iter(tensors.values())).dtype)
            exchange = [self._exchange] if self.runs.ranks > 1 else []
            self._scaled = self.runs.run(weight.place, self._in_layer, scaling, *exchange)
            self.report.perplexities = self.runs.perplexities
        if not self.takes(weight):
            value = self._scaled.get(weight.name)
            return tensors if value is None else weight.to_hf(value)
        if self.runs is None:
            for name, tensor in tensors.items():
                self._change(name, tensor, tensor.dtype, None)
        written: dict[str, Tensor] = {}
        for hf_name in tensors:
            # Taken out, so that no more than a layer is held.
            written |= self._ready.pop(hf_name)
        return written

    def _in_layer(
        self, weight: Weight, value: Tensor, dtype: torch.dtype, inputs: Tensor
    ) -> Tensor:
        """Change a weight with what went into it; return what it is now."""
        if not self.takes(weight):
            return value
        # By Hugging Face tensor: what belongs together (a block, the largest numbers of a matrix)
        # must not reach over two. Those of a stack come expert by expert.
        parts = weight.to_hf(value)
        each = len(parts) // len(inputs) if weight.stack else 0
        changed = {}
        for number, (name, part) in enumerate(parts.items()):
            own = inputs[number // each] if each else inputs
            changed[name] = self._change(name, part, dtype, own)
        return weight.from_hf(changed).to(dtype)

    def _exchange(self, weight: Weight, owner: int, parameter: Tensor) -> None:
        """Give all ranks what the owner of a weight has made of it. A collective."""
        assert self.runs is not None
        found: list[Any] = [None]
        if owner == self.runs.rank and self.takes(weight):
            ready = {name: dict(self._ready[name]) for name in weight.hf}
            errors = {name: self.report.errors[name] for name in weight.hf}
            found = [(ready, errors, parameter.detach())]
        dist.broadcast_object_list(found, src=owner)
        if found[0] is not None:
            ready, errors, value = found[0]
            self._ready |= ready
            self.report.errors |= errors
            parameter.copy_(value)

    def _change(
        self, name: str, value: Tensor, dtype: torch.dtype, inputs: Tensor | None
    ) -> Tensor:
        changed, self._ready[name] = self.change(name, value, dtype, inputs)
        # An expert that no token has visited has no outputs to be off.
        seen = inputs if inputs is not None and inputs.any() else None
        self.report.errors[name] = relative_error(value.float(), changed, seen)
        return changed


def relative_error(weight: Tensor, rounded: Tensor, inputs: Tensor | None) -> float:
    """Return Σ|(Q−W)x|² / Σ|Wx|² from `inputs`, the sum of x xᵀ; without it as if these were alike
    in all directions."""
    off = rounded - weight
    lost, whole = _squared_outputs(off, inputs), _squared_outputs(weight, inputs)
    # A matrix of zeros, as some are at initialization, loses nothing: not 0 / 0.
    return lost / whole if whole else 0.0


def _squared_outputs(matrix: Tensor, inputs: Tensor | None) -> float:
    """Return Σ|Mx|² over inputs x: the trace of M (Σ x xᵀ) Mᵀ, as the sum of an elementwise product."""
    wide = matrix.double()
    products = wide if inputs is None else wide @ inputs
    return float((products * wide).sum())
