"""The gradients of `native`: they arrive one by one in a backward pass, fill buckets, and are
reduced beside it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.nn as nn
from torch import Tensor

from megalite.comm.collectives import (
    Wait,
    add_from_other_end,
    all_reduce,
    start_reduce,
    start_reduce_scatter,
)
from megalite.comm.mesh import Mesh
from megalite.config import BY_COUNTS
from megalite.engine.buckets import BucketState, BucketWeights, await_weights_of
from megalite.engine.layout import Slot
from megalite.kernels.experts import RowCounts, accumulate_grouped_weight_gradient
from megalite.kernels.linear import Operand, accumulate_weight_gradient
from megalite.kernels.optimizer import sum_of_squares
from megalite.models import set_parameters
from megalite.models.layers import Decoder
from megalite.models.weights import Weight
from megalite.parallel.expert import ParallelGroupedLinear
from megalite.parallel.tensor import ParallelLinear

IN_FLIGHT = 2
"""Buckets whose reduction stage 2 lets run at a time: one travels while the next is filled."""


class Gradients:
    """Make models' parameters views into buckets, collect their gradients there, and reduce
    them."""

    def __init__(
        self,
        models: Sequence[Decoder],
        buckets: Sequence[BucketState],
        frozen: Sequence[BucketWeights],
        quantised: Mapping[str, nn.Parameter],
        mesh: Mesh,
        zero_stage: int,
    ):
        """Take over `models` on the meta device, whose weights lie in `buckets` and, where they are
        not trained, in `frozen`, or are `quantised`, by name. Gradients are reduced over the
        replicas of `mesh` as `zero_stage` asks."""
        self.buckets, self.mesh, self.zero_stage = buckets, mesh, zero_stage
        # Where each parameter's gradient goes: hooks are called with the parameter and nothing
        # else.
        self._home: dict[Tensor, tuple[BucketState, Slot]] = {}
        self._adopt(models, frozen, quantised)
        self.observer: Callable[[BucketState, Tensor], None] | None = None
        """Called with each bucket's whole gradient on this replica, right before it is reduced over
        them."""
        self._micro_batches = 1
        self._next = 0  # stages 0 and 1 reduce buckets in one order on all ranks; otherwise their collectives would mix
        self._in_flight: deque[tuple[BucketState, Tensor, Wait]] = deque()

    def _adopt(
        self,
        models: Sequence[Decoder],
        frozen: Sequence[BucketWeights],
        quantised: Mapping[str, nn.Parameter],
    ) -> None:
        """Make every parameter a view into its bucket, register its post-accumulate hook, and make
        modules wait for it."""
        shapes = {
            name: parameter.shape
            for model in models
            for name, parameter in model.named_parameters()
        }
        views: dict[str, nn.Parameter] = dict(quantised)
        for bucket in [*self.buckets, *frozen]:
            for slot in bucket.layout.slots:
                name = slot.weight.name
                views[name] = bucket.parameter(slot, shapes[name])
                if isinstance(bucket, BucketState):
                    views[name].register_post_accumulate_grad_hook(self._take_gradient)
                    self._home[views[name]] = (bucket, slot)
        assert views.keys() == shapes.keys(), (
            f"table and model differ: {views.keys() ^ shapes.keys()}"
        )
        for model in models:
            set_parameters(model, views)
            # Modules wait for weights before whole layers, whose inside may be compiled, and before
            # the modules beside the layers.
            beside = [child for child in model.children() if child is not model.layers]
            for unit in [*beside, *model.layers.values()]:
                buckets = {
                    id(b): b
                    for p in unit.parameters()
                    if p in self._home
                    for b, _ in [self._home[p]]
                    if b.is_gathered
                }
                if buckets:
                    unit.register_forward_pre_hook(await_weights_of(list(buckets.values())))
            # Linears bring their weight gradient as a GEMM into the bucket, so autograd gives them
            # none, but still fires their hook. Both are counted: `num_events` grows by one for each
            # such module.
            for module in model.modules():
                if isinstance(module, ParallelLinear) and module.weight in self._home:
                    module.wgrad_callback = self._add_product
                elif isinstance(module, ParallelGroupedLinear) and module.weight in self._home:
                    module.wgrad_callback = self._add_grouped_product
                else:
                    continue
                self._home[module.weight][0].num_events += 1

    def begin(self, num_micro_batches: int) -> None:
        """Begin a step of so many micro-batches."""
        self._micro_batches, self._next = num_micro_batches, 0
        for bucket in self.buckets:
            bucket.events = 0

    def _take_gradient(self, parameter: Tensor) -> None:
        """Move a gradient that autograd accumulated into the bucket (post-accumulate hook). The
        hook also fires for weights whose gradient is delivered by a separate GEMM; then .grad is
        None."""
        bucket, slot = self._home[parameter]
        # None where the whole gradient comes as a GEMM. Both may come: a tied embedding's look-up
        # is autograd's, the head's GEMM is not.
        if parameter.grad is not None:
            # bf16 gradients are added up in fp32, over micro-batches and uses of a weight.
            main_grad = bucket.whole_grads()[slot.start : slot.stop].view_as(parameter)
            if slot.start in bucket.filled:
                main_grad.add_(parameter.grad)
            else:
                # The first gradient overwrites an older one: no pass over memory to zero it.
                main_grad.copy_(parameter.grad)
            bucket.filled.add(slot.start)
            parameter.grad = None
        self._count_event(bucket)

    def _add_product(self, parameter: Tensor, grad: Operand, x: Operand, last: bool) -> None:
        """Add the weight-gradient GEMM gradᵀ x to the parameter's slot, in fp32. The
        `wgrad_callback` of linear layers; `last` marks the last GEMM of this weight in a
        micro-batch."""
        bucket, slot = self._home[parameter]
        main_grad = bucket.whole_grads()[slot.start : slot.stop].view_as(parameter)
        # Not yet summed over the replicas, and not divided by anything: losses are scaled so that
        # the sum over micro-batches and replicas is the gradient.
        accumulate_weight_gradient(main_grad, grad, x, add=slot.start in bucket.filled)
        bucket.filled.add(slot.start)
        if last:
            self._count_event(bucket)

    def _add_grouped_product(
        self, parameter: Tensor, grad: Tensor, rows: Tensor, counts: RowCounts
    ) -> None:
        """Add the weight-gradient GEMMs of a stack of matrices likewise, each of which has `counts`
        of the rows."""
        bucket, slot = self._home[parameter]
        main_grad = bucket.whole_grads()[slot.start : slot.stop].view_as(parameter)
        accumulate_grouped_weight_gradient(
            main_grad, grad, rows, counts, add=slot.start in bucket.filled
        )
        bucket.filled.add(slot.start)
        self._count_event(bucket)

    def _count_event(self, bucket: BucketState) -> None:
        """Count one arrival in a bucket, and start the reductions that it completes.

        A bucket is complete when every weight's hook has fired and every linear layer's GEMM has
        come. Neither alone would do: under zero bubble a GEMM comes long after the hook, else
        before it."""
        bucket.events += 1
        if bucket.layout.tied:  # complete only with the other end's part, which `finish` adds
            return
        if self.zero_stage == 2:
            # Stage 2 keeps only a shard of the gradient sum, so every micro-batch is reduced as
            # soon as it is complete.
            if bucket.events % bucket.num_events == 0:
                self._reduce(bucket)
        else:
            # Stages 0 and 1 reduce once a step. Buckets may be completed out of order, and not in
            # the same order on all ranks; yet collectives must start in one order everywhere. So a
            # complete bucket waits for those before it.
            for bucket in self.buckets[self._next :]:
                has_all = bucket.events == self._micro_batches * bucket.num_events
                if not has_all or bucket.layout.tied:  # a tied one is left to `finish`
                    break
                self._reduce(bucket)
                self._next += 1

    def finish(self) -> None:
        """Reduce what is left, and wait until all of it is."""
        under_way = [bucket for bucket, _, _ in self._in_flight]
        for bucket in self.buckets[self._next :]:
            # Still to reduce: tied buckets, and those with a weight that a micro-batch did not use;
            # at stage 2 also those without any gradient, whose shard must be zeros. Those that
            # travel have no shard yet, either.
            has_none = bucket.grad_shard is None and bucket not in under_way
            if self.zero_stage < 2 or bucket.filled or has_none:
                self._reduce(bucket)
        while self._in_flight:
            self._finish_oldest()

    def _reduce(self, bucket: BucketState) -> None:
        """Start reducing a bucket's gradients over its replicas, after summing over tensor ranks
        and both ends of the pipeline where its weights need that."""
        grads = bucket.whole_grads()
        for slot in bucket.layout.slots:
            if slot.start not in bucket.filled:  # a weight that no token used
                grads[slot.start : slot.stop] = 0.0
        # Three sums of their own, which weights need or not, all linear, in a fixed order for the
        # same bits: tensor ranks (norms under sequence parallelism), both pipeline ends (tied),
        # then replicas.
        if bucket.layout.partial_grad:
            all_reduce(grads, self.mesh.tensor)
        if bucket.layout.tied:
            add_from_other_end(grads, self.mesh.pipeline)
        if self.observer:
            self.observer(bucket, grads)
        start = start_reduce_scatter if self.zero_stage else start_reduce
        self._in_flight.append((bucket, grads, start(grads, bucket.fold.replicas)))
        # torch's allocator gets the buffer back when the reduction is done; `_in_flight` bounds how
        # many whole buckets exist at a time, which is what stage 2 saves over stage 1.
        if self.zero_stage == 2:
            bucket.grads, bucket.filled = None, set()  # the next micro-batch fills a new buffer
            if len(self._in_flight) > IN_FLIGHT:
                self._finish_oldest()

    def _finish_oldest(self) -> None:
        """Wait for the oldest reduction under way; at stage 2, add this rank's shard to the sum
        over micro-batches."""
        bucket, grads, wait = self._in_flight.popleft()
        wait()
        if self.zero_stage == 2:
            shard = grads[bucket.low : bucket.high]
            bucket.grad_shard = (
                shard.clone() if bucket.grad_shard is None else bucket.grad_shard.add_(shard)
            )

    def norm(self) -> Tensor:
        """Return the L2 norm of the whole gradient, with each logical element counted once."""
        # This rank's shard, even at stage 0, where it has the whole: so each element is squared by
        # one rank.
        counted = [bucket.state("grad") for bucket in self.buckets if self.counts(bucket)]
        # A rank that counts nothing still takes part in the all-reduce.
        if not counted:
            counted = [torch.zeros(0, device=self.mesh.device)]
        # fp64 up to here: the order in which ranks are summed does not show in fp32.
        return all_reduce(sum_of_squares(*counted), self.mesh.world).sqrt().float()

    def counts(self, bucket: BucketState) -> bool:
        """Return whether this rank counts a bucket in sums over all ranks, to which each logical
        element goes once. Numbers of tokens are no gradient."""
        if bucket.layout.treatment.optimizer == BY_COUNTS:
            return False
        # Tied weights: the first stage counts them. Uncut weights: the first holder of each replica
        # does.
        copy = bucket.layout.tied and self.mesh.pipeline.rank > 0
        return (bucket.layout.cut or bucket.fold.holders.rank == 0) and not copy

    def squares(self) -> Iterator[tuple[Weight, Tensor]]:
        """Yield this rank's part of the sum of squares, fp64 [], of the reduced gradient of each
        weight of which it counts any."""
        for bucket in filter(self.counts, self.buckets):
            shard = bucket.state("grad")
            for slot in bucket.layout.slots:
                start, stop = max(slot.start, bucket.low), min(slot.stop, bucket.high)
                if start < stop:
                    yield slot.weight, sum_of_squares(shard[start - bucket.low : stop - bucket.low])

    def forget(self) -> None:
        """Forget the gradients: the next ones overwrite them."""
        for bucket in self.buckets:
            bucket.grad_shard, bucket.filled = None, set()
