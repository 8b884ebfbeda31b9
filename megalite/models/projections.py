"""Projections of layers' hidden states to another width, that of a teacher (Romero et al. 2015): rows
of the table like any other, which a checkpoint keeps, and the model itself does without."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn as nn

from megalite.config import ModelConfig
from megalite.models.layers import Decoder
from megalite.models.weights import Weight

PREFIX = "distill."
"""How the names of the tensors start, in a checkpoint's files."""
NAME = "hidden_projection"
"""Name of the module in its layer."""


def with_projections(config: ModelConfig, weights: Sequence[Weight]) -> tuple[Weight, ...]:
    """Return the table with the rows of the projections that `config` asks for, each behind those of
    its layer."""
    found = list(weights)
    for layer, width in config.projections.items():
        row = Weight(
            f"layers.{layer}.{NAME}.weight",
            (width, config.hidden_size),
            (f"{PREFIX}layers.{layer}.weight",),
            init=config.hidden_size**-0.5,
            # Not counted among what the model computes: FLOPs and MFU are those of the model.
            used=0.0,
            place=layer,
            partial_grad="sequence",
        )
        last = max(number for number, weight in enumerate(found) if weight.place == layer)
        found.insert(last + 1, row)
    return tuple(found)


def add_projections(model: Decoder, config: ModelConfig) -> None:
    """Give the layers of a clean model their projections, in place."""
    for layer, width in config.projections.items():
        linear = nn.Linear(config.hidden_size, width, bias=False)
        model.layers[str(layer)].add_module(NAME, linear)
