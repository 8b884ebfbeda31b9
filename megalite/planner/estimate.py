"""Estimates what a plan costs on given hardware: memory of every pipeline rank, time of a step, MFU
and traffic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Literal

from megalite.config import FP8_BLOCK, Config
from megalite.observe.throughput import model_flops_per_token
from megalite.plan import Held, Plan, StageSpan
from megalite.planner.cost import NOTHING, Costs, PassTimes, optimizer_bytes
from megalite.planner.frozen import FrozenBytes, frozen_bytes
from megalite.planner.hardware import Hardware
from megalite.planner.kernels import MEGALITE, Kernels, Software
from megalite.planner.memory import Memory, matrix_bytes, rank_memories
from megalite.planner.network import Network, place
from megalite.planner.schedule import Order, order_of
from megalite.planner.shapes import LayerShapes, ModelTable, Shapes, each, runs, shapes_of
from megalite.planner.simulate import Links, Piece, StageWork, Timeline, simulate
from megalite.planner.sizes import ENDS, StageSizes

HEADROOM_GB = 2.0
"""GiB of a GPU that tensors cannot have: the CUDA context, cuBLAS' workspaces and NCCL's
buffers."""

FRAGMENTATION = 0.05
"""Share of the rest that the allocator loses to fragmentation."""


@dataclass(frozen=True)
class Estimate:
    """Holds the predictions for one plan."""

    config: Config
    plan: Plan
    hardware: Hardware
    memory: tuple[Memory, ...]
    """One for each pipeline rank."""
    step_time_s: float
    bubble: float
    """Share of the pipeline ranks' time in which they wait for each other."""
    volume: dict[str, float]
    """Bytes a rank sends in a step, by axis; of the rank that sends most."""
    comm_time: dict[str, float]
    """Seconds of a step that messages take, hidden or not, by axis; of the rank where they take
    longest."""
    exposed_s: float
    """Seconds at the end of the step spent waiting for gradient reductions."""
    optimizer_s: float
    tokens_per_s: float
    mfu: float
    timeline: Timeline

    @property
    def fullest(self) -> Memory:
        """Memory of the pipeline rank that needs most."""
        return max(self.memory, key=lambda memory: memory.total)

    @property
    def fits(self) -> bool:
        """True if every rank's tensors fit into its GPU."""
        return self.fullest.total <= usable_bytes(self.hardware)


def _added(held: Sequence[Held]) -> Held:
    """Add up what a rank holds of several stages."""
    params, trained, states, replicas, *quantised = zip(*held, strict=True)
    # Stages of one rank have the same replicas.
    return Held(sum(params), sum(trained), sum(states), replicas[0], *map(sum, quantised))


def usable_bytes(hardware: Hardware) -> float:
    """Return the bytes of a GPU that tensors may take."""
    return (hardware.chip.memory_gb - HEADROOM_GB) * (1 - FRAGMENTATION) * 2**30


def all_reduces(plan: Plan) -> bool:
    """Return whether gradients are summed by an all-reduce over the replicas, not by a
    reduce-scatter: without ZeRO, and by DeepSpeed, which keeps its share of the sum."""
    return plan.zero_stage == 0 or (plan.engine == "deepspeed" and plan.zero_stage < 3)


def estimate(
    config: Config,
    plan: Plan,
    hardware: Hardware,
    *,
    software: Software = MEGALITE,
    record: bool = False,
) -> Estimate:
    """Simulate a step of `config` under `plan` on this `hardware`.

    `software` is the trainer to predict. `record` keeps every event of the step, for a picture.
    Raises ConfigError for a model the planner does not know and a precision without a known
    peak."""
    return Outlook(config, plan, hardware, ModelTable(config), software).estimate(record)


def memory_of(
    config: Config,
    plan: Plan,
    *,
    device: Literal["cuda", "cpu"] = "cuda",
) -> tuple[Memory, ...]:
    """Predict the memory of each pipeline rank for `config` under `plan`, on GPUs or with gloo on
    the CPU (`device`).

    Raises ConfigError for a model the planner does not know."""
    table = ModelTable(config)
    shapes, layers = shapes_of(config, plan, table)
    order = order_of(plan.schedule, plan.pipeline, plan.virtual, plan.micro_batches)
    sizes = [table.sizes(plan).of(stage) for stage in plan.stages]
    frozen = frozen_bytes(plan, config, table, shapes.vocab, device == "cpu")
    return rank_memories(plan, config, shapes, layers, sizes, order, frozen, device)


class Outlook:
    """Computes the parts of an estimate on demand. In a search, cheap parts decide whether the
    others are needed."""

    def __init__(
        self,
        config: Config,
        plan: Plan,
        hardware: Hardware,
        table: ModelTable,
        software: Software = MEGALITE,
    ):
        """Take the inputs of `estimate`. `table` is that of the config's model."""
        self.config = config
        self.plan = plan
        self.hardware = hardware
        self.table = table
        self.software = software
        self.shapes: Shapes
        self.layers: tuple[LayerShapes, ...]
        self.shapes, self.layers = shapes_of(config, plan, table)
        self.sizes: tuple[StageSizes, ...] = tuple(
            table.sizes(plan).of(stage) for stage in plan.stages
        )
        self.frozen: FrozenBytes = frozen_bytes(
            plan, config, table, self.shapes.vocab, on_gloo=False
        )
        self.network: Network = place(plan, hardware)
        recipe = config.train.fp8.recipe if config.train.fp8 else None
        self.kernels = Kernels(hardware.chip, software, self.shapes.element, recipe)
        self.costs = Costs(
            self.shapes, self.kernels, self.network, products_add=plan.engine == "native"
        )

    @cached_property
    def order(self) -> Order:
        """Order of passes of each pipeline rank."""
        return order_of(
            self.plan.schedule, self.plan.pipeline, self.plan.virtual, self.plan.micro_batches
        )

    @cached_property
    def memory(self) -> tuple[Memory, ...]:
        """Memory of each pipeline rank."""
        plan, config = self.plan, self.config
        return rank_memories(
            plan, config, self.shapes, self.layers, self.sizes, self.order, self.frozen, "cuda"
        )

    @cached_property
    def work(self) -> tuple[StageWork, ...]:
        """Pass times of every stage."""
        plain = each(self.layers, lambda layer: self.costs.layer(layer, "none"))
        return tuple(self._stage_work(span, plain, self.lean) for span in self.plan.stages)

    @cached_property
    def lean(self) -> list[PassTimes]:
        """Pass times of every layer with the config's recomputation."""
        return each(self.layers, lambda layer: self.costs.layer(layer, self.config.train.recompute))

    def _stage_work(
        self, span: StageSpan, plain: Sequence[PassTimes], lean: Sequence[PassTimes]
    ) -> StageWork:
        """Compute the pass times of a stage from those of each layer without (`plain`) and with
        recomputation (`lean`)."""
        sizes = self.sizes[span.index]
        # The first layers of the stage are recomputed, as `apply_recompute` has it.
        num_lean = self.config.train.recompute_layers or len(sizes.layers)
        trained = sizes.trained
        # Each part's times, its elements, those of them that are trained, and of these those of
        # experts with other replicas, in the order of the forward pass.
        parts: list[tuple[PassTimes, int, int, int]] = []
        # Of what is gathered behind an update: the elements that travel as codes, with those of
        # experts among them.
        coded = [(0, 0)] * span.first + [*zip(sizes.coded, sizes.experts.coded, strict=True)]
        coded += [(0, 0)] * span.last
        if span.first:
            parts.append((self.costs.embedding(), sizes.before, trained.before, 0))
        for number, of_layer in enumerate(
            zip(sizes.layers, trained.layers, trained.experts.layers, strict=True)
        ):
            times = (lean if number < num_lean else plain)[span.start + number]
            parts.append((times, *of_layer))
        if span.last:
            parts.append((self.costs.end(), sizes.after, trained.after, 0))
        total = sum((times for times, *_ in parts), NOTHING)
        pieces = []
        for (times, _, size_trained, of_experts), codes in zip(parts, coded, strict=True):
            pieces.append(
                Piece(
                    forward=times.forward,
                    backward=times.backward_weight if self._separate else times.backward,
                    gather=self._gather_time(size_trained, of_experts, codes),
                    reduce=self._reduce_time(size_trained, of_experts)
                    if self.plan.zero_stage < 3
                    else 0.0,
                )
            )
        forward, backward = total.forward, total.backward
        if self.plan.zero_stage == 3:
            # Weights are gathered and gradients reduced in every pass, beside the work on the layer
            # before.
            forward = backward = 0.0
            for times, size, size_trained, of_experts in parts:
                gather = self._whole_time(size)
                forward += max(times.forward, gather)
                backward += max(
                    times.backward, gather + self._reduce_time(size_trained, of_experts)
                )
        return StageWork(
            forward, backward, total.backward_input, total.backward_weight, tuple(pieces)
        )

    def _whole_time(self, size: int, of_experts: int = 0, codes: tuple[int, int] = (0, 0)) -> float:
        """Return the seconds to all-gather weights of `size` elements over the replicas,
        `of_experts` of them over theirs. `codes` are those that travel as codes, and those of
        experts among them."""
        network, element = self.network, self.shapes.element
        coded, of_these = codes
        dense = (size - of_experts) * element - (coded - of_these) * (element - 1)
        experts = of_experts * element - of_these * (element - 1)
        time = network.gather(dense, network.replicas)
        time += network.gather(experts, network.expert_replicas)
        # First the largest number of each block: little more than a latency.
        return time + (
            network.all_reduce(4 * coded / FP8_BLOCK**2, network.replicas) if coded else 0.0
        )

    def _gather_time(self, size: int, of_experts: int, codes: tuple[int, int]) -> float:
        """Return the seconds of the all-gather after the optimizer step, at ZeRO stages that have
        one."""
        return self._whole_time(size, of_experts, codes) if self.plan.zero_stage in (1, 2) else 0.0

    def _reduce_time(self, size: int, of_experts: int) -> float:
        """Return the seconds to reduce fp32 gradients over the replicas."""
        network = self.network
        collective = network.all_reduce if all_reduces(self.plan) else network.gather
        dense = collective(4.0 * (size - of_experts), network.replicas)
        return dense + (
            collective(4.0 * of_experts, network.expert_replicas) if of_experts else 0.0
        )

    @property
    def links(self) -> Links:
        """Properties of the messages between pipeline ranks and between replicas."""
        pipeline = self.plan.pipeline > 1
        return Links(
            hand_over=self.network.hand_over(self.shapes.handed_bytes) if pipeline else 0.0,
            waits_for_hand_over=pipeline and self.plan.schedule == "1f1b",
            reduces_every_time=self.plan.zero_stage == 2,
        )

    @property
    def optimizer_s(self) -> float:
        """Seconds of the gradient norm and of the update of the fullest rank: of its shard, at ZeRO
        stage 0 of all."""
        params = states = 0.0
        for held in self.held:
            # From stage 1 on a rank updates a shard.
            owners = held.replicas if self.plan.zero_stage else 1
            params, states = params + held.trained / owners, states + held.states / owners
        norm = tied = 0.0
        if self.plan.world_size > 1:
            # One fp32 number: the latency is what counts.
            norm = self.network.all_reduce(4.0, self.network.replicas)
        if self._tied_over_pipeline:
            tied = self.network.hand_over(self._shared_bytes)
        moved = optimizer_bytes(params, states) + 4 * self.config.optimizer.PASSES * params
        # Embeddings at both ends exchange their gradients in both directions.
        return norm + 2 * tied + self.kernels.memory(moved) + self._whole_matrices_s

    @cached_property
    def _whole_matrices_s(self) -> float:
        """Seconds that an optimizer takes for whole matrices: their owners' products, and the
        messages to and from them, a shard long each."""
        plan, busiest = self.plan, 0.0
        solving = {
            place: sum(count * self.kernels.product(*each) for each, count in products.items())
            for place, products in self.table.products.items()
        }
        for rank in range(plan.pipeline):
            stages = plan.stages_of(rank)
            here = {
                place: seconds
                for place, seconds in solving.items()
                if any(stage.holds(place) for stage in stages)
            }
            # Owners are all ranks of a stage. An embedding or a head, where `optimizer.groups` gives
            # it to such an optimizer, is one matrix, which one of them has.
            largest = max((x for place, x in here.items() if place in ENDS), default=0.0)
            busiest = max(busiest, largest, sum(here.values()) / (plan.replicas * plan.tensor))
        if not busiest:
            return 0.0
        element = float(matrix_bytes(self.config))
        shard = element * sum(held.trained / held.replicas for held in self.held)
        return busiest + 2 * self.network.gather(shard, self.network.replicas)

    @property
    def _shared_bytes(self) -> float:
        """Bytes of the gradient of an embedding that is at both ends of a pipeline."""
        return 4.0 * self.shapes.vocab * self.shapes.hidden

    @property
    def _tied_over_pipeline(self) -> bool:
        """True if the first and the last stage share a trained embedding."""
        is_shared = self.table.vocab.place == "both"
        return self.plan.pipeline > 1 and is_shared and not self.shapes.frozen

    @cached_property
    def held(self) -> tuple[Held, ...]:
        """What the rank holds that holds most: dense weights, and experts."""
        return max(self._held_by_ranks, key=lambda held: sum(each.params for each in held))

    @cached_property
    def _held_by_ranks(self) -> list[tuple[Held, ...]]:
        """What each pipeline rank holds."""
        per_rank = []
        for rank in range(self.plan.pipeline):
            stages = [self.sizes[span.index].held(self.plan) for span in self.plan.stages_of(rank)]
            per_rank.append(tuple(map(_added, zip(*stages, strict=True))))
        return per_rank

    @property
    def shortest_step_s(self) -> float:
        """Lower bound of the step time in seconds: the busiest rank's work, and the time to fill
        and drain the pipeline before and after it."""
        plan = self.plan
        work = self.work
        longest = 0.0
        for rank in range(plan.pipeline):
            busy = 0.0
            for span in plan.stages_of(rank):
                busy += work[span.index].forward + self._whole_backward(span.index)
            # Before its first pass a rank waits for the ranks before it; after its last, these
            # still work.
            ways = sum(work[index].forward for index in range(rank))
            # Under zero bubble no rank waits for the last weight-gradient passes.
            if not self._separate:
                ways += sum(work[index].backward for index in range(rank))
            longest = max(longest, busy * plan.micro_batches + ways)
        return longest + self.optimizer_s

    @property
    def _separate(self) -> bool:
        """True if backward passes come in two halves, as under zero bubble."""
        return self.plan.pipeline > 1 and self.plan.schedule == "zero_bubble"

    def _whole_backward(self, stage: int) -> float:
        work = self.work[stage]
        if self._separate:
            return work.backward_input + work.backward_weight
        return work.backward

    def estimate(self, record: bool = False) -> Estimate:
        """Simulate the step and put the estimate together. `record` keeps the events of the
        step."""
        timeline = simulate(self.order, self.work, self.links, self.plan.micro_batches, record)
        step = timeline.end + self.optimizer_s
        tokens_per_s = self.plan.tokens_per_step / step
        # MFU is defined over the peak of all GPUs together.
        peak = self.hardware.chip.bf16_tflops * 1e12 * self.plan.world_size
        volume, comm_time = self._traffic()
        return Estimate(
            config=self.config,
            plan=self.plan,
            hardware=self.hardware,
            memory=self.memory,
            step_time_s=step,
            bubble=timeline.bubble,
            volume=volume,
            comm_time=comm_time,
            exposed_s=timeline.end - timeline.passes_end,
            optimizer_s=self.optimizer_s,
            tokens_per_s=tokens_per_s,
            mfu=model_flops_per_token(self.config) * tokens_per_s / peak,
            timeline=timeline,
        )

    def _traffic(self) -> tuple[dict[str, float], dict[str, float]]:
        """Return (bytes a rank sends in a step, seconds that takes at the links' speed), by
        axis."""
        plan = self.plan
        network = self.network
        volume = dict.fromkeys(("tensor", "context", "expert", "data", "pipeline"), 0.0)
        for rank in range(plan.pipeline):
            parts = [self._parts_of(span) for span in plan.stages_of(rank)]
            tensor = plan.micro_batches * sum(part.tensor_bytes for part in parts)
            tensor += self._partial_bytes(rank)
            context = plan.micro_batches * sum(part.context_bytes for part in parts)
            volume["tensor"] = max(volume["tensor"], tensor)
            volume["context"] = max(volume["context"], context)
            expert = plan.micro_batches * sum(part.expert_bytes for part in parts)
            volume["expert"] = max(volume["expert"], expert)
            # Hidden states forward, and gradients back.
            messages = sum((not span.last) + (not span.first) for span in plan.stages_of(rank))
            if plan.pipeline > 1:
                sent = float(messages * plan.micro_batches * self.shapes.handed_bytes)
                if self._tied_over_pipeline and rank in (0, plan.pipeline - 1):
                    sent += self._shared_bytes
                volume["pipeline"] = max(volume["pipeline"], sent)
        volume["data"] = max(map(self._data_bytes, self._held_by_ranks)) + self._solved_bytes
        speed = {
            "tensor": network.bandwidth(network.tensor),
            "context": network.message_bandwidth(network.context.nodes > 1),
            "expert": network.spread_bandwidth(network.expert),
            "data": network.bandwidth(network.replicas),
            "pipeline": network.message_bandwidth(network.pipeline_crosses_nodes),
        }
        return volume, {axis: sent / speed[axis] for axis, sent in volume.items()}

    def _data_bytes(self, held: Sequence[Held]) -> float:
        """Return the bytes that a rank sends to its replicas for gradients and weights of all that
        it holds."""
        plan, total = self.plan, 0.0
        # Without whole gradients (from stage 2 on) nothing can be accumulated over micro-batches
        # first.
        reductions = plan.micro_batches if plan.zero_stage >= 2 else 1
        # ZeRO 3 gathers the weights in the forward pass and again in the backward pass.
        gathers = {0: 0, 1: 1, 2: 1, 3: 2 * plan.micro_batches}[plan.zero_stage]
        for part in held:
            # A ring sends this share of the whole tensor; an all-reduce sends it twice.
            share = (part.replicas - 1) / part.replicas
            reduced = part.trained * 4 * reductions * (2 if all_reduces(plan) else 1)
            # ZeRO 3 gathers frozen weights too; below it only what the optimizer has changed.
            size = part.params if plan.zero_stage == 3 else part.trained
            gathered = size * self.shapes.element * gathers
            if plan.zero_stage in (1, 2) and part.replicas > 1:
                # A byte each; before, the largest number of each block in an all-reduce.
                gathered -= part.coded * (self.shapes.element - 1)
                gathered += part.coded // FP8_BLOCK**2 * 8
            total += share * (reduced + gathered)
        return total

    @property
    def _solved_bytes(self) -> float:
        """Bytes that a rank sends for updates of whole matrices: its parts to their owners, and
        what they own back."""
        plan, ranks = self.plan, self.plan.replicas * self.plan.tensor
        replicas = (
            [plan.replicas, plan.replicas_of(plan.experts)] if plan.zero_stage else [ranks, ranks]
        )
        updated = 0.0
        for rank in range(plan.pipeline):
            sizes = [self.sizes[span.index] for span in plan.stages_of(rank)]
            of_experts = sum(size.experts.solved for size in sizes)
            dense = sum(size.solved for size in sizes) - of_experts
            updated = max(updated, dense / replicas[0] + of_experts / replicas[1])
        is_cut = max(plan.tensor, plan.experts.holders) > 1
        ways = 2 if plan.zero_stage or is_cut else 1
        # fp32, to the owners and back; what a rank owns itself does not travel.
        return ways * 4.0 * updated * (ranks - 1) / ranks

    def _partial_bytes(self, rank: int) -> float:
        """Return the bytes that a pipeline rank sends to sum gradients of which each tensor rank
        has a part."""
        plan = self.plan
        held = [w for w in plan.weights_of(rank, self.table.weights) if not w.frozen]
        elements = sum(
            prod(w.local_shape(plan.tensor))
            for w in held
            if w.sums_over_tensor_ranks(plan.sequence)
        )
        reductions = plan.micro_batches if plan.zero_stage >= 2 else 1
        return 2 * 4.0 * elements * reductions * (plan.tensor - 1) / plan.tensor

    def _parts_of(self, span: StageSpan) -> PassTimes:
        """Add up the times and messages of a stage's parts."""
        total = sum(
            (times * count for count, times in runs(self.lean[span.start : span.layers.stop])),
            NOTHING,
        )
        if span.first:
            total += self.costs.embedding()
        if span.last:
            total += self.costs.end()
        return total
