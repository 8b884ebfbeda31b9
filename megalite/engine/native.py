"""Data parallelism and ZeRO stages 0 to 2 (Rajbhandari et al. 2020), in the manner of Megatron's
distributed optimizer.

The weights lie in a few flat buckets, filled in the order in which the backward pass finishes them.
Each replica answers for one equal shard of every bucket. A step:

    backward       each gradient is added to its place in an fp32 bucket as it arrives; when the last micro-batch
                   has filled a bucket, its reduction starts and runs beside the rest of the
                   backward
    norm           from the shards, one number over all ranks
    update         of this rank's shard, by the optimizer: clipping, fp32 master weights, its states, rounded weights
    all-gather     every rank gets all of the new weights, of a bucket while the next is updated; a module's forward
                   waits for its own weights only, so that the rest travels beside the next forward

                   gradients kept      reduced by        optimizer state
    stage 0        whole, fp32         all-reduce        whole on every rank, no all-gather
    stage 1        whole, fp32         reduce-scatter    shard
    stage 2        shard, fp32         reduce-scatter    shard; the reduction runs for every micro-batch, and whole
                                                         buckets exist only while they are filled
                                                         and reduced
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.profiler import record_function

from megalite.comm.mesh import Mesh
from megalite.config import BY_COUNTS, EMA, Config, Member, OptimizerConfig
from megalite.engine import ReadState, Sharing, UpdateGate
from megalite.engine.buckets import BucketState, BucketWeights, fill
from megalite.engine.gather import Gather, GatherAside, GatherOnHost, HostBuffers
from megalite.engine.gradients import Gradients
from megalite.engine.layout import Bucket, Slot, bucket_elements, make_buckets
from megalite.engine.matrices import STEP, Matrices
from megalite.engine.optimizers import MatrixOptimizer, SummingOptimizer
from megalite.engine.optimizers.by_counts import ByCounts
from megalite.engine.qk_clip import QKClip
from megalite.engine.quantised import QuantisedBucket
from megalite.engine.sums import Sums
from megalite.models.layers import Decoder
from megalite.models.weights import Weight
from megalite.plan import Plan
from megalite.runtime.activity import NOW


class NativeEngine:
    """Give models on the meta device, parallelised or not, their weights, and train them. See
    `Engine`."""

    loss_scale = 1.0

    def __init__(
        self,
        models: Sequence[Decoder],
        weights: Sequence[Weight],
        plan: Plan,
        mesh: Mesh,
        config: Config,
    ):
        self.mesh, self.config, self.zero_stage = mesh, config.optimizer, plan.zero_stage
        # Counted on the device: whether a step updates anything is decided there.
        self._num_updates = torch.zeros((), dtype=torch.float64, device=mesh.device)
        self._begun: Mapping[str, int] = {}
        self.dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
        optimizer = config.optimizer
        # In the order of the backward pass, which is that of the reductions. Every rank of a stage
        # gets the same list, as it follows from the table and the plan alone.
        layout = make_buckets(weights, plan, optimizer, bucket_elements(config, plan))
        members = dict(optimizer.members())
        if config.model.bias_rate is not None:
            # Biases that balance a router's load go through the same buckets: their "gradient" is a
            # count of tokens, which a reduction sums as any other.
            members[BY_COUNTS] = Member(partial(ByCounts, config.model.bias_rate), (), 1.0, 0.0)
        self.buckets: list[BucketState] = []
        self.frozen: list[BucketWeights] = []
        self.quantised: list[QuantisedBucket] = []
        for b in layout:
            if b.quantised:
                self.quantised.append(QuantisedBucket(b, mesh))
            elif b.frozen:
                self.frozen.append(BucketWeights(b, mesh, self.dtype))
            else:
                states = _sharded_states(b, optimizer)
                bucket = BucketState(b, mesh, self.dtype, plan.zero_stage, states, optimizer)
                self.buckets.append(bucket)
        in_few_bits = {name: w for b in self.quantised for name, w in b.weights.items()}
        self.gradients = Gradients(
            models, self.buckets, self.frozen, in_few_bits, mesh, plan.zero_stage
        )
        # The next forward pass needs first what the backward pass finished last.
        number_of = _number_in(weights)

        def first_needed(bucket: BucketState) -> int:
            return min(number_of(slot) for slot in bucket.layout.slots)

        self._forward_order = sorted(self.buckets, key=first_needed)
        self.optimizers = {name: member.build() for name, member in members.items()}
        self._matrices: dict[str, Matrices] = {}
        self._sums: dict[str, Sums] = {}
        self._make_helpers()
        clip = optimizer.qk_clip
        self._qk_clip = QKClip(clip, models, self.buckets, mesh) if clip else None
        self._unchanging = threading.Event()  # set when no copy of the state is pending
        self._unchanging.set()
        self._aside: GatherAside | None = None

    def _make_helpers(self) -> None:
        """Make what an optimizer needs that must see more of a matrix than its elements one by one:
        whole matrices at an owner, or sums over rows and columns."""
        for name, each in self.optimizers.items():
            its_buckets = [b for b in self._forward_order if b.layout.treatment.optimizer == name]
            if isinstance(each, MatrixOptimizer):
                self._matrices[name] = Matrices(each, its_buckets, self.mesh)
            elif isinstance(each, SummingOptimizer):
                self._sums[name] = Sums(each, self.config, its_buckets, self.mesh)

    @property
    def states(self) -> tuple[str, ...]:
        return (*([] if self.dtype == torch.float32 else ["master"]), *self.config.all_states)

    @property
    def num_updates(self) -> int:
        return int(self._num_updates)

    # --- a step -----------------------------------------------------------------------------------

    def begin(self, num_micro_batches: int) -> None:
        self.gradients.begin(num_micro_batches)
        if self._qk_clip:
            self._qk_clip.begin()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def finish(self) -> None:
        self.gradients.finish()

    def step(self, lr: float, update_gate: UpdateGate | None = None) -> Tensor:
        # Over the world, pipeline stages included: every rank clips by the same factor.
        norm = self.gradients.norm()
        # The optimizer divides by it as it reads the gradients; nothing waits for the device.
        divisor = (
            (norm / self.config.clip).clamp(min=1.0) if self.config.clip else torch.ones_like(norm)
        )
        if update_gate is None:
            self._num_updates += 1
        else:
            permitted = update_gate(norm)
            self._num_updates += permitted
            # To the optimizer's update, a divisor of 0 means: change nothing.
            divisor = torch.where(permitted, divisor, 0.0)
        # Before the first update, where there is nothing to correct yet, a refused step must not
        # divide by 0.
        num_updates = self._num_updates.clamp(min=1)
        common = self._common(divisor)
        if self._qk_clip:
            self._qk_clip.find_scales(divisor > 0)
        # Weights of the last step may still be arriving (modules that a forward pass never called
        # did not wait for theirs), and a checkpoint's thread may still be copying what is about to
        # change.
        self.wait_for_params()
        self.await_copies()
        self._update(common, lr)
        if self.config.ema:
            # The average forgets its first, random values fast: the decay warms up (as in
            # TensorFlow's ExponentialMovingAverage with num_updates).
            decay = torch.clamp((1 + num_updates) / (10 + num_updates), max=self.config.ema)
            share = torch.where(divisor > 0, 1 - decay, 0.0).float()  # nothing of a refused step
            for bucket in self.buckets:
                bucket.stepped_state(EMA).lerp_(bucket.master, share)
        self.gradients.forget()
        return norm

    def _common(self, divisor: Tensor) -> dict[tuple[str, int], Tensor]:
        """Return what each optimizer computes once for the step: for the states that began with the
        run, and for those that began after so many updates."""
        # A mean that begins at zero is too small until it has seen many gradients. What corrects
        # that must count the updates since, not those of an optimizer before.
        return {
            (name, begun): each.begin_step(divisor, (self._num_updates - begun).clamp(min=1))
            for name, each in self.optimizers.items()
            for begun in {0, *self._begun.values()}
        }

    def _newest(self, buckets: Sequence[BucketState]) -> int:
        """Return after how many updates the last of some buckets' states began."""
        return max((begun for b in buckets for _, begun in b.runs), default=0)

    def _update(self, common: Mapping[tuple[str, int], Tensor], lr: float) -> None:
        """Update every bucket's shard, and start to gather the new weights; `common` is what
        `_common` returned."""
        # Whole matrices travel to their owners while the other buckets are updated.
        solving = {name: each.start(common[name, 0], lr) for name, each in self._matrices.items()}
        for name, sums in self._sums.items():
            sums.update(common[name, self._newest(sums.buckets)], lr)
        for bucket in self._forward_order:
            name = bucket.layout.treatment.optimizer
            optimizer = self.optimizers[name]
            if isinstance(optimizer, MatrixOptimizer):
                continue
            if not isinstance(optimizer, SummingOptimizer):
                with record_function(STEP):
                    for part, begun in bucket.runs:
                        bucket.update(
                            lr, partial(optimizer.update_, common=common[name, begun]), part
                        )
            self._clip_and_send(bucket)
        # In one order on all ranks, since solving exchanges messages; by now those to the owners
        # are here.
        for solve in solving.values():
            for bucket in solve():
                self._clip_and_send(bucket)

    def _clip_and_send(self, bucket: BucketState) -> None:
        # QK-clip comes behind the optimizer and before the gather, so that all replicas get the
        # clipped weights, though only the shard's owner clips.
        if self._qk_clip:
            self._qk_clip.scale_(bucket)
        self._send(bucket)

    def _send(self, bucket: BucketState) -> None:
        """Start to gather a bucket's new weights from all replicas."""
        if bucket.is_gathered:
            bucket.gathered = bucket.start_gather()

    def wait_for_params(self) -> None:
        """Wait until all of the new weights are here."""
        for bucket in self._forward_order:
            bucket.await_weights()

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        self.wait_for_params()
        self.await_copies()
        # In bf16 this keeps a copy of the rounded weights, in fp32 of the masters themselves, which
        # share their memory: either way `finally` puts back the very same bits.
        before = [bucket.put_average() for bucket in self._forward_order]
        # Only the stepped part was overwritten; the forward pass needs the average of all shards.
        self._gather_all()
        try:
            yield
        finally:
            for bucket, weights in zip(self._forward_order, before, strict=True):
                bucket.own.copy_(weights)
            self._gather_all()

    def _gather_all(self) -> None:
        for bucket in self._forward_order:
            self._send(bucket)
        self.wait_for_params()

    # --- state, in logical terms ------------------------------------------------------------------

    def load(
        self, read: ReadState, num_updates: int = 0, begun: Mapping[str, int] | None = None
    ) -> None:
        self.await_copies()
        self._num_updates.fill_(num_updates)
        self._begun = begun or {}
        for bucket in self.buckets:
            bucket.note_begun(self._begun)
            # In fp32 the weights are the master weights, and begin as them.
            kind = "master" if bucket.weights.dtype == torch.float32 else "weight"
            shard = slice(bucket.low, bucket.high)
            fill(bucket, bucket.weights, bucket.first, shard, read, kind)
            for state in filter(bucket.has, self.states):
                bucket.load(state, read)
        for sums in self._sums.values():
            sums.load(read)
        for held in self.frozen:
            fill(held, held.weights, 0, slice(held.low, held.high), read, "weight")
        for bits in self.quantised:
            bits.load(read)
        # Each replica has read its shard alone, so that the weights are read once in all, and not
        # once by each replica.
        for wait in [bucket.start_gather() for bucket in [*self.buckets, *self.frozen]]:
            wait()

    def copies(self) -> Iterator[tuple[Sharing, Tensor]]:
        self.wait_for_params()
        for bucket in self.buckets:
            sharing = Sharing(
                True, not bucket.layout.cut, bucket.layout.tied, bucket.layout.of_experts
            )
            if bucket.codes:
                # What all replicas have; who else has this shard, among holders, has it as it is.
                yield sharing, bucket.codes.codes
                yield sharing, bucket.codes.scales
                yield sharing._replace(replicas=False), bucket.weights
            else:
                yield sharing, bucket.weights
            # From stage 1 on each replica has the states of a shard of its own: nobody to
            # compare with.
            for state in filter(bucket.has, self.states):
                yield sharing._replace(replicas=self.zero_stage == 0), bucket.stepped_state(state)
        for sums in self._sums.values():
            for kept in sums.states.values():
                yield Sharing(True, True, False), kept
        for held in self.frozen:
            yield (
                Sharing(True, not held.layout.cut, held.layout.tied, held.layout.of_experts),
                held.weights,
            )
        for bits in self.quantised:
            for weight in bits.weights.values():
                for tensor in weight.tensors():
                    yield Sharing(True, not bits.layout.cut, False), tensor

    def gather(
        self, kind: str, owners: Mapping[str, int], buffers: HostBuffers | None = None
    ) -> dict[str, Tensor]:
        """Gather the logical tensors this rank owns. Shards travel over the replicas to the owner
        of their bucket, then local tensors over the holders to the owner of the weight: the groups
        that training uses anyway, and memory for one bucket. `kind`, `owners` and `buffers` are as
        in `Engine.gather`."""
        self.wait_for_params()
        return self._assemble(
            self._shards(kind), owners, GatherOnHost(self.mesh.device, buffers)
        ) | self._whole(kind, owners, buffers)

    def _whole(
        self, kind: str, owners: Mapping[str, int], buffers: HostBuffers | None
    ) -> dict[str, Tensor]:
        """Return a state that every rank has the whole of, for the weights that this rank owns, on
        the host."""
        states = [sums.logical(kind) for sums in self._sums.values() if kind in sums.states]
        copy = buffers.copy if buffers else Tensor.cpu
        rank = self.mesh.world.rank
        return {
            name: copy(x) for state in states for name, x in state.items() if owners[name] == rank
        }

    def _shards(self, kind: str) -> Iterator[tuple[BucketState, Tensor]]:
        """Yield this rank's shard of every bucket that has something of this kind."""
        for bucket in self.buckets:
            if bucket.has(kind):
                yield bucket, bucket.state(kind)

    def _assemble(
        self, shards: Iterable[tuple[BucketState, Tensor]], owners: Mapping[str, int], way: Gather
    ) -> dict[str, Tensor]:
        """Gather the tensors this rank owns from every rank's shard of some buckets."""
        owned: dict[str, Tensor] = {}
        for bucket, shard in shards:
            slots = bucket.layout.slots
            pipeline_rank, replica, _ = self.mesh.place_of(
                owners[slots[0].weight.name], bucket.fold
            )
            # All slots of a bucket have their owners on one replica (see `choose_owners`), so the
            # first slot tells where the whole bucket must go.
            # The copy of a tied weight at the other end.
            if pipeline_rank != self.mesh.pipeline.rank:
                continue
            # 1. over the replicas: shards, in the order of ranks, are the bucket. A collective, so
            # every replica calls it, and all but the owner's go on with the next bucket.
            flat = way.parts(shard, bucket.fold.replicas, replica, bucket.layout.cut)
            if replica != bucket.fold.replicas.rank:
                continue
            assert flat is not None
            # 2. over the holders of the owner's replica: the parts of a cut weight are put
            # together.
            for slot in slots:
                holder = self.mesh.place_of(owners[slot.weight.name], bucket.fold)[2]
                whole = way.assemble(holder, slot.weight, flat[slot.start : slot.stop], bucket.fold)
                if whole is not None:
                    owned[slot.weight.name] = whole
            del flat  # before the next bucket is gathered
        return owned

    def gather_later(
        self, kinds: Sequence[str], owners: Mapping[str, int], buffers: HostBuffers
    ) -> Callable[[], dict[str, dict[str, Tensor]]]:
        # A device keeps the order of its stream, and NCCL is fast.
        if self.mesh.device.type != "cpu":
            gathered = {kind: self.gather(kind, owners, buffers) for kind in kinds}
            return lambda: gathered
        self.wait_for_params()
        if self._aside is None:
            self._aside = GatherAside(self.mesh)
        way = self._aside
        self._unchanging.clear()

        def copy() -> dict[str, dict[str, Tensor]]:
            # Runs in the thread that writes the checkpoint. The event is set as soon as this rank's
            # shards are copied, which is quick; gathering the copies may then take as long as the
            # next steps do.
            assert not self._unchanging.is_set(), "the state of that moment is gone"
            try:
                shards = {
                    kind: [(b, buffers.copy(shard)) for b, shard in self._shards(kind)]
                    for kind in kinds
                }
                whole = {kind: self._whole(kind, owners, buffers) for kind in kinds}
            finally:
                self._unchanging.set()
            return {kind: self._assemble(shards[kind], owners, way) | whole[kind] for kind in kinds}

        return copy

    def await_copies(self) -> None:
        """Wait until a checkpoint's copy is made, which happens beside the next forward and
        backward pass: until then, nothing that it takes may change."""
        if not self._unchanging.is_set():
            NOW.do("waiting for the checkpoint's copy")
            self._unchanging.wait()


def _number_in(weights: Sequence[Weight]) -> Callable[[Slot], int]:
    """Return a function that gives a slot's place in the table of `weights`."""
    number = {weight.name: place for place, weight in enumerate(weights)}
    return lambda slot: number[slot.weight.name]


def _sharded_states(bucket: Bucket, optimizer: OptimizerConfig) -> list[str]:
    """Return the names of the states in a bucket that are sharded as its weights are."""
    weight = bucket.slots[0].weight
    if weight.by_counts:
        return []
    states = optimizer.members()[bucket.treatment.optimizer].states
    return [state for state in states if optimizer.state_row(weight, state) is weight]
