"""Layout of the weights in the engine's flat buffers. Pure arithmetic: every rank knows the layout
of every other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from megalite.config import Config, OptimizerConfig, Treatment
from megalite.kernels.blockwise import DYNAMIC_BLOCK
from megalite.models.weights import Weight
from megalite.plan import Cut, Plan

ALIGNMENT = 32
"""Elements. Every weight starts at a multiple of 64 bytes even in bf16, so that vector loads stay
aligned."""

LEAST_MB, MB_OF_A_REPLICA = 40.0, 1.0
"""Size of a bucket in MB of fp32, where the config names none: at least, and for each replica. A
hop between nodes takes some 10 µs whatever it carries, in which a network card sends half a MB."""


@dataclass(frozen=True)
class Slot:
    """Position of one weight in its bucket: elements [start, stop)."""

    weight: Weight
    start: int
    stop: int


@dataclass(frozen=True)
class Kind:
    """What all weights of a bucket agree in: all that the optimizer and the reduction must know."""

    treatment: Treatment
    """How the optimizer updates them."""
    cut: bool
    """Cut over the tensor axis: each rank holds different elements, and a norm counts those of
    all."""
    partial_grad: bool
    """Each tensor rank has a part of the gradient, which is summed over them."""
    tied: bool
    """Both ends of a pipeline hold a copy, and the gradient is the sum of both ends'."""
    frozen: bool
    """Not trained: no gradient and no optimizer state."""
    of_experts: bool
    """Of experts that are cut over other ranks than dense weights, and have other replicas."""
    quantised: bool
    """Held in few bits."""
    in_codes: bool
    """Gathered as codes of fp8, of which ranks have no more than these."""
    alignment: int
    """Weights, and shards, begin at multiples of so many elements."""


@dataclass(frozen=True)
class Bucket(Kind):
    """Weights of one kind, which are reduced together."""

    slots: tuple[Slot, ...]
    size: int
    """Elements, a multiple of `alignment` × replicas, so that it splits into equal aligned shards."""

    @property
    def is_held(self) -> bool:
        """Return whether there are weights in it that nothing uses."""
        return any(slot.weight.held for slot in self.slots)

    def shard(self, rank: int, ranks: int) -> tuple[int, int]:
        """Return the range [low, high) of elements that replica `rank` of `ranks` is responsible
        for."""
        length = self.size // ranks
        return rank * length, (rank + 1) * length


def bucket_elements(config: Config, plan: Plan) -> int:
    """Return how many fp32 elements a bucket of gradients is filled to. Unless `config` says, that
    grows with the replicas of `plan`, each of which sends its share of a bucket at a time."""
    megabytes = config.parallel.bucket_mb or max(LEAST_MB, MB_OF_A_REPLICA * plan.replicas)
    return int(megabytes * 2**20 / 4)


def make_buckets(
    weights: Sequence[Weight],
    plan: Plan,
    optimizer: OptimizerConfig,
    max_elements: int,
) -> tuple[Bucket, ...]:
    """Fill buckets in the order in which a backward pass finishes the gradients: the last of
    `weights` first. Tied weights, whose gradient is only complete after the whole step, come last.
    `plan` says what is cut and summed, `optimizer` how each is updated.

    A weight larger than `max_elements` gets a bucket to itself."""
    open_slots: dict[Kind, list[Slot]] = {}
    closed: list[Bucket] = []
    # Everything in this key must be one and the same for a whole bucket, since a bucket is reduced
    # by one collective and updated by one call of the optimizer: mixing two kinds would need a
    # branch a slot.
    for weight in reversed(weights):
        coded = weight.coded and plan.gathers(weight)
        plain = weight.frozen or optimizer.keeps_fp32(weight)
        kind = Kind(
            optimizer.treatment(weight),
            is_cut(weight, plan.cut_of(weight)),
            weight.sums_over_tensor_ranks(plan.sequence),
            weight.place == "both" and plan.pipeline > 1,
            weight.frozen,
            weight.is_expert and plan.folds_experts,
            weight.quantised is not None,
            coded,
            ALIGNMENT if plain and not coded else DYNAMIC_BLOCK,
        )
        slots = open_slots.setdefault(kind, [])
        numel = prod(weight.local_shape(*plan.cut_of(weight)))
        start = _round_up(slots[-1].stop, kind.alignment) if slots else 0
        # Close the bucket that is full, and go on in a new one of the same kind. Small buckets
        # start to be reduced earlier in the backward pass; large ones use the network better
        # (Megatron's bucket_size).
        if slots and start + numel > max_elements:
            closed.append(_close(slots, kind, plan))
            slots.clear()
            start = 0
        slots.append(Slot(weight, start, start + numel))
    closed += [_close(slots, kind, plan) for kind, slots in open_slots.items()]
    # sorted is stable: other buckets stay in the order in which they fill up. No gradient arrives of
    # weights that are held, and what is complete would wait for them.
    return tuple(sorted(closed, key=lambda bucket: (bucket.tied, bucket.is_held)))


def is_cut(weight: Weight, cut: Cut) -> bool:
    """Return whether the holders of a weight each have another part of it."""
    return cut.holders > 1 and (weight.shard is not None or cut.expert > 1)


def _close(slots: list[Slot], kind: Kind, plan: Plan) -> Bucket:
    # Padded at the end, so that every replica's shard has the same length and starts aligned: a
    # reduce-scatter cuts a buffer into equal pieces wherever weights begin in it.
    replicas = plan.replicas_of(plan.cut_of(slots[0].weight))
    size = _round_up(slots[-1].stop, kind.alignment * replicas)
    return Bucket(**vars(kind), slots=tuple(slots), size=size)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def choose_owners(
    plan: Plan,
    weights: Sequence[Weight],
    optimizer: OptimizerConfig,
    max_elements: int,
) -> dict[str, int]:
    """Return the global rank that writes each weight, so that all ranks of a pipeline stage write
    about as much. All weights of a bucket are on one replica; a tied weight is written by the first
    stage. `optimizer` and `max_elements` are those of `make_buckets`."""
    owners: dict[str, int] = {}
    for pipeline_rank in range(plan.pipeline):
        # Elements that each rank of this stage is to write; stages hold other weights and are
        # balanced apart.
        load = [0] * (plan.replicas * plan.tensor)
        buckets = make_buckets(
            plan.weights_of(pipeline_rank, weights), plan, optimizer, max_elements
        )
        # Largest first, each to the rank with the least so far (Graham's rule, as `Matrices` has
        # it).
        for bucket in sorted(buckets, key=lambda bucket: -bucket.size):
            cut = plan.cut_of(bucket.slots[0].weight)
            # The ranks of a replica follow one another.
            ranks_of = [
                range(len(load))[first : first + cut.holders]
                for first in range(0, len(load), cut.holders)
            ]
            # First a replica for the bucket: its shards travel there in one gather. Then, of that
            # replica's holders, one for each weight, which gathers the parts of the others.
            ranks = min(ranks_of, key=lambda ranks: min(load[rank] for rank in ranks))
            for slot in sorted(bucket.slots, key=lambda slot: slot.start - slot.stop):
                # A tied weight is in the first stage's table and in the last's: the first has
                # claimed it already.
                if slot.weight.name not in owners:
                    rank = min(ranks, key=load.__getitem__)
                    load[rank] += slot.weight.numel
                    owners[slot.weight.name] = pipeline_rank * len(load) + rank
    return owners
