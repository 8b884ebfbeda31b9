"""Bytes of each pipeline rank at its fullest moment: what it holds through the whole step, what its passes keep, and
what they hold on top while they run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from megalite.config import Config, TrainConfig
from megalite.engine.native import IN_FLIGHT
from megalite.parallel.stage import MESSAGES_UNDER_WAY
from megalite.plan import Plan, StageSpan
from megalite.planner.activations import (
    FP32, INT64, PartBytes, embedding_bytes, head_bytes, layer_bytes, rope_bytes,
)
from megalite.planner.schedule import Order
from megalite.planner.shapes import Shapes, StageSizes


@dataclass(frozen=True)
class Memory:
    """Bytes of one pipeline rank (of each of its replicas and tensor ranks)."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    """Kept by passes whose backward pass is still to come, at the fullest moment."""
    transient: int
    """On top of it while a pass runs: one layer's gradients, what it gathers or passes around, an embedding's
    gradient."""
    buffers: int
    """The step's tokens, and what is being sent or received beside the passes: pipeline hand-overs, buckets under
    way."""

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.transient + self.buffers

    def named(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def rank_memories(
    plan: Plan,
    config: Config,
    shapes: Shapes,
    sizes: Sequence[StageSizes],
    order: Order,
    device: Literal["cuda", "cpu"],
) -> tuple[Memory, ...]:
    """On the CPU, gloo's collectives need memory of their own."""
    on_gloo = device == "cpu"
    stages = [_stage_bytes(stage, plan, config.train, shapes, sizes[stage.index], on_gloo) for stage in plan.stages]
    return tuple(
        _rank_memory(plan, config, shapes, plan.stages_of(rank), sizes, stages, order[rank], on_gloo)
        for rank in range(plan.pipeline)
    )


def _stage_bytes(
    stage: StageSpan, plan: Plan, train: TrainConfig, shapes: Shapes, sizes: StageSizes, on_gloo: bool
) -> PartBytes:
    count = stage.stop - stage.start
    num_lean = min(count, train.recompute_layers or count) if train.recompute != "none" else 0
    parts = [
        (num_lean, layer_bytes(shapes, train.recompute, on_gloo)),
        (count - num_lean, layer_bytes(shapes, "none", on_gloo)),
    ]
    # Autograd makes the gradients of what is looked up; those of products the native engine sums where they stay.
    by_autograd = plan.engine != "native"
    if stage.first:
        largest = sizes.largest if by_autograd else sizes.largest_looked_up
        parts.insert(0, (1, embedding_bytes(shapes, largest * shapes.element)))
    if stage.last:
        parts.append((1, head_bytes(shapes, by_autograd, on_gloo)))
    # Positions as all layers need them; and torch holds what a stage gave until its backward pass.
    beside = rope_bytes(shapes) + (0 if stage.last else shapes.hidden_bytes)
    kept = sum(number * part.kept for number, part in parts)
    return PartBytes(
        kept=beside + kept,
        forward=beside + _fullest(parts, 0, lambda part: (part.forward, part.kept)),
        backward=beside + _fullest(parts[::-1], kept, lambda part: (part.backward - part.kept, -part.kept)),
        backward_input=beside
        + _fullest(
            parts[::-1], kept, lambda part: (part.backward_input - part.kept, part.for_weights - part.kept)
        ),
        for_weights=sum(number * part.for_weights for number, part in parts),
    )


def _fullest(
    parts: Sequence[tuple[int, PartBytes]], held: int, of: Callable[[PartBytes], tuple[int, int]]
) -> int:
    """The most that is held while a pass goes through `parts`, each so many times: `of` gives what is held on top while
    it runs, and by how much it leaves more behind than it found."""
    most = held
    for number, part in parts:
        on_top, left = of(part)
        for before in (0, number - 1) if number else ():  # it grows or shrinks from one to the next
            most = max(most, held + before * left + on_top)
        held += number * left
    return most


def _rank_memory(
    plan: Plan,
    config: Config,
    shapes: Shapes,
    spans: Sequence[StageSpan],
    sizes: Sequence[StageSizes],
    stages: Sequence[PartBytes],
    actions: Sequence[tuple[str, int, int]],
    on_gloo: bool,
) -> Memory:
    own = [sizes[span.index] for span in spans]
    params = sum(size.total for size in own)
    weights, gradients, optimizer = _resident(plan, params, shapes.element)
    activations, transient = _in_passes(actions, stages)
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=activations,
        transient=transient,
        buffers=_messages(plan, spans) * shapes.hidden_bytes
        + _buckets(plan, config.parallel.bucket_mb, own, on_gloo)
        + 2 * INT64 * shapes.tokens * plan.micro_batches  # tokens and labels of the step
        + _gathered_weights(plan, own, shapes.element),
    )


def resident_bytes(plan: Plan, params: int, element: int) -> int:
    """What a rank with so many elements of weights of `element` bytes holds through the whole step."""
    return sum(_resident(plan, params, element))


def _resident(plan: Plan, params: int, element: int) -> tuple[int, int, int]:
    """Weights, fp32 gradients, optimizer state: two fp32 moments, and of bf16 weights an fp32 master copy."""
    shard = -(-params // plan.replicas)
    weights = (shard if plan.zero_stage == 3 else params) * element
    gradients = (shard if plan.zero_stage >= 2 else params) * FP32
    return weights, gradients, (shard if plan.zero_stage else params) * (8 if element == FP32 else 12)


def _in_passes(actions: Sequence[tuple[str, int, int]], stages: Sequence[PartBytes]) -> tuple[int, int]:
    """(kept by passes, on top of it while a pass runs) at the moment at which their sum is largest."""
    held = 0
    most = (0, 0)
    for kind, number, _ in actions:
        stage = stages[number]
        if kind == "F":
            now = (held + stage.kept, stage.forward - stage.kept)
            held += stage.kept
        elif kind == "I":
            now = (held, stage.backward_input - stage.kept)
            held += stage.for_weights - stage.kept
        elif kind == "B":
            now = (held, stage.backward - stage.kept)
            held -= stage.kept
        else:
            now = (held, 0)
            held -= stage.for_weights
        most = max(most, now, key=sum)
    return most


def _messages(plan: Plan, spans: Sequence[StageSpan]) -> int:
    """Hidden states and gradients a rank holds because they travel. What is received is counted where it is used, but
    one message is asked for ahead of its pass; and of what a stage sends, of which the last messages stay until the
    next ones go, the hidden states are kept in any case."""
    if plan.pipeline == 1:
        return 0
    if plan.schedule == "1f1b":
        return 1
    gradients = [0 if span.first else MESSAGES_UNDER_WAY if span.last else MESSAGES_UNDER_WAY // 2 for span in spans]
    return 1 + sum(gradients)


def _buckets(plan: Plan, bucket_mb: float, sizes: Sequence[StageSizes], on_gloo: bool) -> int:
    """Of ZeRO 2, whose gradients are whole only while they are filled and reduced."""
    if plan.zero_stage != 2:
        return 0
    everything = sum(size.total for size in sizes) * FP32
    largest = max(size.largest for size in sizes) * FP32
    bucket = min(everything, max(int(bucket_mb * 2**20), largest))
    # One of them is filled. Of one or two large ones, that of the norms takes the other place on the way.
    travelling = IN_FLIGHT if everything > 2 * bucket else 1
    received = bucket * (plan.replicas - 1) // plan.replicas if on_gloo else 0
    return bucket + travelling * (bucket + received)


def _gathered_weights(plan: Plan, sizes: Sequence[StageSizes], element: int) -> int:
    """Of ZeRO 3: a layer's, and the next one's on their way."""
    if plan.zero_stage != 3:
        return 0
    return 2 * max((max(size.layers, default=0) for size in sizes), default=0) * element
