"""Predicts the peak memory of each pipeline rank: what it holds through the whole step, what passes
keep for their backward passes, and what they hold on top while they run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from megalite.config import Config, TrainConfig
from megalite.engine.gather import PIECE
from megalite.engine.gradients import IN_FLIGHT
from megalite.engine.layout import bucket_elements
from megalite.engine.optimizers import MatrixOptimizer
from megalite.parallel.stage import MESSAGES_UNDER_WAY
from megalite.plan import Cut, Plan, StageSpan, resident_bytes
from megalite.planner.activations import (
    PartBytes,
    bias_bytes,
    embedding_bytes,
    head_bytes,
    layer_bytes,
    rope_bytes,
)
from megalite.planner.deepspeed import deepspeed_bytes
from megalite.planner.frozen import FrozenBytes
from megalite.planner.schedule import Order
from megalite.planner.shapes import FP32, INT64, LayerShapes, Shapes, each, runs
from megalite.planner.sizes import StageSizes


@dataclass(frozen=True)
class Memory:
    """Holds the bytes of one pipeline rank: of each of its replicas and tensor ranks."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    """Kept by micro-batches in flight, at the peak."""
    transient: int
    """Held on top by the pass that runs at the peak: gradients of one layer or of an embedding,
    gathered tensors."""
    buffers: int
    """The step's tokens, and messages in flight beside the passes: pipeline hand-overs and gradient
    buckets."""
    checkpoint: int
    """Held beside weights and optimizer state while a checkpoint is gathered, on the rank that
    gathers most."""

    @property
    def step(self) -> int:
        """Bytes at the peak of a step."""
        return (
            self.weights
            + self.gradients
            + self.optimizer
            + self.activations
            + self.transient
            + self.buffers
        )

    @property
    def save(self) -> int:
        """Bytes at the peak of a save."""
        return self.weights + self.optimizer + self.checkpoint

    @property
    def total(self) -> int:
        """Bytes at the highest peak."""
        return max(self.step, self.save)

    def named(self) -> dict[str, int]:
        """Return the bytes by name."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def rank_memories(
    plan: Plan,
    config: Config,
    shapes: Shapes,
    layers: Sequence[LayerShapes],
    sizes: Sequence[StageSizes],
    order: Order,
    frozen: FrozenBytes,
    device: Literal["cuda", "cpu"],
) -> tuple[Memory, ...]:
    """Return the memory of each pipeline rank of `plan`.

    `config` gives the training settings, `shapes` and `layers` the model on a tensor rank, `sizes`
    the elements of each stage, `order` the passes of each rank, `frozen` what the objective's
    frozen model adds. On the `device` cpu, gloo's collectives need memory of their own."""
    on_gloo = device == "cpu"
    counts = _Counts(plan, config.train, shapes, layers, frozen, on_gloo)
    stages = [counts.stage(stage, sizes[stage.index]) for stage in plan.stages]
    memories = []
    for rank in range(plan.pipeline):
        # Weights, gradients and optimizer state stay all step long; the rest is counted at the peak
        # of the passes.
        spans = plan.stages_of(rank)
        own = [sizes[span.index] for span in spans]
        held = resident_bytes(
            config, [held for size in own for held in size.held(plan)], plan.zero_stage
        )
        held["weights"] += frozen.weights[rank]
        activations, transient = _in_passes(order[rank], stages)
        # Behind the passes: the gradient of the other end of the pipeline, then the update.
        received = max(size.trained.tied for size in own) * FP32
        updating = max(received, _whole_matrices(plan, own, matrix_bytes(config)))
        if updating > activations + transient:
            activations, transient = 0, updating
        buffers = _tokens(plan, shapes) + (frozen.states if spans[-1].last else 0)
        if plan.engine == "deepspeed":
            passes = activations + transient
            found = deepspeed_bytes(
                plan, config, own[0], stages[0], counts.head, passes, held["optimizer"]
            )
            transient = found.pop("passes") - activations
            buffers += found.pop("buffers")
            checkpoint = found.pop("checkpoint")
            held |= found
        else:
            buffers += _messages(plan, spans) * shapes.handed_bytes
            buffers += _buckets(plan, config, own, on_gloo)
            checkpoint = _checkpoint(plan, config, own, held["gradients"])
        memories.append(
            Memory(
                **held,
                activations=activations,
                transient=transient,
                buffers=buffers,
                checkpoint=0 if on_gloo else checkpoint,
            )
        )
    return tuple(memories)


class _Counts:
    """Counts the bytes of stages for one micro-batch."""

    def __init__(
        self,
        plan: Plan,
        train: TrainConfig,
        shapes: Shapes,
        layers: Sequence[LayerShapes],
        frozen: FrozenBytes,
        on_gloo: bool,
    ):
        self.train = train
        self.shapes = shapes
        # The native engine's weight-gradient GEMMs accumulate in place. Only gradients of look-ups
        # come from autograd.
        self.by_autograd = plan.engine != "native"
        self.plain = each(layers, lambda layer: layer_bytes(layer, "none", on_gloo))
        self.lean = each(layers, lambda layer: layer_bytes(layer, train.recompute, on_gloo))
        self.layers, self.on_gloo = layers, on_gloo
        self.head = beside_frozen(head_bytes(shapes, self.by_autograd, on_gloo), frozen)

    def stage(self, stage: StageSpan, sizes: StageSizes) -> PartBytes:
        """Return the bytes of one stage."""
        parts = self._parts(stage, sizes)
        handed = self.shapes.handed_bytes
        kept = sum(number * part.kept for number, part in parts)
        for_weights = sum(number * part.for_weights for number, part in parts)
        forward = [(number, part.forward, part.kept) for number, part in parts]
        backward, backward_input = [], []
        for number, part in reversed(parts):
            backward.append((number, part.backward - part.kept, -part.kept))
            # An input-gradient pass leaves the operands of the weight gradients behind.
            # Negative where the pass frees more than the operands it leaves.
            left = part.for_weights - part.kept
            backward_input.append((number, part.backward_input - part.kept, left))
        # The cos/sin tables of all layers; and the stage's output, which torch holds until the
        # backward pass. Under zero bubble it also holds the input until the weight-gradient pass.
        output = 0 if stage.last else handed
        held_input = 0 if stage.first else handed
        tables = [bias_bytes(layer) for layer in self._stacks(stage)]
        beside = rope_bytes(self.shapes) + output + sum(table.kept for table in tables)
        # What is recomputed takes the biases once more. The peak is at the first layer of the
        # backward pass, before there is a gradient of them, or at any where little is kept.
        biases, gradient = sum(table.forward for table in tables), 0
        # Kept by the kernels, but for that of the CPU, which takes fp32.
        is_copied = self.on_gloo and self.shapes.element != FP32
        if self.train.recompute != "none" or not is_copied:
            beside, biases = beside + biases, 0
        if self.train.recompute == "full":
            # That of the decoder waits until the encoder's layers are done: both are looked up before
            # the layers, and so come after them on the way back.
            gradient = sum(table.backward for table in tables)
        return PartBytes(
            kept=beside + kept,
            forward=beside + biases + _fullest(0, forward),
            backward=beside + gradient + _fullest(kept, backward),
            backward_input=beside + _fullest(kept, backward_input),
            for_weights=for_weights + held_input,
        )

    def _stacks(self, stage: StageSpan) -> list[LayerShapes]:
        """Return a layer of each stack that a stage has layers of and whose scores have a bias."""
        layers = self.layers[stage.start : stage.stop]
        return [
            *{layer.is_source: layer for layer in layers if layer.biased}.values(),
        ]

    def _parts(self, stage: StageSpan, sizes: StageSizes) -> list[tuple[int, PartBytes]]:
        """Return the parts in the order of the forward pass, each with how many of it follow one
        another."""
        count = len(stage.layers)
        first_plain = stage.start + min(count, self.train.recompute_layers or count)
        parts = [
            *runs(self.lean[stage.start : first_plain]),
            *runs(self.plain[first_plain : stage.layers.stop]),
        ]
        largest = sizes.trained.largest if self.by_autograd else sizes.trained.largest_looked_up
        embedding = embedding_bytes(self.shapes, largest * self.shapes.element)
        if stage.first:
            parts.insert(0, (1, embedding))
        if stage.predictors:
            parts.append((stage.predictors, embedding))
        if stage.last:
            parts.append((1, self.head))
        return parts


def beside_frozen(head: PartBytes, frozen: FrozenBytes) -> PartBytes:
    """Return the bytes of the head where the objective compares with a frozen model."""
    again = frozen.kept + frozen.comparing * frozen.compares_again
    return PartBytes(
        kept=head.kept + frozen.kept,
        forward=max(head.forward + frozen.kept + frozen.comparing, head.kept + frozen.running),
        backward=head.backward + again,
        backward_input=head.backward_input + again,
        for_weights=head.for_weights,
    )


def _fullest(held: int, parts: Sequence[tuple[int, int, int]]) -> int:
    """Return the peak of a pass that begins with `held` bytes.

    `parts` are (how many follow one another, bytes one holds on top while it runs, bytes one leaves
    behind; negative if it frees some)."""
    most = held
    for number, on_top, left in parts:
        # Of equal parts in a row the peak is at the first or at the last, as `held` grows or falls
        # evenly.
        last = held + (number - 1) * left
        most = max(most, held + on_top, last + on_top)
        held = last + left
    return most


def _in_passes(
    actions: Sequence[tuple[str, int, int]], stages: Sequence[PartBytes]
) -> tuple[int, int]:
    """Return (bytes kept by passes, bytes held on top by the pass that runs) at the moment of the
    largest sum."""
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
        else:  # "W"
            now = (held, 0)
            held -= stage.for_weights
        most = max(most, now, key=sum)
    return most


def matrix_bytes(config: Config) -> int:
    """Return the bytes of an element of a whole matrix on its way to its owner and back."""
    weights = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    optimizers = [member.build() for member in config.optimizer.members().values()]
    travelling = [
        each.message_dtype(weights) for each in optimizers if isinstance(each, MatrixOptimizer)
    ]
    return max((dtype.itemsize for dtype in travelling), default=FP32)


def _whole_matrices(plan: Plan, sizes: Sequence[StageSizes], element: int) -> int:
    """Count what an update of whole matrices holds, of stages of these `sizes`. `element` are the
    bytes of a number of what travels.

    It is what owners are to see of this rank's part; with other ranks also the matrices that it
    owns, as far as they are not that very memory, and the messages that go back and come."""
    of_experts = sum(size.experts.solved for size in sizes)
    dense = sum(size.solved for size in sizes) - of_experts
    owned = -(-dense // plan.replicas) - (-of_experts // plan.replicas_of(plan.experts))
    updated, ranks = owned if plan.zero_stage else dense + of_experts, plan.replicas * plan.tensor
    if ranks == 1:
        return updated * element
    # Of a weight that is cut, the parts are put together, and cut out again one by one.
    is_cut = max(plan.tensor, plan.experts.holders) > 1
    if is_cut:
        whole = owned + sizes[0].largest_solved
    else:
        # What is this rank's own is solved in place.
        whole = owned * (ranks - 1) // ranks
    return (updated + whole + 2 * updated * (ranks - 1) // ranks) * element


def _tokens(plan: Plan, shapes: Shapes) -> int:
    """Count the tokens and labels, int64, of all of the step's micro-batches, and those that
    predictors take."""
    return 2 * INT64 * shapes.tokens * (1 + shapes.predictors) * plan.micro_batches


def _messages(plan: Plan, spans: Sequence[StageSpan]) -> int:
    """Return the number of hidden states and gradients that a rank holds only because they travel.

    What it receives is counted where it is used, but one message is requested ahead of its pass. Of
    what a stage sends, the last messages stay until the next ones go. Sent hidden states are kept
    for the backward pass in any case; only gradients count, every other message of a stage that
    sends both."""
    if plan.pipeline == 1:
        return 0
    if plan.schedule == "1f1b":
        return 1
    messages = 1
    for span in spans:
        if span.first:
            continue  # sends no gradient
        messages += MESSAGES_UNDER_WAY if span.last else 1
    return messages


def _buckets(plan: Plan, config: Config, sizes: Sequence[StageSizes], on_gloo: bool) -> int:
    """Count the gradient buckets of ZeRO 2, where gradients are whole only while they are filled
    and reduced."""
    if plan.zero_stage != 2:
        return 0
    everything = sum(size.trained.total for size in sizes) * FP32
    largest = max(size.trained.largest for size in sizes) * FP32
    bucket = min(everything, max(FP32 * bucket_elements(config, plan), largest))
    # One bucket is being filled. The peak is at the begin of a backward pass, when only the last
    # bucket of the pass before is still being reduced, if there is one. Under full recomputation
    # little is kept, and any moment may be the peak.
    travelling = min(plan.micro_batches - 1, 1)
    if config.train.recompute == "full" and everything > 2 * bucket:
        travelling = IN_FLIGHT
    received = bucket * (plan.replicas - 1) // plan.replicas if on_gloo else 0
    return bucket + travelling * (bucket + received)


def _checkpoint(plan: Plan, config: Config, sizes: Sequence[StageSizes], gradients: int) -> int:
    """Count what a rank holds while it gathers optimizer states: the gradients, which ZeRO 2 has
    freed by then; the largest bucket, where holders assemble weights from it; and the pieces that
    are on their way to the host."""
    trained = [size.trained for size in sizes]
    most = bucket_elements(config, plan)

    def gathered(held: int, largest: int, cut: Cut) -> int:
        bucket, replicas = max(min(held, most), largest), plan.replicas_of(cut)
        if cut.holders > 1:
            return min(PIECE, cut.holders * largest) + (bucket if replicas > 1 else 0)
        return min(PIECE, bucket) if replicas > 1 else 0

    dense = gathered(
        sum(size.written for size in trained),
        max(size.largest_written for size in trained),
        Cut(plan.tensor),
    )
    experts = gathered(
        sum(sum(size.experts.layers) for size in trained),
        max(size.experts.largest for size in trained),
        plan.experts,
    )
    return max(dense, experts) * FP32 + (gradients if plan.zero_stage < 2 else 0)
