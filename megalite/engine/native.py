"""Data parallelism and ZeRO stages 0 to 2 (Rajbhandari et al. 2020), in the manner of Megatron's distributed
optimizer.

The weights lie in a few flat buckets, filled in the order in which the backward pass finishes them. Each replica
answers for one equal shard of every bucket. A step:

    backward       each gradient is added to its place in an fp32 bucket as it arrives; when the last micro-batch
                   has filled a bucket, its reduction starts and runs beside the rest of the backward
    norm           from the shards, one number over all ranks
    update         of this rank's shard, by the optimizer: clipping, fp32 master weights, its states, rounded weights
    all-gather     every rank gets all of the new weights, of a bucket while the next is updated; a module's forward
                   waits for its own weights only, so that the rest travels beside the next forward

                   gradients kept      reduced by        optimizer state
    stage 0        whole, fp32         all-reduce        whole on every rank, no all-gather
    stage 1        whole, fp32         reduce-scatter    shard
    stage 2        shard, fp32         reduce-scatter    shard; the reduction runs for every micro-batch, and whole
                                                         buckets exist only while they are filled and reduced
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.profiler import record_function

from megalite.comm.collectives import (
    Wait,
    add_from_other_end,
    all_reduce,
    start_all_gather,
    start_reduce,
    start_reduce_scatter,
)
from megalite.comm.mesh import Mesh
from megalite.config import Config
from megalite.engine import Permit, ReadState, Sharing
from megalite.engine.gather import Gather, GatherAside, GatherOnHost, HostBuffers
from megalite.engine.layout import Bucket, Slot, elements_of, make_buckets
from megalite.kernels.optimizer import sum_of_squares
from megalite.kernels.weight_gradient import accumulate_weight_gradient
from megalite.models import set_parameters
from megalite.models.layers import Decoder
from megalite.models.weights import Weight
from megalite.parallel.tensor import ParallelLinear
from megalite.plan import Plan
from megalite.runtime.activity import NOW

IN_FLIGHT = 2
"""Buckets whose reduction stage 2 lets run at a time: one travels while the next is filled."""


class BucketWeights:
    """Hold the weights of one bucket on one rank. A frozen bucket has nothing else."""

    def __init__(self, layout: Bucket, mesh: Mesh, dtype: torch.dtype):
        self.layout = layout
        self.low, self.high = layout.shard(mesh.replicas.rank, mesh.replicas.size)
        self.weights = torch.zeros(layout.size, dtype=dtype, device=mesh.device)


class BucketState(BucketWeights):
    """Hold the tensors of one bucket on one rank: weights, gradients, optimizer state."""

    def __init__(self, layout: Bucket, mesh: Mesh, dtype: torch.dtype, zero_stage: int, states: Sequence[str]):
        super().__init__(layout, mesh, dtype)
        self.zero_stage = zero_stage
        # The part that the optimizer updates: this rank's shard, or at stage 0 everything.
        self.stepped = slice(self.low, self.high) if zero_stage else slice(0, layout.size)
        master = self.weights[self.stepped]
        self.master = master.float()  # for fp32 weights, .float() copies nothing: they are their own master weights
        self.states = {name: torch.zeros_like(self.master) for name in states}
        self.grads: Tensor | None = None  # [size] fp32; at stage 2 only while a micro-batch is under way
        self.grad_shard: Tensor | None = None  # stage 2: [shard] fp32, summed over micro-batches
        # Events that make up one micro-batch: for each weight its post-accumulate hook, and for each linear layer its
        # last weight-gradient GEMM (`_adopt` adds these). `events` counts since the step began.
        self.num_events, self.events = len(layout.slots), 0
        self.filled: set[int] = set()  # starts of the slots that hold a gradient in `grads`
        self.gathered: Wait | None = None  # set while the new weights travel from the other replicas

    def await_weights(self) -> None:
        """Wait until the new weights of all replicas are here."""
        if self.gathered is not None:
            self.gathered()
            self.gathered = None

    def whole_grads(self) -> Tensor:
        """Return the buffer that a micro-batch's gradients are put into: [size] fp32."""
        if self.grads is None:
            # Zeroed once, for the padding between weights: slots are overwritten, not added to, by their first
            # gradient.
            self.grads = torch.zeros(self.layout.size, device=self.weights.device)
        return self.grads

    def state(self, kind: str) -> Tensor:
        """Return this rank's shard of the weights, an optimizer state or the reduced gradients: [shard]."""
        if kind == "weight":
            return self.weights[self.low : self.high]
        whole = self.gradient() if kind == "grad" else self.stepped_state(kind)
        return whole if self.zero_stage else whole[self.low : self.high]

    def stepped_state(self, kind: str) -> Tensor:
        """Return the master weights or an optimizer state, for the part that the optimizer updates."""
        return self.master if kind == "master" else self.states[kind]

    def gradient(self) -> Tensor:
        """Return the reduced gradient of the part that the optimizer updates."""
        if self.zero_stage == 2:
            assert self.grad_shard is not None
            return self.grad_shard
        assert self.grads is not None
        return self.grads[self.stepped]


class NativeEngine:
    """Give models on the meta device, parallelised or not, their weights, and train them. See `Engine`."""

    def __init__(self, models: Sequence[Decoder], weights: Sequence[Weight], plan: Plan, mesh: Mesh, config: Config):
        self.mesh, self.config, self.optimizer = mesh, config.optimizer, config.optimizer.build()
        self.zero_stage = plan.zero_stage
        # Counted on the device: whether a step updates anything is decided there.
        self._num_updates = torch.zeros((), dtype=torch.float64, device=mesh.device)
        self.dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
        layout = make_buckets(weights, plan, elements_of(config.parallel.bucket_mb))
        states = config.optimizer.STATES
        self.buckets = [BucketState(b, mesh, self.dtype, plan.zero_stage, states) for b in layout if not b.frozen]
        self.frozen = [BucketWeights(b, mesh, self.dtype) for b in layout if b.frozen]
        self._home: dict[Tensor, tuple[BucketState, Slot]] = {}
        self._adopt(models)
        self._unchanging = threading.Event()  # set when no copy of the state is pending
        self._unchanging.set()
        self._aside: GatherAside | None = None
        self._micro_batches = 1
        self._next = 0  # stages 0 and 1 reduce buckets in one order on all ranks; otherwise their collectives would mix
        self._in_flight: deque[tuple[BucketState, Tensor, Wait]] = deque()
        # The next forward pass needs first what the backward pass finished last.
        self._forward_order = sorted(self.buckets, key=lambda b: min(map(_number_in(weights), b.layout.slots)))

    @property
    def states(self) -> tuple[str, ...]:
        return (*([] if self.dtype == torch.float32 else ["master"]), *self.config.STATES)

    @property
    def num_updates(self) -> int:
        return int(self._num_updates)

    def _adopt(self, models: Sequence[Decoder]) -> None:
        """Make every parameter a view into its bucket, register its post-accumulate hook, and make modules wait for
        it."""
        shapes = {name: parameter.shape for model in models for name, parameter in model.named_parameters()}
        views: dict[str, nn.Parameter] = {}
        for bucket in [*self.buckets, *self.frozen]:
            for slot in bucket.layout.slots:
                name = slot.weight.name
                view = bucket.weights[slot.start : slot.stop].view(shapes[name])
                views[name] = nn.Parameter(view, requires_grad=not slot.weight.frozen)
                if isinstance(bucket, BucketState):
                    views[name].register_post_accumulate_grad_hook(self._take_gradient)
                    self._home[views[name]] = (bucket, slot)
        assert views.keys() == shapes.keys(), f"table and model differ: {views.keys() ^ shapes.keys()}"
        for model in models:
            set_parameters(model, views)
            # Modules wait for weights before whole layers, whose inside may be compiled, and before the modules beside
            # the layers.
            beside = [child for child in model.children() if child is not model.layers]
            for unit in [*beside, *model.layers.values()]:
                buckets = {id(b): b for p in unit.parameters() if p in self._home for b, _ in [self._home[p]]}
                unit.register_forward_pre_hook(_await_weights_of(list(buckets.values())))
            for module in model.modules():
                if isinstance(module, ParallelLinear) and module.weight in self._home:
                    module.deliver = self._add_product
                    self._home[module.weight][0].num_events += 1

    # --- a step ---------------------------------------------------------------------------------------------------

    def begin(self, num_micro_batches: int) -> None:
        self._micro_batches, self._next = num_micro_batches, 0
        for bucket in self.buckets:
            bucket.events = 0

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def _take_gradient(self, parameter: Tensor) -> None:
        """Move a gradient that autograd accumulated into the bucket (post-accumulate hook). The hook also fires for
        weights whose gradient is delivered by a separate GEMM; then .grad is None."""
        bucket, slot = self._home[parameter]
        # None where the whole gradient comes as a GEMM. Both may come: a tied embedding's look-up is autograd's, the
        # head's GEMM is not.
        if parameter.grad is not None:
            place = bucket.whole_grads()[slot.start : slot.stop].view_as(parameter)
            if slot.start in bucket.filled:
                place.add_(parameter.grad)
            else:
                # The first gradient overwrites an older one: no pass over memory to zero it.
                place.copy_(parameter.grad)
            bucket.filled.add(slot.start)
            parameter.grad = None
        self._count_event(bucket)

    def _add_product(self, parameter: Tensor, grad: Tensor, x: Tensor, last: bool) -> None:
        """Add the weight-gradient GEMM gradᵀ x to the parameter's slot, in fp32. The callback `deliver` of linear
        layers; `last` marks the last GEMM of this weight in a micro-batch."""
        bucket, slot = self._home[parameter]
        place = bucket.whole_grads()[slot.start : slot.stop].view_as(parameter)
        accumulate_weight_gradient(place, grad, x, add=slot.start in bucket.filled)
        bucket.filled.add(slot.start)
        if last:
            self._count_event(bucket)

    def _count_event(self, bucket: BucketState) -> None:
        """Count one arrival in a bucket, and start the reductions that it completes.

        A bucket is complete when every weight's hook has fired and every linear layer's GEMM has come. Neither alone
        would do: under zero bubble a GEMM comes long after the hook, else before it."""
        bucket.events += 1
        if bucket.layout.tied:  # complete only with the other end's part, which `finish` adds
            return
        if self.zero_stage == 2:
            # Stage 2 keeps only a shard of the gradient sum, so every micro-batch is reduced as soon as it is
            # complete.
            if bucket.events % bucket.num_events == 0:
                self._reduce(bucket)
        else:
            # Stages 0 and 1 reduce once a step. Buckets may be completed out of order, and not in the same order on
            # all ranks; yet collectives must start in one order everywhere. So a complete bucket waits for those
            # before it.
            while self._next < len(self.buckets) and self._complete(self.buckets[self._next]):
                self._reduce(self.buckets[self._next])
                self._next += 1

    def _complete(self, bucket: BucketState) -> bool:
        """Return whether every gradient of the step has arrived in a bucket. A tied one is left to `finish`."""
        return bucket.events == self._micro_batches * bucket.num_events and not bucket.layout.tied

    def finish(self) -> None:
        for bucket in self.buckets[self._next :]:
            # Still to reduce: tied buckets, and those with a weight that a micro-batch did not use; at stage 2 also
            # those without any gradient, whose shard must be zeros.
            if self.zero_stage < 2 or bucket.filled or bucket.grad_shard is None:
                self._reduce(bucket)
        while self._in_flight:
            self._finish_oldest()

    def _reduce(self, bucket: BucketState) -> None:
        """Start reducing a bucket's gradients over its replicas, after summing over tensor ranks and both ends of the
        pipeline where its weights need that."""
        grads = bucket.whole_grads()
        for slot in bucket.layout.slots:
            if slot.start not in bucket.filled:  # a weight that no token used
                grads[slot.start : slot.stop] = 0.0
        if bucket.layout.partial_grad:
            all_reduce(grads, self.mesh.tensor)
        if bucket.layout.tied:
            add_from_other_end(grads, self.mesh.pipeline)
        start = start_reduce_scatter if self.zero_stage else start_reduce
        self._in_flight.append((bucket, grads, start(grads, self.mesh.replicas)))
        if self.zero_stage == 2:
            bucket.grads, bucket.filled = None, set()  # the next micro-batch fills a new buffer
            if len(self._in_flight) > IN_FLIGHT:
                self._finish_oldest()

    def _finish_oldest(self) -> None:
        """Wait for the oldest reduction under way; at stage 2, add this rank's shard to the sum over micro-batches."""
        bucket, grads, wait = self._in_flight.popleft()
        wait()
        if self.zero_stage == 2:
            shard = grads[bucket.low : bucket.high]
            bucket.grad_shard = shard.clone() if bucket.grad_shard is None else bucket.grad_shard.add_(shard)

    def step(self, lr: float, permit: Permit | None = None) -> Tensor:
        norm = self.gradient_norm()
        # The optimizer divides by it as it reads the gradients; nothing waits for the device.
        divisor = (norm / self.config.clip).clamp(min=1.0) if self.config.clip else torch.ones_like(norm)
        if permit is None:
            self._num_updates += 1
        else:
            permitted = permit(norm)
            self._num_updates += permitted
            # To the optimizer's update, a divisor of 0 means: change nothing.
            divisor = torch.where(permitted, divisor, 0.0)
        # Before the first update, where there is nothing to correct yet, a refused step must not divide by 0.
        common = self.optimizer.begin_step(divisor, self._num_updates.clamp(min=1))
        self.settle()
        self.await_copies()
        for bucket in self._forward_order:
            self._update(bucket, common, lr)
            bucket.grad_shard, bucket.filled = None, set()
            if self.zero_stage:
                bucket.gathered = start_all_gather(bucket.weights, self.mesh.replicas)
        return norm

    @record_function("Optimizer.step")  # what torch's own optimizers are called in a trace
    def _update(self, bucket: BucketState, common: Tensor, lr: float) -> None:
        """Update a bucket's shard; `common` is what the optimizer computed once for the step."""
        self.optimizer.update_(
            bucket.master,
            bucket.states,
            None if self.dtype == torch.float32 else bucket.weights[bucket.stepped],
            bucket.gradient(),
            common,
            lr=lr,
            weight_decay=self.config.weight_decay if bucket.layout.decay else 0.0,
        )

    def settle(self) -> None:
        """Wait until all of the new weights are here."""
        for bucket in self._forward_order:
            bucket.await_weights()

    def gradient_norm(self) -> Tensor:
        """Return the L2 norm of the whole gradient, with each logical element counted once."""
        counted = []
        for bucket in self.buckets:
            copy = bucket.layout.tied and self.mesh.pipeline.rank > 0
            if (bucket.layout.cut or self.mesh.tensor.rank == 0) and not copy:
                counted.append(bucket.state("grad"))
        if not counted:
            counted = [torch.zeros(0, device=self.mesh.device)]
        return all_reduce(sum_of_squares(*counted), self.mesh.world).sqrt().float()

    # --- state, in logical terms ----------------------------------------------------------------------------------

    def load(self, read: ReadState, num_updates: int = 0) -> None:
        # In fp32 the weights are the master weights, and begin as them.
        kind = "master" if self.dtype == torch.float32 else "weight"
        self.await_copies()
        self._num_updates.fill_(num_updates)
        for bucket in self.buckets:
            _fill(bucket, bucket.weights, 0, slice(bucket.low, bucket.high), read, kind)
            for state in self.states:
                _fill(bucket, bucket.stepped_state(state), bucket.stepped.start, bucket.stepped, read, state)
        for held in self.frozen:
            _fill(held, held.weights, 0, slice(held.low, held.high), read, "weight")
        # Each replica has read its shard alone, so that the weights are read once in all, and not once by each
        # replica.
        for wait in [start_all_gather(b.weights, self.mesh.replicas) for b in [*self.buckets, *self.frozen]]:
            wait()

    def copies(self) -> Iterator[tuple[Sharing, Tensor]]:
        self.settle()
        for bucket in self.buckets:
            whole = not bucket.layout.cut
            yield Sharing(True, whole, bucket.layout.tied), bucket.weights
            for state in self.states:
                yield Sharing(self.zero_stage == 0, whole, bucket.layout.tied), bucket.stepped_state(state)
        for held in self.frozen:
            yield Sharing(True, not held.layout.cut, held.layout.tied), held.weights

    def gather(self, kind: str, owners: Mapping[str, int], buffers: HostBuffers | None = None) -> dict[str, Tensor]:
        """Gather the logical tensors this rank owns. Shards travel over the replicas to the owner of their bucket,
        then local tensors over the tensor axis to the owner of the weight: the groups that training uses anyway, and
        memory for one bucket. `kind`, `owners` and `buffers` are as in `Engine.gather`."""
        self.settle()
        return self._assemble([bucket.state(kind) for bucket in self.buckets], owners, GatherOnHost(buffers))

    def _assemble(self, shards: Sequence[Tensor], owners: Mapping[str, int], way: Gather) -> dict[str, Tensor]:
        """Gather the tensors this rank owns from every rank's shard of every bucket."""
        owned: dict[str, Tensor] = {}
        for bucket, shard in zip(self.buckets, shards, strict=True):
            slots = bucket.layout.slots
            pipeline_rank, replica, _ = self.mesh.place_of(owners[slots[0].weight.name])
            if pipeline_rank != self.mesh.pipeline.rank:  # the copy of a tied weight at the other end
                continue
            parts = way.parts(shard, self.mesh.replicas, replica)
            if replica != self.mesh.replicas.rank:
                continue
            flat = torch.cat(parts) if len(parts) > 1 else parts[0]
            for slot in slots:
                tensor_rank = self.mesh.place_of(owners[slot.weight.name])[2]
                whole = way.assemble(tensor_rank, slot.weight, flat[slot.start : slot.stop], self.mesh)
                if whole is not None:
                    owned[slot.weight.name] = whole
        return owned

    def gather_later(
        self, kinds: Sequence[str], owners: Mapping[str, int], buffers: HostBuffers
    ) -> Callable[[], dict[str, dict[str, Tensor]]]:
        if self.mesh.device.type != "cpu":  # a device keeps the order of its stream, and NCCL is fast
            gathered = {kind: self.gather(kind, owners, buffers) for kind in kinds}
            return lambda: gathered
        self.settle()
        if self._aside is None:
            self._aside = GatherAside(self.mesh)
        way = self._aside
        self._unchanging.clear()

        def copy() -> dict[str, dict[str, Tensor]]:
            assert not self._unchanging.is_set(), "the state of that moment is gone"
            try:
                shards = {kind: [buffers.copy(bucket.state(kind)) for bucket in self.buckets] for kind in kinds}
            finally:
                self._unchanging.set()
            return {kind: self._assemble(shards[kind], owners, way) for kind in kinds}

        return copy

    def await_copies(self) -> None:
        """Wait until a checkpoint's copy is made, which happens beside the next forward and backward pass: until then,
        nothing that it takes may change."""
        if not self._unchanging.is_set():
            NOW.do("waiting for the checkpoint's copy")
            self._unchanging.wait()


def _number_in(weights: Sequence[Weight]) -> Callable[[Slot], int]:
    """Return a function that gives a slot's place in the table of `weights`."""
    number = {weight.name: place for place, weight in enumerate(weights)}
    return lambda slot: number[slot.weight.name]


def _await_weights_of(buckets: Sequence[BucketState]) -> Callable[[nn.Module, Any], None]:
    """Return a forward pre-hook that waits for the weights in `buckets`."""

    def hook(module: nn.Module, arguments: Any) -> None:
        for bucket in buckets:
            bucket.await_weights()

    return hook


def _fill(bucket: BucketWeights, into: Tensor, offset: int, part: slice, read: ReadState, kind: str) -> None:
    """Read `kind` for the elements `part` of a bucket. `into` holds the bucket's elements from `offset` on."""
    for slot in bucket.layout.slots:
        start, stop = max(slot.start, part.start), min(slot.stop, part.stop)
        if start < stop:
            into[start - offset : stop - offset] = read(slot.weight, kind, start - slot.start, stop - slot.start)
