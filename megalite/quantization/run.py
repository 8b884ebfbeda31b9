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
from megalite.kernels.schemes import Nf4, Scheme
from megalite.models.weights import Weight
from megalite.quantization.gptq import gptq
from megalite.quantization.layers import LayerRuns
from megalite.quantization.matrices import MatrixChanges, Report
from megalite.quantization.scaling import Scaling, awq, smoothquant

Method = Literal["rtn", "gptq", "awq", "smoothquant"]
METHODS: tuple[Method, ...] = get_args(Method)
OF_EXPERTS = ("w4a16", "fp8")
"""Schemes that transformers opens experts in: it dequantises these two while it puts them
together."""


class Quantiser(MatrixChanges):
    """Gives the tensors to write for each weight, in the order of the table."""

    def __init__(
        self, model: Model, scheme: Scheme, method: Method = "rtn", runs: LayerRuns | None = None
    ):
        """`runs` gives the inputs of the matrices, which all methods but RTN need. Raises
        ConfigError for a model or a matrix that cannot be quantised."""
        if method != "rtn" and isinstance(scheme, Nf4):
            raise ConfigError(
                f"--method {method} does not go with --scheme nf4, whose steps are uneven: give rtn"
            )
        if method != "rtn" and runs is None:
            raise ConfigError(f"--method {method} needs inputs of the matrices: give --data")
        super().__init__(model, runs)
        self.scheme, self.method = scheme, method
        for weight in self.matrices:
            self._check(weight)

    def _check(self, weight: Weight) -> None:
        """Raise ConfigError for a matrix that cannot be quantised."""
        if weight.transpose or (weight.stack and len(weight.hf) != len(weight.row_groups)):
            raise ConfigError(
                f"{weight.name}: matrices stored as [in, out], or several in one tensor, are not quantised here; they "
                "are no torch.nn.Linear"
            )
        if weight.stack and self.scheme.name not in OF_EXPERTS:
            raise ConfigError(
                f"{weight.name}: of experts --scheme {' and '.join(OF_EXPERTS)} are written, which transformers "
                f"opens, and not {self.scheme.name}"
            )
        if weight.stack and self.method not in ("rtn", "gptq"):
            raise ConfigError(
                f"{weight.name}: --method {self.method} scales inputs, which experts share with their router; give rtn "
                "or gptq"
            )
        for name, shape in weight.hf_shapes().items():
            self.scheme.check(name, shape)

    def takes(self, weight: Weight) -> bool:
        # What is replicated, such as a router, is small, and chooses: it stays.
        return super().takes(weight) and weight.shard is not None

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
        dtype = self.model.read(self.matrices[0]).dtype
        return self.scheme.config(ignore or ["lm_head"], dtype)

    def scaling(self, dtype: torch.dtype) -> Scaling | None:
        if self.method == "awq":
            return Scaling(partial(awq, scheme=self.scheme, dtype=dtype), norms_only=False)
        return Scaling(smoothquant, norms_only=True) if self.method == "smoothquant" else None

    def change(
        self, name: str, value: Tensor, dtype: torch.dtype, inputs: Tensor | None
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        scheme, stem = self.scheme, name.removesuffix("weight")
        if self.method == "gptq":
            assert inputs is not None
            # Found before columns are moved (GPTQ's static groups).
            scales = scheme.scales(value, dtype)
            numbers = gptq(value, inputs, scales, scheme)
            changed = scheme.decode(numbers, scheme.spread(scales, tuple(value.shape)))
            packed = scheme.pack(numbers, scales, dtype)
        else:
            changed, packed = scheme.round_to_nearest(value, dtype)
        return changed, {stem + end: part for end, part in packed.items()}


def quantised(
    folder: Path, scheme: Scheme, method: Method = "rtn", runs: LayerRuns | None = None
) -> tuple[Model, Report]:
    """Return the model in `folder` as `write_model` is to write it, and the report that is filled
    in as it does. Raises ConfigError or CheckpointError."""
    model = open_source(folder)
    quantiser = Quantiser(model, scheme, method, runs)
    config = model.config | {"quantization_config": quantiser.config()}
    return replace(model, config=config, encode=quantiser.encode), quantiser.report
