"""Quantises a stored model: the matrices of its layers, and nothing else. Embeddings, heads, norms
and biases stay."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from megalite.checkpoint.convert import Model, open_source
from megalite.errors import ConfigError
from megalite.models.weights import Weight
from megalite.quantization.gptq import gptq
from megalite.quantization.layers import LayerRuns
from megalite.quantization.scaling import Scaling, awq, smoothquant
from megalite.quantization.schemes import Scheme

Method = Literal["rtn", "gptq", "awq", "smoothquant"]
METHODS: tuple[Method, ...] = get_args(Method)


@dataclass
class Report:
    """What quantising cost."""

    errors: dict[str, float] = field(default_factory=dict)
    """Share of the squared outputs of each matrix that its rounding changed, Σ|(Q−W)x|² / Σ|Wx|²,
    by the name of its Hugging Face tensor; without calibration rows of the weights themselves."""
    perplexities: tuple[float, float] | None = None
    """Of held-out rows, before and after."""

    @property
    def mean_error(self) -> float:
        return sum(self.errors.values()) / len(self.errors)


class Quantiser:
    """Gives the tensors to write for each weight, in the order of the table."""

    def __init__(
        self, model: Model, scheme: Scheme, method: Method = "rtn", runs: LayerRuns | None = None
    ):
        """`runs` gives the inputs of the matrices, which all methods but RTN need. Raises ConfigError for a model
        or a matrix that cannot be quantised."""
        if method != "rtn" and runs is None:
            raise ConfigError(f"--method {method} needs inputs of the matrices: give --data")
        self.model, self.scheme, self.method, self.runs = model, scheme, method, runs
        self.report = Report()
        self._ready: dict[str, dict[str, Tensor]] = {}
        """What is to be written for tensors of the layer that was quantised last, by their
        names."""
        self._scaled: dict[str, Tensor] = {}
        """Norms and biases of that layer that were scaled."""
        self._layer = -1
        for weight in self._matrices():
            if weight.stack or weight.transpose:
                what = "experts" if weight.stack else "matrices stored as [in, out]"
                raise ConfigError(
                    f"{weight.name}: {what} are not quantised here; they are no torch.nn.Linear"
                )
            for name, shape in weight.hf_shapes().items():
                scheme.check(name, shape)

    def _matrices(self) -> list[Weight]:
        return [weight for weight in self.model.weights if weight.is_matrix]

    def config(self) -> dict[str, object]:
        """Return config.json's `quantization_config`."""
        names = [name for weight in self._matrices() for name in weight.hf]
        every = [
            name
            for weight in self.model.weights
            for name in weight.hf
            if len(weight.row_shape) == 1
        ]
        # Modules that transformers has as torch.nn.Linear, and that stay: the head, a router.
        ignore = [
            name.removesuffix(".weight")
            for name in every
            if name not in names and "embed" not in name
        ]
        return self.scheme.config(ignore or ["lm_head"])

    def encode(self, weight: Weight, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return what is written in place of a weight's Hugging Face `tensors`."""
        # The first of a layer's weights, which may be a norm.
        if self.runs and isinstance(weight.place, int) and weight.place != self._layer:
            self._layer = weight.place
            scaling = self._scaling(next(iter(tensors.values())).dtype)
            self._scaled = self.runs.run(weight.place, self._in_layer, scaling)
            self.report.perplexities = self.runs.perplexities
        if not weight.is_matrix:
            value = self._scaled.get(weight.name)
            return tensors if value is None else weight.to_hf(value)
        if self.runs is None:
            for name, tensor in tensors.items():
                self._quantise(name, tensor, tensor.dtype, None)
        return {name: part for tensor in tensors for name, part in self._ready.pop(tensor).items()}

    def _scaling(self, dtype: torch.dtype) -> Scaling | None:
        """Return how inputs of matrices are scaled first."""
        if self.method == "awq":
            return Scaling(partial(awq, scheme=self.scheme, dtype=dtype), norms_only=False)
        return Scaling(smoothquant, norms_only=True) if self.method == "smoothquant" else None

    def _in_layer(
        self, weight: Weight, value: Tensor, dtype: torch.dtype, inputs: Tensor
    ) -> Tensor:
        """Quantise a weight with what went into it; return what its numbers stand for."""
        # By Hugging Face tensor: their rows do not depend on each other, but blocks of fp8 must not
        # reach over two.
        rounded = {
            name: self._quantise(name, part, dtype, inputs)
            for name, part in weight.to_hf(value).items()
        }
        return weight.from_hf(rounded).to(dtype)

    def _quantise(
        self, name: str, value: Tensor, dtype: torch.dtype, inputs: Tensor | None
    ) -> Tensor:
        scheme, exact = self.scheme, value.float()
        scales = scheme.scales(value, dtype)
        scale = scheme.spread(scales, tuple(value.shape))
        if self.method == "gptq":
            assert inputs is not None
            numbers = gptq(value, inputs, scales, scheme)
        else:
            numbers = scheme.encode(value, scale)
        rounded = scheme.decode(numbers, scale)
        self.report.errors[name] = relative_error(exact, rounded, inputs)
        stem = name.removesuffix("weight")
        packed = scheme.pack(numbers, scales, dtype)
        self._ready[name] = {stem + end: part for end, part in packed.items()}
        return rounded


def relative_error(weight: Tensor, rounded: Tensor, inputs: Tensor | None) -> float:
    """Return Σ|(Q−W)x|² / Σ|Wx|² from `inputs`, the sum of x xᵀ; without it as if these were alike
    in all directions."""
    lost, whole = (
        (x.double() if inputs is None else x.double() @ inputs) for x in (rounded - weight, weight)
    )
    if inputs is None:
        return float(lost.square().sum() / whole.square().sum())
    return float((lost * (rounded - weight)).sum() / (whole * weight).sum())


def quantised(
    folder: Path, scheme: Scheme, method: Method = "rtn", runs: LayerRuns | None = None
) -> tuple[Model, Report]:
    """Return the model in `folder` as `write_model` is to write it, and the report that is filled
    in as it does. Raises ConfigError or CheckpointError."""
    model = open_source(folder)
    quantiser = Quantiser(model, scheme, method, runs)
    config = model.config | {"quantization_config": quantiser.config()}
    return replace(model, config=config, encode=quantiser.encode), quantiser.report
