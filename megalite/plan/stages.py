"""The stages of a pipeline, balanced by what layers and head cost."""

from __future__ import annotations

from collections.abc import Sequence

from megalite.config import Config
from megalite.errors import ConfigError
from megalite.plan.layout import Sized, StageSpan


def make_stages(config: Config, weights: Sequence[Sized]) -> tuple[StageSpan, ...]:
    """Return the stages of the pipeline, balanced unless `parallel.stage_layers` gives their
    layers. Raise ConfigError."""
    parallel, num_layers = config.parallel, config.model.num_layers
    num_stages = parallel.pipeline * parallel.virtual
    if parallel.stage_layers is not None:
        counts = list(parallel.stage_layers)
        # A stage may be empty: the last one then has the head alone.
        if len(counts) != num_stages or sum(counts) != num_layers or min(counts) < 0:
            raise ConfigError(
                f"parallel.stage_layers = {counts} must be {num_stages} counts (pipeline × virtual) that add up to the "
                f"model's {num_layers} layers"
            )
    elif num_layers < num_stages:
        raise ConfigError(
            f"parallel.pipeline × virtual = {num_stages} stages are more than the model's {num_layers} layers"
        )
    else:
        counts = balance(num_layers, num_stages, _head_cost(config, weights))
    num_predictors = len(config.model.architecture.predictors)
    stages: list[StageSpan] = []
    start = 0
    for index, count in enumerate(counts):
        is_first, is_last = index == 0, index == num_stages - 1
        predictors = num_predictors if is_last else 0
        stages.append(StageSpan(index, start, start + count, is_first, is_last, predictors))
        start += count
    return tuple(stages)


def balance(num_layers: int, num_stages: int, head_cost: float) -> list[int]:
    """Return the number of layers of each of `num_stages` stages, at least one each, such that the
    slowest stage is as fast as possible.

    `head_cost` is the output head's time in units of a layer; the embedding, a look-up, counts as
    none. Of equally good stages the later one gets a layer, since a 1F1B schedule holds fewer
    activations there."""
    # Each has one layer; the others go one by one to the stage that is quickest so far.
    cost = [1.0] * (num_stages - 1) + [1.0 + head_cost]
    counts = [1] * num_stages
    for _ in range(num_layers - num_stages):
        stage = min(reversed(range(num_stages)), key=cost.__getitem__)
        counts[stage] += 1
        cost[stage] += 1.0
    return counts


def _head_cost(config: Config, weights: Sequence[Sized]) -> float:
    """Return the multiplications of the output head in units of an average layer's, with attention
    over half the sequence included. Predictors of further tokens are a layer and a head each."""
    model, predictors = config.model, len(config.model.architecture.predictors)
    # A matrix multiplies as often per token as it has parameters, so that sizes stand for time.
    layers = sum(
        weight.multiplied
        for weight in weights
        if isinstance(weight.place, int) and weight.place < model.num_layers
    )
    attention = (
        sum(layer.mixer.products(config.data.seq_length) for layer in model.architecture.layers) / 2
    )
    # The head by its shape: a tied one has no weight of its own in the table.
    head = model.vocab_size * model.hidden_size / ((layers + attention) / model.num_layers)
    return (1 + predictors) * head + predictors
