"""Bytes of each pipeline rank at its fullest moment: what it holds through the whole step, what its passes keep, and
what they hold on top while they run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megalite.config import Config, TrainConfig
from megalite.engine.native import IN_FLIGHT
from megalite.parallel.stage import MESSAGES_UNDER_WAY
from megalite.plan import Plan, StageSpan
from megalite.planner.activations import (
    FP32,
    INT64,
    PartBytes,
    embedding_bytes,
    head_bytes,
    layer_bytes,
    rope_bytes,
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
    counts = _Counts(plan, config.train, shapes, on_gloo)
    stages = [counts.stage(stage, sizes[stage.index]) for stage in plan.stages]
    memories = []
    for rank in range(plan.pipeline):
        spans = plan.stages_of(rank)
        own = [sizes[span.index] for span in spans]
        params, trained = sum(size.total for size in own), sum(size.trained.total for size in own)
        weights, gradients, optimizer = _resident(plan, config, params, trained, shapes.element)
        activations, transient = _in_passes(order[rank], stages)
        buffers = (
            _tokens(plan, shapes)
            + _messages(plan, spans) * shapes.hidden_bytes
            + _buckets(plan, config, own, on_gloo)
            + _gathered_weights(plan, own, shapes.element)
        )
        memories.append(Memory(weights, gradients, optimizer, activations, transient, buffers))
    return tuple(memories)


class _Counts:
    """Bytes of stages for one micro-batch."""

    def __init__(self, plan: Plan, train: TrainConfig, shapes: Shapes, on_gloo: bool):
        self.train, self.shapes = train, shapes
        # The native engine adds the gradients of products where they stay; only those of what is looked up are made by
        # autograd first.
        self.by_autograd = plan.engine != "native"
        self.plain, self.lean = (layer_bytes(shapes, kind, on_gloo) for kind in ("none", train.recompute))
        self.head = head_bytes(shapes, self.by_autograd, on_gloo)

    def stage(self, stage: StageSpan, sizes: StageSizes) -> PartBytes:
        parts, hidden = self._parts(stage, sizes), self.shapes.hidden_bytes
        kept = sum(number * part.kept for number, part in parts)
        for_weights = sum(number * part.for_weights for number, part in parts)
        forward = [(number, part.forward, part.kept) for number, part in parts]
        backward = [(number, part.backward - part.kept, -part.kept) for number, part in parts[::-1]]
        backward_input = [
            (number, part.backward_input - part.kept, part.for_weights - part.kept) for number, part in parts[::-1]
        ]
        # Positions as all layers need them. Till its backward pass torch holds what a stage gave, and under zero bubble
        # what it took till the pass for the weights.
        beside = rope_bytes(self.shapes) + (0 if stage.last else hidden)
        return PartBytes(
            kept=beside + kept,
            forward=beside + _fullest(0, forward),
            backward=beside + _fullest(kept, backward),
            backward_input=beside + _fullest(kept, backward_input),
            for_weights=for_weights + (0 if stage.first else hidden),
        )

    def _parts(self, stage: StageSpan, sizes: StageSizes) -> list[tuple[int, PartBytes]]:
        """Parts in the order of the forward pass, and how many of each follow each other."""
        count = stage.stop - stage.start
        num_lean = min(count, self.train.recompute_layers or count)
        parts = [(num_lean, self.lean), (count - num_lean, self.plain)]
        if stage.first:
            largest = sizes.trained.largest if self.by_autograd else sizes.trained.largest_looked_up
            parts.insert(0, (1, embedding_bytes(self.shapes, largest * self.shapes.element)))
        if stage.last:
            parts.append((1, self.head))
        return [part for part in parts if part[0]]


def _fullest(held: int, parts: Sequence[tuple[int, int, int]]) -> int:
    """The most that is held in a pass that begins with `held`. Of each part: how many follow each other, what one holds
    on top while it runs, and by how much it leaves more behind than it found."""
    most = held
    for number, on_top, left in parts:
        last = held + (number - 1) * left
        most = max(most, held + on_top, last + on_top)
        held = last + left
    return most


def resident_bytes(plan: Plan, config: Config, params: int, trained: int, element: int) -> int:
    """What a rank with so many elements of weights of `element` bytes, of which so many are not frozen, holds through
    the whole step."""
    return sum(_resident(plan, config, params, trained, element))


def _resident(plan: Plan, config: Config, params: int, trained: int, element: int) -> tuple[int, int, int]:
    """Weights, fp32 gradients, optimizer state: its fp32 states, and of bf16 weights an fp32 master copy."""
    per_weight = (len(config.optimizer.STATES) + (element != FP32)) * FP32
    shard = -(-trained // plan.replicas)
    weights = (-(-params // plan.replicas) if plan.zero_stage == 3 else params) * element
    gradients = (shard if plan.zero_stage >= 2 else trained) * FP32
    return weights, gradients, (shard if plan.zero_stage else trained) * per_weight


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


def _tokens(plan: Plan, shapes: Shapes) -> int:
    """And labels, of all of the step's micro-batches."""
    return 2 * INT64 * shapes.tokens * plan.micro_batches


def _messages(plan: Plan, spans: Sequence[StageSpan]) -> int:
    """Hidden states and gradients a rank holds because they travel. What it receives is counted where it is used, but
    one is asked for ahead of its pass. Of what a stage sends, the last messages stay until the next ones go: its hidden
    states are kept in any case, and where it sends both, every other is a gradient."""
    if plan.pipeline == 1:
        return 0
    if plan.schedule == "1f1b":
        return 1
    gradients = [0 if span.first else MESSAGES_UNDER_WAY if span.last else 1 for span in spans]
    return 1 + sum(gradients)


def _buckets(plan: Plan, config: Config, sizes: Sequence[StageSizes], on_gloo: bool) -> int:
    """Of ZeRO 2, whose gradients are whole only while they are filled and reduced."""
    if plan.zero_stage != 2:
        return 0
    everything = sum(size.trained.total for size in sizes) * FP32
    largest = max(size.trained.largest for size in sizes) * FP32
    bucket = min(everything, max(int(config.parallel.bucket_mb * 2**20), largest))
    # One of them is filled. The fullest moment is where a backward pass begins, and of the one before only the last
    # bucket of matrices is on its way, beside that of the norms; but where little is kept, any moment is as full.
    travelling = IN_FLIGHT if config.train.recompute == "full" and everything > 2 * bucket else 1
    received = bucket * (plan.replicas - 1) // plan.replicas if on_gloo else 0
    return bucket + travelling * (bucket + received)


def _gathered_weights(plan: Plan, sizes: Sequence[StageSizes], element: int) -> int:
    """Of ZeRO 3: a layer's, and the next one's on their way."""
    if plan.zero_stage != 3:
        return 0
    return 2 * max((max(size.layers, default=0) for size in sizes), default=0) * element
