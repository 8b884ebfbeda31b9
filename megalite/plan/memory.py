"""Bytes that a rank holds through the whole step: weights, gradients, optimizer state."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from math import prod
from typing import Any, NamedTuple, cast

from megalite.config import Config
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


SCALED_TOGETHER = 128 * 128
"""Weights that share a scale in codes of fp8."""


def fullest_rank(
    config: Config, weights: Sequence[Sized], stages: Sequence[StageSpan], ranks: int
) -> tuple[Held, ...]:
    """Return what the rank holds that holds most, which decides whether a layout fits: of dense
    weights, and of experts. A pipeline stage has so many `ranks`. Raise ConfigError where a weight
    cannot be cut."""
    coded = _in_codes(config, weights)
    pipeline, experts = config.parallel.pipeline, expert_cut(config.parallel)
    dense = Cut(config.parallel.tensor)
    # Once a weight: the stages of all pipeline ranks ask for it again.
    local: dict[str, int] = {}
    quantised: dict[str, int] = {}
    for weight in weights:
        cut = experts if weight.is_expert else dense
        try:
            local[weight.name] = prod(weight.local_shape(*cut))
            quantised[weight.name] = weight.quantised_bytes(*cut)
        except ValueError as error:
            names = (
                {"expert": "expert", "tensor": "expert_tensor"}
                if cut != dense
                else {"tensor": "tensor"}
            )
            asked = ", ".join(
                f"parallel.{name} = {getattr(cut, axis)}" for axis, name in names.items()
            )
            raise ConfigError(f"{asked}: {error}") from None
    kept = {
        weight.name: local[weight.name] * weight.num_states(config.optimizer) for weight in weights
    }
    per_rank = []
    for rank in range(pipeline):
        rows = [weight for stage in stages[rank::pipeline] for weight in stage.weights(weights)]
        # Apart for dense weights and experts: a ZeRO stage shards each over other numbers of ranks.
        held = []
        for cut in dict.fromkeys((dense, experts)):
            own = [weight for weight in rows if (experts if weight.is_expert else dense) == cut]
            trained = [weight.name for weight in own if not weight.frozen]
            held.append(
                Held(
                    sum(local[weight.name] for weight in own),
                    sum(local[name] for name in trained),
                    sum(kept[name] for name in trained),
                    ranks // cut.holders,
                    sum(local[weight.name] for weight in own if quantised[weight.name]),
                    sum(quantised[weight.name] for weight in own),
                    sum(local[weight.name] for weight in own if weight.name in coded),
                )
            )
        per_rank.append(tuple(held))
    # By parameters first; a list compares trained ones and states only between equals.
    return max(per_rank, key=lambda held: [sum(numbers) for numbers in zip(*held, strict=True)])


def _in_codes(config: Config, weights: Sequence[Sized]) -> Collection[str]:
    if config.train.fp8 is None:
        return ()
    from megalite.models.fp8 import names_in_codes  # here: models import this module

    return names_in_codes(config, cast(Sequence[Any], weights))


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
            # A byte each, the scales, and this rank's own shard as it is, with the number of the
            # block of each 128.
            whole -= coded
            shard = -(-coded // replicas)
            in_few_bits += coded + coded // SCALED_TOGETHER * 4 + shard * element + shard // 128 * 8
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
