"""Maximal update parametrisation (muP, Yang et al. 2022): initial values and learning rates by width, so
that what is best for a narrow model is best for a wide one.

It is the one without multipliers in the model (Tensor Programs V, table 3), so that checkpoints are
ordinary models. The table of weights has what follows from it as columns: how many times as wide
as in the base model the input and the output features of a weight are, and the initial values.
Optimizers read the learning rate off these (`OptimizerConfig.width_factor`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from math import sqrt

from megalite.config import ModelConfig
from megalite.errors import ConfigError
from megalite.models.weights import Uniform, Weight

FAMILIES = ("llama", "mistral", "ministral", "qwen2", "qwen3", "mixtral", "qwen3_moe")


def by_width(config: ModelConfig, weights: Iterable[Weight]) -> Iterator[Weight]:
    """Yield the rows of a table as `config.mup` has them. Raises ConfigError for a model that it
    does not fit."""
    assert config.mup is not None
    if config.family not in FAMILIES:
        raise ConfigError(f"model.mup knows {', '.join(FAMILIES)}, not {config.family}")
    if config.tie_embeddings:
        raise ConfigError(
            "model.mup needs tie_embeddings: false: the head learns by width, the embedding does not"
        )
    ratio = config.hidden_size / config.mup.base_hidden
    for weight in weights:
        inputs, outputs = _ratios(weight, ratio)
        row = _scaled(weight, init_factor(inputs, outputs))
        yield replace(row, wider_in=inputs, wider_out=outputs)


def _ratios(weight: Weight, ratio: float) -> tuple[float, float]:
    """Return how many times as wide the input and the output features are."""
    if weight.is_looked_up or not weight.row_shape:
        return 1.0, ratio  # embeddings, norms, biases: there is one input
    # The head and a router have as many output features in every width; they are not cut, or by
    # vocabulary.
    return ratio, ratio if weight.shard in ("column", "row") else 1.0


def init_factor(inputs: float, outputs: float) -> float:
    """Return the factor of the standard deviation of a matrix that is wider than in the base
    model: that with which its largest singular value goes by √(out/in) (Yang et al. 2023). What
    has one input at every width keeps its own."""
    return 1.0 if inputs == 1.0 else sqrt(outputs) / inputs


def _scaled(weight: Weight, factor: float) -> Weight:
    """Return a row whose initial values are `factor` times as large; constants stay."""
    match weight.init:
        case float() as std:
            return replace(weight, init=std * factor)
        case Uniform(bound):
            return replace(weight, init=Uniform(bound * factor))
        case tuple() as stds:
            return replace(weight, init=tuple(std * factor for std in stds))
    return weight
