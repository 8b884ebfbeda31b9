"""What one rank holds of a bucket: its weights, and where they are trained the gradients and the
optimizer's states."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from megalite.comm.collectives import Wait, start_all_gather
from megalite.comm.mesh import Mesh
from megalite.config import EMA, OptimizerConfig
from megalite.engine import ReadState
from megalite.engine.codes import Codes
from megalite.engine.layout import Bucket, Slot
from megalite.engine.optimizers import Shard
from megalite.engine.optimizers.states import AT_ONCE, StoredState, make_state


class BucketWeights:
    """Hold the weights of one bucket on one rank. A frozen bucket has nothing else."""

    def __init__(self, layout: Bucket, mesh: Mesh, dtype: torch.dtype):
        self.layout = layout
        # Who else has these weights. The shard [low, high) is the same range on every tensor rank
        # of a replica, but of other elements where the weights are cut: a bucket holds local
        # tensors.
        self.fold = mesh.experts if layout.of_experts else mesh.dense
        replicas = self.fold.replicas
        self.low, self.high = layout.shard(replicas.rank, replicas.size)
        # All of a bucket are of one kind: their dtype is that of the first.
        dtype = layout.slots[0].weight.dtype_in(dtype)
        # Of weights that are gathered as codes, a rank has its own shard, and the codes of all.
        self.codes = Codes(layout, self.fold, mesh.device) if layout.in_codes else None
        self.first = self.low if self.codes else 0
        """Number of the first element of `weights` in the bucket."""
        size = self.high - self.low if self.codes else layout.size
        self.weights = torch.zeros(size, dtype=dtype, device=mesh.device)

    def held(self, start: int, stop: int) -> Tensor:
        """Return the elements [start, stop) of the bucket's weights."""
        return self.weights[start - self.first : stop - self.first]

    def parameter(self, slot: Slot, shape: torch.Size) -> nn.Parameter:
        """Return the weight of a slot as modules hold it."""
        if self.codes:
            return self.codes.parameter(slot, self.weights.dtype)
        # A view and no copy: an all-gather into the flat buffer is what updates the model.
        view = self.held(slot.start, slot.stop).view(shape)
        return nn.Parameter(view, requires_grad=not slot.weight.frozen)

    def start_gather(self) -> Wait:
        """Start to gather the weights of all replicas."""
        if self.codes:
            return self.codes.start_gather(self.weights)
        return start_all_gather(self.weights, self.fold.replicas)


class BucketState(BucketWeights):
    """Hold the tensors of one bucket on one rank: weights, gradients, optimizer state."""

    def __init__(
        self,
        layout: Bucket,
        mesh: Mesh,
        dtype: torch.dtype,
        zero_stage: int,
        states: Sequence[str],
        optimizer: OptimizerConfig,
    ):
        super().__init__(layout, mesh, dtype)
        self.zero_stage = zero_stage
        # The part that the optimizer updates: this rank's shard, or at stage 0 everything.
        self.stepped = slice(self.low, self.high) if zero_stage else slice(0, layout.size)
        master = self.own
        # For fp32 weights, .float() copies nothing: they are their own master weights.
        self.master = master.float()
        self.states: dict[str, Tensor] = {}
        # Those that are not held in fp32.
        self.stored: dict[str, StoredState] = {}
        self.runs: list[tuple[slice, int]] = []
        self.note_begun({})
        for name in states:
            if optimizer.keeps_fp32(layout.slots[0].weight):
                self.states[name] = torch.zeros_like(self.master)
            else:
                self.stored[name] = make_state(
                    optimizer, name, self.master.numel(), self.master.device
                )
        # Of the weights, fp32.
        self.average = torch.zeros_like(self.master) if optimizer.ema else None
        self.grads: Tensor | None = (
            None  # [size] fp32; at stage 2 only while a micro-batch is under way
        )
        self.grad_shard: Tensor | None = None  # stage 2: [shard] fp32, summed over micro-batches
        # Events that make up one micro-batch: for each weight its post-accumulate hook, and for
        # each linear layer its last weight-gradient GEMM (`_adopt` adds these). `events` counts
        # since the step began.
        self.num_events, self.events = len(layout.slots), 0
        self.filled: set[int] = set()  # starts of the slots that hold a gradient in `grads`
        # Whether an update leaves weights to be gathered from other replicas.
        self.is_gathered = zero_stage > 0 and self.fold.replicas.size > 1
        self.gathered: Wait | None = (
            None  # set while the new weights travel from the other replicas
        )

    @property
    def own(self) -> Tensor:
        """Return the weights of the part that the optimizer updates."""
        return self.held(self.stepped.start, self.stepped.stop)

    def await_weights(self) -> None:
        """Wait until the new weights of all replicas are here."""
        if self.gathered is not None:
            self.gathered()
            self.gathered = None

    def whole_grads(self) -> Tensor:
        """Return the buffer that a micro-batch's gradients are put into: [size] fp32."""
        if self.grads is None:
            # Zeroed once, for the padding between weights: slots are overwritten, not added to, by
            # their first gradient.
            self.grads = torch.zeros(self.layout.size, device=self.weights.device)
        return self.grads

    def has(self, kind: str) -> bool:
        """Return whether `state` has something of this kind: its optimizer keeps such a state, if
        it is one."""
        of_optimizer = kind in self.states or kind in self.stored
        return kind in ("weight", "grad", "master", EMA) or of_optimizer

    def state(self, kind: str) -> Tensor:
        """Return this rank's shard of the weights, an optimizer state or the reduced gradients:
        [shard]."""
        if kind == "weight":
            # Weights are whole on every rank at stages 0 to 2; masters and states only as wide as
            # `stepped`. At stage 0 a shard is cut out of both, so that replicas share the writing
            # of a checkpoint.
            return self.held(self.low, self.high)
        whole = self.gradient() if kind == "grad" else self.stepped_state(kind)
        return whole if self.zero_stage else whole[self.low : self.high]

    def stepped_state(self, kind: str) -> Tensor:
        """Return the master weights or an optimizer state, for the part that the optimizer updates:
        fp32, and a copy where the state is held in fewer bits."""
        if kind == EMA:
            assert self.average is not None
            return self.average
        if kind in self.stored:
            return self.stored[kind].read(slice(0, self.master.numel()))
        return self.master if kind == "master" else self.states[kind]

    def load(self, kind: str, read: ReadState) -> None:
        """Read the master weights or an optimizer state."""
        into = self.stepped_state(kind)
        fill(self, into, self.stepped.start, self.stepped, read, kind)
        if kind in self.stored:
            self.stored[kind].write(slice(0, len(into)), into)

    def update(self, lr: float, update: Callable[[Shard], None], part: slice) -> None:
        """Have `update` do a step whose schedule says `lr`, of a `part` of what is stepped: of a
        piece at a time where states have to be widened for it."""
        whole = self.shard(lr)

        def piece(of: slice, states: dict[str, Tensor]) -> Shard:
            weights = None if whole.weights is None else whole.weights[of]
            master, grad = whole.master[of], whole.grad[of]
            return replace(whole, master=master, weights=weights, grad=grad, states=states)

        if not self.stored:
            states = {name: state[part] for name, state in self.states.items()}
            update(piece(part, states))
            return
        for start in range(part.start, part.stop, AT_ONCE):
            some = slice(start, min(start + AT_ONCE, part.stop))
            states = {name: state.read(some) for name, state in self.stored.items()}
            update(piece(some, states))
            for name, state in self.stored.items():
                state.write(some, states[name])

    def note_begun(self, begun: Mapping[str, int]) -> None:
        """Set `runs`: the parts of what is stepped whose states began after the same number of
        updates, as `Engine.load` is told, each with that number."""
        # Where a part begins in the bucket, and its number. Padding goes with the weight before it.
        starts: list[int] = []
        numbers: list[int] = []
        for slot in self.layout.slots:
            number = begun.get(slot.weight.hf[0], 0)
            if not numbers or numbers[-1] != number:
                starts.append(slot.start if starts else 0)
                numbers.append(number)
        stops = [*starts[1:], self.layout.size]
        self.runs = []
        first, last = self.stepped.start, self.stepped.stop
        for start, stop, number in zip(starts, stops, numbers, strict=True):
            low, high = max(start, first), min(stop, last)
            if low < high:
                self.runs.append((slice(low - first, high - first), number))

    def shard(self, lr: float) -> Shard:
        """Return what the optimizer updates, in a step whose schedule says `lr`."""
        treatment = self.layout.treatment
        # fp32 weights share the memory of their master weights.
        weights = None if self.weights.dtype == torch.float32 else self.own
        return Shard(
            self.master,
            weights,
            self.gradient(),
            self.states,
            lr * treatment.lr,
            treatment.weight_decay,
        )

    def put_average(self) -> Tensor:
        """Put the weights' average in their place, in the part that the optimizer updates; return
        what was there."""
        assert self.average is not None
        part = self.own
        before = part.clone()
        part.copy_(self.average)
        return before

    def gradient(self) -> Tensor:
        """Return the reduced gradient of the part that the optimizer updates."""
        if self.zero_stage == 2:
            assert self.grad_shard is not None
            return self.grad_shard
        assert self.grads is not None
        return self.grads[self.stepped]


def await_weights_of(buckets: Sequence[BucketState]) -> Callable[[nn.Module, Any], None]:
    """Return a forward pre-hook that waits for the weights in `buckets`."""

    def hook(module: nn.Module, arguments: Any) -> None:
        for bucket in buckets:
            bucket.await_weights()

    return hook


def fill(
    bucket: BucketWeights, into: Tensor, offset: int, part: slice, read: ReadState, kind: str
) -> None:
    """Read `kind` for the elements `part` of a bucket. `into` holds the bucket's elements from
    `offset` on."""
    # `read` counts from the start of a weight, a slot from the start of its bucket, and `into` from
    # `offset`: only the elements that lie in both, the slot and `part`, are read.
    for slot in bucket.layout.slots:
        start, stop = max(slot.start, part.start), min(slot.stop, part.stop)
        if start < stop:
            into[start - offset : stop - offset] = read(
                slot.weight, kind, start - slot.start, stop - slot.start
            )
