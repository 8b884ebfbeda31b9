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
from megalite.planner.activations import FP32, LayerBytes, head_bytes, layer_bytes
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
    """On top of it while a pass runs: logits and their gradients, one layer's gradients, a weight's gradient."""
    buffers: int
    """What is being sent or received: pipeline hand-overs, keys and values of a ring, buckets under way."""

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
    """On the CPU rms_norm is not one kernel, and keeps more."""
    stages = [_stage_bytes(stage, config.train, shapes, device == "cuda") for stage in plan.stages]
    return tuple(
        _rank_memory(plan, config, shapes, [sizes[s.index] for s in plan.stages_of(rank)], stages, order[rank])
        for rank in range(plan.pipeline)
    )


@dataclass(frozen=True)
class _StageBytes:
    """Of one stage, for one micro-batch."""

    kept: int
    for_weights: int
    forward_peak: int
    """On top of `kept` while its forward pass runs."""
    backward_peak: int


def _stage_bytes(stage: StageSpan, train: TrainConfig, shapes: Shapes, fused_norm: bool) -> _StageBytes:
    count = stage.stop - stage.start
    plain = layer_bytes(shapes, "none", fused_norm)
    lean = layer_bytes(shapes, train.recompute, fused_norm)
    num_lean = min(count, train.recompute_layers or count) if train.recompute != "none" else 0
    kept = num_lean * lean.kept + (count - num_lean) * plain.kept
    for_weights = count * plain.for_weights
    widest: list[LayerBytes] = [plain] * (num_lean < count) + [lean] * (num_lean > 0)
    forward_peak = backward_peak = max((layer.transient for layer in widest), default=0)
    if train.recompute != "none":
        forward_peak = plain.kept - lean.kept
    elif not shapes.attention_dropout:
        forward_peak = 0
    if not stage.last:
        kept += shapes.hidden_bytes  # torch holds what a stage gave until its backward pass
    if stage.last:
        head = head_bytes(shapes, fused_norm)
        kept += head.kept
        forward_peak = max(forward_peak - head.kept, head.forward - head.kept)
        backward_peak = max(backward_peak - head.kept, head.backward - head.kept)
        for_weights += shapes.tokens * (shapes.norm_hidden + shapes.vocab) * shapes.element
    return _StageBytes(kept, for_weights, forward_peak, backward_peak)


def _rank_memory(
    plan: Plan,
    config: Config,
    shapes: Shapes,
    sizes: Sequence[StageSizes],
    stages: Sequence[_StageBytes],
    actions: Sequence[tuple[str, int, int]],
) -> Memory:
    params = sum(size.total for size in sizes)
    weights, gradients, optimizer = _resident(plan, params, shapes.element)
    # A gradient exists beside the buckets from when autograd made it until it is added to them.
    largest = max(size.largest for size in sizes) * shapes.element
    activations, transient = _fullest(actions, stages, largest)
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=activations,
        transient=transient,
        buffers=_buffers(plan, config.parallel.bucket_mb, shapes, params, sizes),
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


def _fullest(
    actions: Sequence[tuple[str, int, int]], stages: Sequence[_StageBytes], largest_gradient: int
) -> tuple[int, int]:
    """(kept by passes, on top of it while a pass runs) at the moment at which their sum is largest."""
    held = 0
    most = (0, 0)
    for kind, number, _ in actions:
        stage = stages[number]
        before = held
        if kind == "F":
            held += stage.kept
            now = (held, stage.forward_peak)
        elif kind == "I":
            now = (before, stage.backward_peak)
            held += stage.for_weights - stage.kept
        else:
            held -= stage.for_weights if kind == "W" else stage.kept
            # The first layer's gradients appear when the other layers' activations are gone.
            now = (before, stage.backward_peak) if kind == "B" else (before, 0)
            late = (held, largest_gradient)
            now = max(now, late, key=sum)
        most = max(most, now, key=sum)
    return most


def _buffers(plan: Plan, bucket_mb: float, shapes: Shapes, params: int, sizes: Sequence[StageSizes]) -> int:
    total = 0
    if plan.pipeline > 1:
        # One message each way is asked for ahead of its pass, and some are on their way to other ranks.
        messages = 2 if plan.schedule == "1f1b" else 2 + MESSAGES_UNDER_WAY
        total += messages * len(sizes) * shapes.hidden_bytes
    if plan.context > 1:
        # Own and travelling keys and values, twice, and their fp32 gradients on the way home.
        kv = 2 * shapes.tokens * shapes.kv
        total += 2 * kv * shapes.element + 2 * kv * FP32
    if plan.tensor > 1 and plan.sequence:
        total += 2 * shapes.tokens * shapes.hidden * shapes.element  # a gathered input, the pieces of an output
    if plan.zero_stage == 2:
        bucket = min(params * FP32, max(int(bucket_mb * 2**20), max(size.largest for size in sizes) * FP32))
        total += IN_FLIGHT * bucket
    if plan.zero_stage == 3:
        total += 2 * max((max(size.layers, default=0) for size in sizes), default=0) * shapes.element
    return total
