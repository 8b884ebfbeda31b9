"""Pipeline parallelism (Narayanan et al. 2021; zero bubble: Qi et al. 2023). torch decides the
order of passes; here are the stages it runs, and the plain forward pass for validation and
generation.

torch's schedules cut tensors into micro-batches. Ours are ready-made, on every rank, so what
travels through the schedule beside the hidden states is only their number."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.autograd import Function
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
)
from torch.profiler import record_function

from megalite.comm.mesh import Mesh
from megalite.engine import Engine
from megalite.kernels.linear import WeightGradStore
from megalite.models.layers import Streams
from megalite.parallel.stage import MESSAGES_UNDER_WAY, Inputs, Stage
from megalite.plan import Plan
from megalite.runtime.activity import NOW

LossOf = Callable[[Tensor, Inputs], Tensor]
"""Maps the losses [B,T] of a micro-batch to the scalar to minimise."""
SCHEDULES: dict[str, Any] = {
    "interleaved": ScheduleInterleaved1F1B,
    "zero_bubble": ScheduleInterleavedZeroBubble,
}


class Pipeline:
    """Run this rank's stages of the model, and exchange hidden states and gradients with other
    ranks' stages."""

    def __init__(
        self,
        stages: Sequence[Stage],
        plan: Plan,
        mesh: Mesh,
        hidden: Tensor,
        deferred: Sequence[WeightGradStore | None],
        source: int = 0,
    ):
        """Build the schedule of `plan`.

        `hidden` is a meta tensor shaped like the hidden states of a training micro-batch;
        `deferred` has the weight-gradient store of each of `stages`, or None. `source` is the
        length of what an encoder reads beside them, if there is one."""
        self.stages, self.mesh, self.hidden = stages, mesh, hidden
        self._architecture = stages[0].model.config.architecture
        # Under sequence parallelism stages hand over [B, T/n, D], each tensor rank its own slice.
        self._sequence_cut = plan.tensor if plan.sequence else 1
        self._batch: Sequence[Inputs] = ()
        self._loss_of: LossOf | None = None
        self._plan, self._deferred = plan, deferred
        self._streams = self._streams_of(
            hidden.shape[0], hidden.shape[1] * self._sequence_cut, source
        )
        self._make_schedule(plan.micro_batches)

    def _make_schedule(self, micro_batches: int) -> None:
        """Build torch's schedule, which is of one number of micro-batches a step."""
        plan = self._plan
        parts = [
            self._part(stage, plan, later)
            for stage, later in zip(self.stages, self._deferred, strict=True)
        ]
        self._parts, self._micro_batches = parts, micro_batches
        arguments: dict[str, Any] = {
            "n_microbatches": micro_batches,
            # The last stage's module returns the loss itself, so torch's loss function only passes
            # it on.
            "loss_fn": lambda loss, number: loss,
            # torch would divide gradients by the micro-batches; our losses are weighted for the sum
            # already.
            "scale_grads": False,
        }
        if plan.schedule == "1f1b":
            self._schedule = Schedule1F1B(parts[0], **arguments)
        else:
            self._schedule = SCHEDULES[plan.schedule](parts, **arguments)

    def _part(self, stage: Stage, plan: Plan, later: WeightGradStore | None) -> _Part:
        """Wrap a stage as torch's schedule wants it; `later` is its weight-gradient store, if it
        defers any."""
        # The first stage's input is a micro-batch's number, of whose chunks torch makes one element
        # each.
        number, loss = torch.zeros(1, dtype=torch.int64), torch.zeros((), device="meta")
        # Example inputs and outputs save torch from running every stage once to learn their shapes.
        hidden = tuple(self.hidden.new_empty(shape).requires_grad_() for shape in self._streams)
        part = _Part(
            _Numbered(stage, self),
            stage.span.index,
            len(plan.stages),
            self.mesh.device,
            input_args=number if stage.span.first else hidden,
            output_args=loss if stage.span.last else hidden,
            group=self.mesh.pipeline.group,
            # Zero bubble: torch calls it when it is time for a stage's weight gradients.
            dw_builder=later.take if later else None,
        )
        part.hidden, part.arrives, part.sends_itself = self.hidden, hidden, plan.schedule != "1f1b"
        return part

    def _streams_of(self, rows: int, length: int, source: int) -> list[tuple[int, ...]]:
        """Return the shapes of what goes from stage to stage, `Streams`, for sequences of `length`
        tokens on this rank, beside `source` of an encoder if there are any."""
        tables = [
            (count, of_all // self.mesh.tensor.size)
            for count, of_all in self._architecture.shared_tables
        ]
        lengths = [length] * self._architecture.num_streams
        lengths[0] = source or length
        return [
            *tables,
            *((rows, each // self._sequence_cut, self.hidden.shape[-1]) for each in lengths),
        ]

    def _shapes_of(self, inputs: Inputs) -> list[tuple[int, ...]]:
        """Return the shapes of what goes from stage to stage for these inputs."""
        (rows, length), source = inputs.tokens_BT.shape, inputs.places.source
        return self._streams_of(rows, length, 0 if source is None else source.tokens_BS.shape[1])

    def forward_backward(self, batch: Sequence[Inputs], loss_of: LossOf, engine: Engine) -> None:
        """Run the schedule over a step's micro-batches, and leave their gradients in `engine`. The
        last stage calls `loss_of` once for each micro-batch."""
        streams = self._shapes_of(batch[0])
        # The global batch or its sequences grow.
        if len(batch) != self._micro_batches or streams != self._streams:
            self._streams = streams
            self._make_schedule(len(batch))
        # Every rank has the whole batch: tokens, labels and documents need not travel between
        # stages.
        self._batch, self._loss_of = batch, loss_of
        numbers = torch.arange(len(batch))
        engine.begin(len(batch))
        first = (numbers,) if self.stages[0].span.first else ()
        self._schedule.step(*first, number=numbers, target=numbers, return_outputs=False)
        # Only now may the memory of what was sent last be used again.
        for part in self._parts:
            part.await_sent(0)
        # They hold what a frozen model has made of each micro-batch.
        self._batch, self._loss_of = (), None
        engine.finish()

    def _run(self, stage: Stage, streams: tuple[Tensor, ...], number: int) -> Streams:
        """Run one stage on micro-batch `number`; the last stage returns the loss to minimise."""
        out = stage(None if stage.span.first else _one_or_all(streams), self._batch[number])
        if not stage.span.last:
            # What goes through unchanged has a backward pass of its own: torch asks for that of
            # each output.
            return out if isinstance(out, Tensor) else tuple(x.view_as(x) for x in out)
        assert self._loss_of is not None
        loss = self._loss_of(out, self._batch[number])
        return loss if len(streams) < 2 else _WithGradients.apply(loss, *streams)

    @torch.no_grad()
    def forward(self, batch: Sequence[Inputs]) -> list[Tensor]:
        """Return the last stage's output for each micro-batch, and an empty list on other ranks.
        Each stage takes all micro-batches before the next one does.

        NCCL keeps the messages of a rank in one order, in which a send waits for its receive. Where
        ranks have several stages, their messages go round in a ring, and all ranks could wait for
        one another. So the ring is open at one place: the last rank sends to the first when it has
        received all of a stage's micro-batches, and the first rank receives all of them before it
        sends any on."""
        outputs: list[Tensor] = []
        sent: list[tuple[Tensor, dist.Work]] = []  # a message is kept until it has arrived
        ring = self.mesh.pipeline
        for stage in self.stages:
            held = []
            arriving: Iterable[Streams | None] = (
                None if stage.span.first else self._receive(stage, inputs) for inputs in batch
            )
            # The first rank's later stages receive from the last rank; a list takes all in at once.
            if ring.rank == 0:
                arriving = list(arriving)
            for number, (inputs, x) in enumerate(zip(batch, arriving, strict=True)):
                NOW.do(f"forward of stage {stage.span.index}", number)
                out = stage(x, inputs)
                if stage.span.last:
                    outputs.append(out)
                elif ring.rank == ring.size - 1:
                    # The last rank opens the ring: see the docstring.
                    held.append(out)
                else:
                    sent.extend(self._send(stage, out))
            for out in held:
                sent.extend(self._send(stage, out))
        _await_neighbours()
        for _, work in sent:
            work.wait()
        NOW.go_on()
        return outputs

    def _send(self, stage: Stage, out: Streams) -> Iterator[tuple[Tensor, dist.Work]]:
        """Start sending a stage's output to the next stage; yield each tensor with its work, as it
        must be kept until it has arrived."""
        # Stages go round the ranks: stage i is on rank i mod p (interleaved: Megatron's virtual
        # pipeline).
        to = (stage.span.index + 1) % self.mesh.pipeline.size
        for x in (out,) if isinstance(out, Tensor) else out:
            work = dist.isend(x, group=self.mesh.pipeline.group, group_dst=to)
            assert work is not None
            yield x, work

    def _receive(self, stage: Stage, inputs: Inputs) -> Streams:
        """Receive the hidden states of a micro-batch from the stage before."""
        shapes = self._shapes_of(inputs)  # generation's shapes differ from training's
        streams = tuple(
            torch.empty(shape, dtype=self.hidden.dtype, device=self.mesh.device) for shape in shapes
        )
        came_from = (stage.span.index - 1) % self.mesh.pipeline.size
        _await_neighbours()
        for x in streams:
            dist.recv(x, group=self.mesh.pipeline.group, group_src=came_from)
        return _one_or_all(streams)


class _WithGradients(Function):
    """The loss as it is; every stream that arrived has a gradient, of zeros if it has no part in
    the loss. torch before 2.13 raises an error where it has none to send back."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, *streams: Tensor) -> Tensor:
        ctx.save_for_backward(*streams)
        # No view, which torch would not detach from its graph: until the step's end it would hold
        # what arrived for every micro-batch.
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad, *(torch.zeros_like(x) for x in ctx.saved_tensors)


def _one_or_all(streams: tuple[Tensor, ...]) -> Streams:
    """Return hidden states as a model takes them: a tensor, or a tuple of several."""
    return streams if len(streams) > 1 else streams[0]


def _await_neighbours() -> None:
    """Note for the hang report that this rank waits for a pipeline message."""
    NOW.wait("message", "pipeline")


class _Numbered(nn.Module):
    """Run a stage as torch calls it: with what the stage before returned (the first stage: with the
    number) and the number of the micro-batch."""

    def __init__(self, stage: Stage, pipeline: Pipeline):
        super().__init__()
        self.stage = stage
        self._run = pipeline._run

    def forward(self, *streams: Tensor, number: Tensor) -> Streams:
        return self._run(self.stage, streams, int(number))


class _Part(PipelineStage):
    """Bound what torch's pipeline stage holds.

    torch allocates what it receives for every micro-batch of a step at once, and keeps it. Here a
    message has memory from when it is asked for until its backward pass is done, so that what a
    stage holds is bounded by the micro-batches its schedule has under way. And what is sent is let
    go when it has arrived, where torch's schedules of several stages hold it until the step
    ends."""

    hidden: Tensor
    arrives: Sequence[Tensor]
    """Meta tensors shaped like what goes from stage to stage."""
    sends_itself: bool
    """False under 1F1B, which joins each message with the one that comes back, and waits for
    both."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self._sent: deque[dist.Work] = deque()

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        return self._send(super().get_fwd_send_ops(fwd_chunk_id))

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        return self._send(super().get_bwd_send_ops(bwd_chunk_id))

    def _send(self, messages: list[dist.P2POp]) -> list[dist.P2POp]:
        """Send the messages here, and return those that are left for the schedule to send."""
        if not self.sends_itself:
            return messages
        for message in messages:
            work = dist.isend(
                message.tensor, group=message.group, group_dst=message.group_peer, tag=message.tag
            )
            assert work is not None
            self._sent.append(work)
        # Waits for older messages only, which their receivers have asked for by now.
        self.await_sent(MESSAGES_UNDER_WAY)
        return []

    def await_sent(self, but: int) -> None:
        """Wait until at most `but` messages are on their way. It is safe to wait: schedules are
        laid out so that every message is asked for before anything that is sent later."""
        while len(self._sent) > but:
            self._sent.popleft().wait()

    def _prepare_forward_infra(self, *arguments: Any, **options: Any) -> Any:
        result = super()._prepare_forward_infra(*arguments, **options)
        # torch has just allocated buffers for all micro-batches: free them until each is asked for.
        for number in self.args_recv_info:
            self._release(number)
        return result

    def _prepare_backward_infra(self, *arguments: Any, **options: Any) -> Any:
        result = super()._prepare_backward_infra(*arguments, **options)
        for number in self.grad_recv_info:
            self._release(number)
        return result

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        if not self.is_first:
            self._receive_into(self.args_recv_info[fwd_chunk_id], self.arrives)
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        if not self.is_last:
            self._receive_into(self.grad_recv_info[bwd_chunk_id], self.arrives)
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def _receive_into(self, messages: Sequence[Any], shapes: Sequence[Tensor]) -> None:
        """Give memory to what is asked for, of the shapes of these meta tensors."""
        for message, shape in zip(messages, shapes, strict=True):
            message.buffer = torch.empty_like(shape, device=self.device)

    # Named in a trace, so that a pipeline's passes and its bubbles can be seen.

    def forward_one_chunk(self, fwd_chunk_id: int, *arguments: Any, **options: Any) -> Any:
        with self._passing("forward", fwd_chunk_id):
            return super().forward_one_chunk(fwd_chunk_id, *arguments, **options)

    def backward_one_chunk(self, bwd_chunk_id: int, *arguments: Any, **options: Any) -> None:
        with self._passing("backward", bwd_chunk_id):
            super().backward_one_chunk(bwd_chunk_id, *arguments, **options)
        self._release(bwd_chunk_id)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, *arguments: Any, **options: Any) -> None:
        with self._passing("weights", bwd_chunk_id):
            super().backward_weight_one_chunk(bwd_chunk_id, *arguments, **options)

    @contextmanager
    def _passing(self, kind: str, number: int) -> Iterator[None]:
        """Name a pass in the trace and to the hang report."""
        NOW.do(f"{kind} of stage {self.stage_index}", number)
        with record_function(f"stage {self.stage_index} {kind} {number}"):
            yield
        _await_neighbours()  # between two passes a schedule only waits for messages

    def _release(self, number: int) -> None:
        """Free what was received for micro-batch `number`."""
        # torch expects a tensor here, but not its shape until the next receive.
        nothing = torch.empty(0, dtype=self.hidden.dtype, device=self.device)
        received = () if self.is_first else self.args_recv_info[number]
        answers = () if self.is_last else self.grad_recv_info.get(number, ())
        for message in (*received, *answers):
            message.buffer = nothing
