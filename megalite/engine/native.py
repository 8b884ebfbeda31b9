"""Data parallelism and ZeRO stages 0 to 2 (Rajbhandari et al. 2020), in the manner of Megatron's distributed optimizer.

The weights lie in a few flat buckets, filled in the order in which the backward pass finishes them. Each data rank
answers for one equal shard of every bucket. A step:

    backward       each gradient is added to its place in an fp32 bucket as it arrives; when the last micro-batch
                   has filled a bucket, its reduction starts and runs beside the rest of the backward
    norm           from the shards, one number over all ranks
    AdamW          on this rank's shard: fp32 master weights and moments, with the clip factor in the same pass
    all-gather     every rank gets all of the new weights

                   gradients kept      reduced by        optimizer state
    stage 0        whole, fp32         all-reduce        whole on every rank, no all-gather
    stage 1        whole, fp32         reduce-scatter    shard
    stage 2        shard, fp32         reduce-scatter    shard; the reduction runs for every micro-batch, and whole
                                                         buckets exist only while they are filled and reduced
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import torch
import torch.nn as nn
from torch import Tensor

from megalite.config import OptimizerConfig
from megalite.engine.layout import Bucket, make_buckets
from megalite.mesh import Mesh
from megalite.models import set_parameters
from megalite.models.weights import Weight
from megalite.parallel.collectives import Wait, all_reduce, start_all_gather, start_reduce, start_reduce_scatter

IN_FLIGHT = 2
"""Buckets whose reduction stage 2 lets run at a time: one travels while the next is filled."""

STATES = ("master", "exp_avg", "exp_avg_sq")
"""Optimizer state of every weight. In fp32 the weights are their own master copy, and there is no "master"."""

ReadState = Callable[[Weight, str, int, int], Tensor]
"""(weight, "weight" or one of STATES, start, stop) → those elements of the flattened local tensor."""


class BucketState:
    """The tensors of one bucket on one rank."""

    def __init__(self, layout: Bucket, mesh: Mesh, dtype: torch.dtype, zero_stage: int):
        self.layout, self.zero_stage = layout, zero_stage
        self.low, self.high = layout.shard(mesh.data.rank, mesh.data.size)
        self.weights = torch.zeros(layout.size, dtype=dtype, device=mesh.device)
        # What the optimizer steps on: this rank's shard, or at stage 0 everything.
        self.stepped = slice(self.low, self.high) if zero_stage else slice(0, layout.size)
        master = self.weights[self.stepped]
        self.master = nn.Parameter(master if dtype == torch.float32 else master.float())
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(self.master), torch.zeros_like(self.master)
        self.grads: Tensor | None = None  # [size] fp32; at stage 2 only while a micro-batch is under way
        self.grad_shard: Tensor | None = None  # stage 2: [shard] fp32, summed over micro-batches
        self.missing = 0
        self.filled: set[int] = set()  # starts of the slots that hold a gradient of this step

    def whole_grads(self) -> Tensor:
        """Where gradients of a micro-batch are put: [size] fp32."""
        if self.grads is None:
            # Zeros once, for the padding between weights.
            self.grads = torch.zeros(self.layout.size, device=self.weights.device)
        return self.grads

    def state(self, kind: str) -> Tensor:
        """This rank's shard of the weights, an optimizer state or the reduced gradients: [shard]."""
        if kind == "weight":
            return self.weights[self.low : self.high]
        if kind == "grad":
            whole = self.gradient()
        else:
            whole = {"master": self.master.data, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}[kind]
        return whole if self.zero_stage else whole[self.low : self.high]

    def gradient(self) -> Tensor:
        """The reduced gradient of what the optimizer steps on."""
        if self.zero_stage == 2:
            assert self.grad_shard is not None
            return self.grad_shard
        assert self.grads is not None
        return self.grads[self.stepped]


class NativeEngine:
    """Gives a clean or parallelised model on the meta device its weights, and trains it.

    Call `load` once, `backward` for every micro-batch, `step` once a global batch."""

    def __init__(
        self,
        model: nn.Module,
        weights: Sequence[Weight],
        mesh: Mesh,
        optimizer: OptimizerConfig,
        *,
        dtype: torch.dtype,
        zero_stage: int,
        sequence: bool,
        bucket_mb: float = 40.0,
    ):
        self.mesh, self.clip, self.sequence = mesh, optimizer.clip, sequence
        self.zero_stage, self.dtype = zero_stage, dtype
        layout = make_buckets(weights, mesh.tensor.size, mesh.data.size, int(bucket_mb * 2**20 / 4))
        self.buckets = [BucketState(bucket, mesh, dtype, zero_stage) for bucket in layout]
        self._adopt(model)
        self.optimizer = self._make_optimizer(optimizer)
        self._next = 0  # buckets are reduced in one order on all ranks, or their collectives would mix
        self._last = True
        self._in_flight: deque[tuple[BucketState, Wait]] = deque()

    @property
    def states(self) -> tuple[str, ...]:
        return STATES[1:] if self.dtype == torch.float32 else STATES

    def _adopt(self, model: nn.Module) -> None:
        """Make every parameter a view into its bucket, and watch its gradient arrive."""
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        views: dict[str, nn.Parameter] = {}
        for bucket in self.buckets:
            for slot in bucket.layout.slots:
                name = slot.weight.name
                views[name] = nn.Parameter(bucket.weights[slot.start : slot.stop].view(shapes[name]))
                views[name].register_post_accumulate_grad_hook(self._hook(bucket, slot.start, slot.stop))
        assert views.keys() == shapes.keys(), f"not in the table of weights: {list(shapes.keys() - views.keys())}"
        set_parameters(model, views)

    def _make_optimizer(self, config: OptimizerConfig) -> torch.optim.Optimizer:
        groups = [
            {"params": [b.master for b in self.buckets if b.layout.decay], "weight_decay": config.weight_decay},
            {"params": [b.master for b in self.buckets if not b.layout.decay], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
        for bucket in self.buckets:
            optimizer.state[bucket.master] = {
                "step": torch.zeros((), device=self.mesh.device),
                "exp_avg": bucket.exp_avg,
                "exp_avg_sq": bucket.exp_avg_sq,
            }
        return optimizer

    # --- a step ---------------------------------------------------------------------------------------------------

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradients of a micro-batch. `last` starts the reduction over data ranks as the gradients appear.

        Losses must be scaled so that their sum over all micro-batches and data ranks is the loss to descend."""
        self._last, self._next = last, 0
        for bucket in self.buckets:
            bucket.missing = len(bucket.layout.slots)
        loss.backward()
        if self._reduces_now:
            for bucket in self.buckets[self._next :]:
                self._reduce(bucket)
            while self._in_flight:
                self._finish_oldest()

    @property
    def _reduces_now(self) -> bool:
        return self._last or self.zero_stage == 2

    def _hook(self, bucket: BucketState, start: int, stop: int) -> Callable[[Tensor], None]:
        def arrived(parameter: Tensor) -> None:
            assert parameter.grad is not None
            place = bucket.whole_grads()[start:stop].view_as(parameter)
            if start in bucket.filled:
                place.add_(parameter.grad)
            else:
                place.copy_(parameter.grad)
                bucket.filled.add(start)
            parameter.grad = None
            bucket.missing -= 1
            if self._reduces_now:
                self._reduce_ready()

        return arrived

    def _reduce_ready(self) -> None:
        while self._next < len(self.buckets) and self.buckets[self._next].missing == 0:
            self._reduce(self.buckets[self._next])
            self._next += 1

    def _reduce(self, bucket: BucketState) -> None:
        grads = bucket.whole_grads()
        for slot in bucket.layout.slots:
            if slot.start not in bucket.filled:  # a weight that no token used
                grads[slot.start : slot.stop] = 0.0
        if bucket.layout.partial_grad and self.sequence:
            all_reduce(grads, self.mesh.tensor)
        start = start_reduce_scatter if self.zero_stage else start_reduce
        self._in_flight.append((bucket, start(grads, self.mesh.data)))
        if self.zero_stage == 2 and len(self._in_flight) > IN_FLIGHT:
            self._finish_oldest()

    def _finish_oldest(self) -> None:
        bucket, wait = self._in_flight.popleft()
        wait()
        if self.zero_stage == 2:
            assert bucket.grads is not None
            shard = bucket.grads[bucket.low : bucket.high]
            bucket.grad_shard = shard.clone() if bucket.grad_shard is None else bucket.grad_shard.add_(shard)
            bucket.grads, bucket.filled = None, set()

    def step(self, lr: float) -> Tensor:
        """Clip, update the weights, forget the gradients. Returns the global gradient norm before clipping, fp32 []."""
        norm = self.gradient_norm()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.clip:
            # The fused update divides by grad_scale in its own pass over the gradients; nothing waits for the device.
            self.optimizer.grad_scale = (norm / self.clip).clamp(min=1.0)  # type: ignore[attr-defined]
        for bucket in self.buckets:
            bucket.master.grad = bucket.gradient()
        self.optimizer.step()
        for bucket in self.buckets:
            bucket.master.grad, bucket.grad_shard, bucket.filled = None, None, set()
            if bucket.weights.dtype != torch.float32:
                bucket.weights[bucket.stepped].copy_(bucket.master.data)
        if self.zero_stage:
            for wait in [start_all_gather(bucket.weights, self.mesh.data) for bucket in self.buckets]:
                wait()
        return norm

    def gradient_norm(self) -> Tensor:
        """L2 norm of the whole gradient, each logical element counted once."""
        total = torch.zeros((), device=self.mesh.device)
        for bucket in self.buckets:
            if bucket.layout.cut or self.mesh.tensor.rank == 0:
                total += torch.linalg.vector_norm(bucket.state("grad")).square()
        return all_reduce(total, self.mesh.world).sqrt()

    # --- state, in logical terms ----------------------------------------------------------------------------------

    def load(self, read: ReadState, num_steps: int = 0) -> None:
        """Fill weights and optimizer state, asking `read` only for what this rank answers for. All ranks call it."""
        # In fp32 the weights are the master weights, and begin as them.
        kind = "master" if self.dtype == torch.float32 else "weight"
        for bucket in self.buckets:
            _fill(bucket, bucket.weights, 0, slice(bucket.low, bucket.high), read, kind)
            for state in self.states:
                whole = bucket.master.data if state == "master" else getattr(bucket, state)
                _fill(bucket, whole, bucket.stepped.start, bucket.stepped, read, state)
            self.optimizer.state[bucket.master]["step"].fill_(num_steps)
        # What the data ranks have read of the weights is read once in all, not once by each.
        for wait in [start_all_gather(bucket.weights, self.mesh.data) for bucket in self.buckets]:
            wait()


def _fill(bucket: BucketState, into: Tensor, offset: int, part: slice, read: ReadState, kind: str) -> None:
    """Read `kind` for the elements `part` of a bucket. `into` holds the bucket's elements from `offset` on."""
    for slot in bucket.layout.slots:
        start, stop = max(slot.start, part.start), min(slot.stop, part.stop)
        if start < stop:
            into[start - offset : stop - offset] = read(slot.weight, kind, start - slot.start, stop - slot.start)
