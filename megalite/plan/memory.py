"""Bytes that a rank holds through the whole step: weights, gradients, optimizer state."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

from megalite.config import FP8_BLOCK, Config
from megalite.errors import ConfigError
from megalite.plan.layout import Cut, Sized, StageSpan, expert_cut


class Held(NamedTuple):
    """Numbers of elements that a rank holds of weights with the same number of replicas."""

    params: int
    trained: int
    """Of these, not frozen."""
    states: float
    """Of the optimizer's states beside the trained ones, by what they would be in fp32."""
    replicas: int
    """Ranks that share what the ZeRO stage shards."""
    quantised: int = 0
    """Of the elements of weights, those that are held in few bits."""
    quantised_bytes: int = 0
    coded: int = 0
    """Of the elements of weights, those that are gathered as codes of fp8, where they are
    gathered."""


def fullest_rank(
    config: Config, weights: Sequence[Sized], stages: Sequence[StageSpan], ranks: int
) -> tuple[Held, ...]:
    """Return what the rank holds that holds most, which decides whether a layout fits: of dense
    weights, and of experts. A pipeline stage has so many `ranks`. Raise ConfigError where a weight
    cannot be cut."""
    pipeline = config.parallel.pipeline
    dense, experts = Cut(config.parallel.tensor), expert_cut(config.parallel)
    # Once a weight: the stages of all pipeline ranks ask for it again.
    local: dict[str, Held] = {}
    for weight in weights:
        cut = experts if weight.is_expert else dense
        local[weight.name] = _held_of(weight, cut, ranks // cut.holders, config, cut != dense)
    per_rank = []
    for rank in range(pipeline):
        of_dense: list[Held] = []
        of_experts: list[Held] = []
        for stage in stages[rank::pipeline]:
            for weight in stage.weights(weights):
                # Apart where a ZeRO stage shards experts over another number of ranks.
                is_apart = weight.is_expert and experts != dense
                own = of_experts if is_apart else of_dense
                own.append(local[weight.name])
        held = [_sum_of(of_dense, ranks // dense.holders)]
        if experts != dense:
            held.append(_sum_of(of_experts, ranks // experts.holders))
        per_rank.append(tuple(held))
    # By parameters first; a list compares trained ones and states only between equals.
    return max(per_rank, key=lambda held: [sum(numbers) for numbers in zip(*held, strict=True)])


def _held_of(weight: Sized, cut: Cut, replicas: int, config: Config, is_apart: bool) -> Held:
    """Return what a rank holds of a `weight` under its `cut`; `is_apart`: experts are cut by
    settings of their own. Raise ConfigError where it cannot be cut so."""
    try:
        params = prod(weight.local_shape(*cut))
        quantised_bytes = weight.quantised_bytes(*cut)
    except ValueError as error:
        asked = f"parallel.tensor = {cut.tensor}"
        if is_apart:
            asked = f"parallel.expert = {cut.expert}, parallel.expert_tensor = {cut.tensor}"
        raise ConfigError(f"{asked}: {error}") from None
    trained = 0 if weight.frozen else params
    return Held(
        params,
        trained,
        trained * weight.num_states(config.optimizer),
        replicas,
        params if quantised_bytes else 0,
        quantised_bytes,
        params if weight.coded else 0,
    )


def _sum_of(weights: Sequence[Held], replicas: int) -> Held:
    """Return what a rank holds of all `weights`, which have so many `replicas`."""
    params = trained = quantised = quantised_bytes = coded = 0
    states = 0.0
    for each in weights:
        params += each.params
        trained += each.trained
        states += each.states
        quantised += each.quantised
        quantised_bytes += each.quantised_bytes
        coded += each.coded
    return Held(params, trained, states, replicas, quantised, quantised_bytes, coded)


def resident_bytes(config: Config, held: Sequence[Held], zero_stage: int) -> dict[str, int]:
    """Return the bytes that a rank holds through the whole step: weights, fp32 gradients and
    optimizer state, of all that is `held`."""
    is_bf16 = config.train.precision == "bf16"
    element = 2 if is_bf16 else 4
    weights = gradients = in_few_bits = 0
    optimizer = 0.0
    for params, trained, states, replicas, quantised, quantised_bytes, coded in held:
        whole = params - quantised
        if zero_stage in (1, 2) and replicas > 1:
            # A byte each, a scale in fp32 for each block, and this rank's own shard as it is, with
            # the number, int64, of the block of each part of a row.
            whole -= coded
            shard = -(-coded // replicas)
            scales = coded // FP8_BLOCK**2 * 4
            numbers = shard // FP8_BLOCK * 8
            in_few_bits += coded + scales + shard * element + numbers
        # Divided and rounded up: shards are padded to one size.
        weights += -(-whole // replicas) if zero_stage == 3 else whole
        in_few_bits += quantised_bytes
        gradients += -(-trained // replicas) if zero_stage >= 2 else trained
        # The optimizer's fp32 states, and an fp32 master copy; in fp32 the weights are their own.
        kept = states + trained * is_bf16
        optimizer += -(-kept // replicas) if zero_stage >= 1 else kept
    return {
        "weights": weights * element + in_few_bits,
        "gradients": gradients * 4,
        "optimizer": round(optimizer * 4),
    }
