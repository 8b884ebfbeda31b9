"""What a plan costs on given hardware: memory of every pipeline rank, the time of a step, MFU and traffic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from megalite.config import Config
from megalite.models import weight_table
from megalite.models.weights import Weight
from megalite.observe.throughput import model_flops_per_token
from megalite.plan import Plan, StageSpan
from megalite.planner.cost import NOTHING, Costs, PassTimes, optimizer_bytes
from megalite.planner.hardware import Hardware
from megalite.planner.kernels import MEGALITE, Kernels, Software
from megalite.planner.memory import Memory, rank_memories
from megalite.planner.network import Network, place
from megalite.planner.schedule import Order, order_of
from megalite.planner.shapes import LocalSizes, Shapes, StageSizes, shapes_of
from megalite.planner.simulate import Links, Piece, StageWork, Timeline, simulate

HEADROOM_GB = 2.0
"""GiB of a GPU that are not for tensors: the CUDA context, cuBLAS' workspaces and NCCL's buffers."""

FRAGMENTATION = 0.05
"""Share of the rest that the allocator cannot use for its being in pieces."""


@dataclass(frozen=True)
class Estimate:
    config: Config
    plan: Plan
    hardware: Hardware
    memory: tuple[Memory, ...]
    """Of each pipeline rank."""
    step_time_s: float
    bubble: float
    """Share of the pipeline ranks' time in which they wait for each other."""
    volume: dict[str, float]
    """Bytes that a rank sends in a step, by axis: of the rank that sends most."""
    comm_time: dict[str, float]
    """Seconds of a step that messages of each axis take, hidden or not, of the rank where they take longest."""
    exposed_s: float
    """Seconds at the end of the step in which reductions of gradients are waited for."""
    optimizer_s: float
    tokens_per_s: float
    mfu: float
    timeline: Timeline

    @property
    def fullest(self) -> Memory:
        return max(self.memory, key=lambda memory: memory.total)

    @property
    def fits(self) -> bool:
        return self.fullest.total <= usable_bytes(self.hardware)


def usable_bytes(hardware: Hardware) -> float:
    """Bytes of a GPU that tensors may take."""
    return (hardware.chip.memory_gb - HEADROOM_GB) * (1 - FRAGMENTATION) * 2**30


def estimate(
    config: Config, plan: Plan, hardware: Hardware, *, software: Software = MEGALITE, record: bool = False
) -> Estimate:
    """Simulate a step. `record` keeps every event of it, for a picture. Raises ConfigError for what cannot be known."""
    return Outlook(config, plan, hardware, weight_table(config.model, config.lora), software).estimate(record)


def memory_of(config: Config, plan: Plan, *, device: Literal["cuda", "cpu"] = "cuda") -> tuple[Memory, ...]:
    """Bytes of each pipeline rank."""
    weights = weight_table(config.model, config.lora)
    shapes = shapes_of(config, plan, weights)
    order = order_of(plan.schedule, plan.pipeline, plan.virtual, plan.micro_batches)
    local = LocalSizes(weights, plan.tensor)
    sizes = [local.of(stage) for stage in plan.stages]
    return rank_memories(plan, config, shapes, sizes, order, device)


class Outlook:
    """One plan, worked out piece by piece: the cheap parts decide in a search whether the others are asked for."""

    def __init__(
        self,
        config: Config,
        plan: Plan,
        hardware: Hardware,
        weights: Sequence[Weight],
        software: Software = MEGALITE,
        local: LocalSizes | None = None,
    ):
        """`local` are the sizes of `weights` at the plan's tensor parallelism, where they are already known."""
        self.config, self.plan, self.hardware, self.software = config, plan, hardware, software
        self.shapes: Shapes = shapes_of(config, plan, weights)
        local = local or LocalSizes(weights, plan.tensor)
        self.sizes: tuple[StageSizes, ...] = tuple(local.of(stage) for stage in plan.stages)
        self.network: Network = place(plan, hardware)
        self.kernels = Kernels(hardware.chip, software, self.shapes.element)
        self.costs = Costs(self.shapes, self.kernels, self.network, products_add=plan.engine == "native")

    @cached_property
    def order(self) -> Order:
        return order_of(self.plan.schedule, self.plan.pipeline, self.plan.virtual, self.plan.micro_batches)

    @cached_property
    def memory(self) -> tuple[Memory, ...]:
        return rank_memories(self.plan, self.config, self.shapes, self.sizes, self.order, "cuda")

    @cached_property
    def work(self) -> tuple[StageWork, ...]:
        plain = self.costs.layer("none")
        lean = self.costs.layer(self.config.train.recompute)
        return tuple(self._stage_work(span, plain, lean) for span in self.plan.stages)

    def _stage_work(self, span: StageSpan, plain: PassTimes, lean: PassTimes) -> StageWork:
        sizes = self.sizes[span.index]
        num_lean = self.config.train.recompute_layers or len(sizes.layers)
        trained = sizes.trained
        both = zip(sizes.layers, trained.layers, strict=True)
        parts = [(lean if number < num_lean else plain, *size) for number, size in enumerate(both)]
        if span.first:
            parts.insert(0, (self.costs.embedding(), sizes.before, trained.before))
        if span.last:
            parts.append((self.costs.head(), sizes.after, trained.after))
        total = sum((times for times, _, _ in parts), NOTHING)
        pieces = tuple(
            Piece(
                times.forward,
                times.backward_weight if self._separate else times.backward,
                self._gather_time(stepped),
                self._reduce_time(stepped) if self.plan.zero_stage < 3 else 0.0,
            )
            for times, _, stepped in parts
        )
        forward, backward = total.forward, total.backward
        if self.plan.zero_stage == 3:
            # Weights are gathered and gradients reduced in every pass, beside the work on the layer before.
            forward = sum(max(t.forward, self._whole_time(size)) for t, size, _ in parts)
            backward = sum(max(t.backward, self._whole_time(size) + self._reduce_time(s)) for t, size, s in parts)
        return StageWork(forward, backward, total.backward_input, total.backward_weight, pieces)

    def _whole_time(self, size: int) -> float:
        return self.network.gather(size * self.shapes.element, self.network.replicas)

    def _gather_time(self, size: int) -> float:
        return self._whole_time(size) if self.plan.zero_stage in (1, 2) else 0.0

    def _reduce_time(self, size: int) -> float:
        collective = self.network.gather if self.plan.zero_stage else self.network.all_reduce
        return collective(4.0 * size, self.network.replicas)

    @property
    def links(self) -> Links:
        pipeline = self.plan.pipeline > 1
        return Links(
            hand_over=self.network.hand_over(self.shapes.hidden_bytes) if pipeline else 0.0,
            waits_for_hand_over=pipeline and self.plan.schedule == "1f1b",
            reduces_every_time=self.plan.zero_stage == 2,
        )

    @property
    def optimizer_s(self) -> float:
        """The global norm, the update of this rank's shard, and at stage 0 on everything; of the fullest rank."""
        params = self.most_trained / (self.plan.replicas if self.plan.zero_stage else 1)
        norm = self.network.all_reduce(4.0, self.network.replicas) if self.plan.world_size > 1 else 0.0
        tied = self.network.hand_over(4.0 * self.sizes[-1].after) if self._tied_over_pipeline else 0.0
        return norm + 2 * tied + self.kernels.memory(params * optimizer_bytes(len(self.config.optimizer.STATES)))

    @property
    def _tied_over_pipeline(self) -> bool:
        return self.plan.pipeline > 1 and self.config.model.tie_embeddings and not self.shapes.frozen

    @cached_property
    def most_params(self) -> int:
        """Elements of weights on the fullest rank."""
        return self._most([size.total for size in self.sizes])

    @cached_property
    def most_trained(self) -> int:
        """Of those that are not frozen."""
        return self._most([size.trained.total for size in self.sizes])

    def _most(self, sizes: Sequence[int]) -> int:
        return max(sum(sizes[span.index] for span in self.plan.stages_of(rank)) for rank in range(self.plan.pipeline))

    @property
    def shortest_step_s(self) -> float:
        """No simulation can be quicker: a rank's work, after the way to it is filled and before the way back is
        drained."""
        plan, work = self.plan, self.work
        longest = 0.0
        for rank in range(plan.pipeline):
            busy = sum(work[span.index].forward + self._whole_backward(span.index) for span in plan.stages_of(rank))
            ways = sum(work[index].forward for index in range(rank))
            if not self._separate:  # the passes that end a zero-bubble schedule are nobody's to wait for
                ways += sum(work[index].backward for index in range(rank))
            longest = max(longest, busy * plan.micro_batches + ways)
        return longest + self.optimizer_s

    @property
    def _separate(self) -> bool:
        """Backward passes come in two halves."""
        return self.plan.pipeline > 1 and self.plan.schedule == "zero_bubble"

    def _whole_backward(self, stage: int) -> float:
        work = self.work[stage]
        return work.backward_input + work.backward_weight if self._separate else work.backward

    def estimate(self, record: bool = False) -> Estimate:
        timeline = simulate(self.order, self.work, self.links, self.plan.micro_batches, record)
        step = timeline.end + self.optimizer_s
        tokens_per_s = self.plan.tokens_per_step / step
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
        """Bytes a rank sends in a step and seconds that takes at the links' speed, by axis."""
        plan, network = self.plan, self.network
        volume = dict.fromkeys(("tensor", "context", "data", "pipeline"), 0.0)
        for rank in range(plan.pipeline):
            parts = [self._parts_of(span) for span in plan.stages_of(rank)]
            volume["tensor"] = max(volume["tensor"], plan.micro_batches * sum(p.tensor_bytes for p in parts))
            volume["context"] = max(volume["context"], plan.micro_batches * sum(p.context_bytes for p in parts))
        share = (plan.replicas - 1) / plan.replicas
        reductions = plan.micro_batches if plan.zero_stage >= 2 else 1
        gathers = {0: 0, 1: 1, 2: 1, 3: 2 * plan.micro_batches}[plan.zero_stage]
        reduced = self.most_trained * 4 * reductions * (1 if plan.zero_stage else 2)
        gathered = (self.most_params if plan.zero_stage == 3 else self.most_trained) * self.shapes.element * gathers
        volume["data"] = share * (reduced + gathered)
        if plan.pipeline > 1:
            volume["pipeline"] = 2.0 * plan.virtual * plan.micro_batches * self.shapes.hidden_bytes
        speed = {
            "tensor": network.bandwidth(network.tensor),
            "context": network.message_bandwidth(network.context.nodes > 1),
            "data": network.bandwidth(network.replicas),
            "pipeline": network.message_bandwidth(network.pipeline_crosses_nodes),
        }
        return volume, {axis: sent / speed[axis] for axis, sent in volume.items()}

    def _parts_of(self, span: StageSpan) -> PassTimes:
        total = self.costs.layer(self.config.train.recompute) * (span.stop - span.start)
        if span.first:
            total += self.costs.embedding()
        return total + self.costs.head() if span.last else total
