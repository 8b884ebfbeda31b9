"""Quantises a stored model: the matrices of its layers, and nothing else. Embeddings, heads, norms
and biases stay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from megalite.checkpoint.convert import Model, open_source
from megalite.errors import ConfigError
from megalite.quantization.gptq import gptq
from megalite.quantization.layers import LayerRuns
from megalite.quantization.matrices import MatrixChanges, Report
from megalite.quantization.scaling import Scaling, awq, smoothquant
from megalite.quantization.schemes import Scheme

Method = Literal["rtn", "gptq", "awq", "smoothquant"]
METHODS: tuple[Method, ...] = get_args(Method)


class Quantiser(MatrixChanges):
    """Gives the tensors to write for each weight, in the order of the table."""

    def __init__(
        self, model: Model, scheme: Scheme, method: Method = "rtn", runs: LayerRuns | None = None
    ):
        """`runs` gives the inputs of the matrices, which all methods but RTN need. Raises
        ConfigError for a model or a matrix that cannot be quantised."""
        if method != "rtn" and runs is None:
            raise ConfigError(f"--method {method} needs inputs of the matrices: give --data")
        super().__init__(model, runs)
        self.scheme, self.method = scheme, method
        for weight in self.matrices:
            if weight.stack or weight.transpose:
                what = "experts" if weight.stack else "matrices stored as [in, out]"
                raise ConfigError(
                    f"{weight.name}: {what} are not quantised here; they are no torch.nn.Linear"
                )
            for name, shape in weight.hf_shapes().items():
                scheme.check(name, shape)

    def config(self) -> dict[str, object]:
        """Return config.json's `quantization_config`."""
        quantised = {name for weight in self.matrices for name in weight.hf}
        # Modules that transformers has as torch.nn.Linear, and that stay: the head, a router.
        ignore = []
        for weight in self.model.weights:
            for name in weight.hf:
                is_linear = len(weight.row_shape) == 1 and "embed" not in name
                if is_linear and name not in quantised:
                    ignore.append(name.removesuffix(".weight"))
        # A head that is tied to the embedding has no tensor of its own, but is a Linear there.
        return self.scheme.config(ignore or ["lm_head"])

    def scaling(self, dtype: torch.dtype) -> Scaling | None:
        if self.method == "awq":
            return Scaling(partial(awq, scheme=self.scheme, dtype=dtype), norms_only=False)
        return Scaling(smoothquant, norms_only=True) if self.method == "smoothquant" else None

    def change(
        self, name: str, value: Tensor, dtype: torch.dtype, inputs: Tensor | None
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        scheme = self.scheme
        # Found before columns are moved (GPTQ's static groups).
        scales = scheme.scales(value, dtype)
        scale = scheme.spread(scales, tuple(value.shape))
        if self.method == "gptq":
            assert inputs is not None
            numbers = gptq(value, inputs, scales, scheme)
        else:
            numbers = scheme.encode(value, scale)
        stem = name.removesuffix("weight")
        packed = scheme.pack(numbers, scales, dtype)
        return scheme.decode(numbers, scale), {stem + end: part for end, part in packed.items()}


def quantised(
    folder: Path, scheme: Scheme, method: Method = "rtn", runs: LayerRuns | None = None
) -> tuple[Model, Report]:
    """Return the model in `folder` as `write_model` is to write it, and the report that is filled
    in as it does. Raises ConfigError or CheckpointError."""
    model = open_source(folder)
    quantiser = Quantiser(model, scheme, method, runs)
    config = model.config | {"quantization_config": quantiser.config()}
    return replace(model, config=config, encode=quantiser.encode), quantiser.report
