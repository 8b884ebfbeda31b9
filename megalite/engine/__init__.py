"""Engines own the weights, the gradients and the optimizer; the loop only feeds them losses.

`native` (ZeRO 0 to 2, every layout) and `deepspeed` (ZeRO 1 to 3, offload) stand behind one small protocol, pass the
same tests, and read each other's checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from megalite.comm.mesh import Mesh
from megalite.config import Config
from megalite.engine.gather import HostBuffers
from megalite.models.weights import Weight
from megalite.parallel.stage import Stage
from megalite.plan import Plan

ReadState = Callable[[Weight, str, int, int], Tensor]
"""(weight, kind, start, stop) → those elements of the flattened local tensor. `kind`: "weight", "master" or one of the
optimizer's states."""

Permit = Callable[[Tensor], Tensor]
"""Gradient norm, fp32 [] → whether the weights may be updated, bool [] on the device. Asked once a step."""


class Sharing(NamedTuple):
    """Over which axes of the mesh ranks hold the same bits."""

    replicas: bool
    tensor: bool
    ends: bool
    """Both ends of the pipeline."""


class Engine(Protocol):
    """Call `load` once; for every global batch `begin`, `backward` for each micro-batch, `finish`, `step`."""

    @property
    def states(self) -> tuple[str, ...]:
        """What is kept of every weight beside itself: "master", an fp32 copy of a bf16 weight, and the optimizer's
        states."""

    @property
    def num_updates(self) -> int:
        """How often the weights were updated, which Adam's bias correction counts. Waits for the device."""

    def load(self, read: ReadState, num_updates: int = 0) -> None:
        """Fill weights and optimizer state, asking `read` only for what this rank answers for. All ranks call it."""

    def begin(self, num_micro_batches: int) -> None:
        """Announce how many times each weight's gradient will arrive."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a micro-batch. Losses must be scaled so that their sum over all micro-batches and
        replicas is the loss to descend."""

    def finish(self) -> None:
        """Wait until the gradients are summed over the replicas."""

    def step(self, lr: float, permit: Permit | None = None) -> Tensor:
        """Clip, update the weights, forget the gradients. Where `permit` says no, weights and optimizer state stay as
        they are. Returns the global gradient norm before clipping, fp32 []."""

    def settle(self) -> None:
        """Wait for what a step has left on its way."""

    def copies(self) -> Iterator[tuple[Sharing, Tensor]]:
        """What this rank holds of weights and optimizer state, and who must hold the same; in one order on all of
        them."""

    def gather(self, kind: str, owners: Mapping[str, int], buffers: HostBuffers | None = None) -> dict[str, Tensor]:
        """The logical tensors this rank owns, on the host. `kind` is "weight", "grad" (after `finish`) or one of
        `states`; `owners` gives a global rank for every weight. All ranks call it. With `buffers`, the copies are
        there only when the device has come to them, and may be in memory that is used again."""

    def gather_later(
        self, kinds: Sequence[str], owners: Mapping[str, int], buffers: HostBuffers
    ) -> Callable[[], dict[str, dict[str, Tensor]]]:
        """`gather` of several kinds as they are now: what is returned is to be called once, from another thread, and
        until that is done no step and no `load` changes them. All ranks call it."""


def make_engine(stages: Sequence[Stage], weights: Sequence[Weight], plan: Plan, mesh: Mesh, config: Config) -> Engine:
    """The engine the plan asks for. It gives the models of `stages`, this rank's parts on the meta device, their
    weights, and may take over how a stage is called; `weights` are the rows of exactly those."""
    if plan.engine == "deepspeed":
        from megalite.engine.deepspeed import DeepSpeedEngine

        (stage,) = stages
        return DeepSpeedEngine(stage, weights, plan, mesh, config)
    from megalite.engine.native import NativeEngine

    return NativeEngine([stage.model for stage in stages], weights, plan, mesh, config)
