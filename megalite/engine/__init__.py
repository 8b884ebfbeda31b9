"""Engines: they own the weights, the gradients and the optimizer; the loop only feeds them losses.

`native` (ZeRO 0 to 2, every layout) and `deepspeed` (ZeRO 1 to 3, offload) stand behind one small
protocol, pass the same tests, and read each other's checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

from torch import Tensor

from megalite.comm.mesh import Mesh
from megalite.config import Config
from megalite.engine.gather import HostBuffers
from megalite.models.weights import Weight
from megalite.parallel.stage import Stage
from megalite.plan import Plan

ReadState = Callable[[Weight, str, int, int], Tensor]
"""(weight, kind, start, stop) → elements [start, stop) of the flattened local tensor. `kind` is
"weight", "master" or one of the optimizer's states."""

UpdateGate = Callable[[Tensor], Tensor]
"""Gradient norm, fp32 [] → whether the weights may be updated, bool [] on the device. Called once a
step."""


class Sharing(NamedTuple):
    """The axes of the mesh over which ranks hold the same bits."""

    replicas: bool
    holders: bool
    """Ranks that hold parts of other weights, which are cut, hold all of this one: tensor ranks,
    for dense weights."""
    ends: bool
    """Both ends of the pipeline hold the same bits."""
    of_experts: bool = False
    """Replicas and holders are those of experts."""


class Engine(Protocol):
    """Train weights. Call `load` once; for every global batch `begin`, `backward` for each
    micro-batch, `finish`, `step`."""

    loss_scale: float
    """Factor by which `backward` multiplies a loss."""

    @property
    def states(self) -> tuple[str, ...]:
        """Name what is kept of every weight beside itself: "master", an fp32 copy of a bf16 weight,
        and the optimizer's states."""

    @property
    def num_updates(self) -> int:
        """Return how often the weights were updated, which Adam's bias correction counts. Waits for
        the device."""

    def load(
        self, read: ReadState, num_updates: int = 0, begun: Mapping[str, int] | None = None
    ) -> None:
        """Fill weights and optimizer state, calling `read` only for the elements this rank is
        responsible for. `num_updates` is how often the weights have been updated already; `begun`
        how often before the states of some began, by the first Hugging Face name: theirs are
        corrected for the updates since. All ranks call it."""

    def begin(self, num_micro_batches: int) -> None:
        """Announce the number of micro-batches: how many times each weight's gradient will
        arrive."""

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of a micro-batch. Scale `loss` so that its sum over all
        micro-batches and replicas is the loss to minimise."""

    def finish(self) -> None:
        """Wait until the gradients are summed over the replicas."""

    def step(self, lr: float, update_gate: UpdateGate | None = None) -> Tensor:
        """Clip the gradients, update the weights with learning rate `lr`, and forget the gradients.
        Where `update_gate` says no, weights and optimizer state stay as they are. Returns the
        global gradient norm before clipping, fp32 []."""

    def wait_for_params(self) -> None:
        """Wait for the communication that a step left under way."""

    def averaged(self) -> AbstractContextManager[None]:
        """Put the weights' average (`optimizer.ema`) in their place for the time of a `with` block.
        All ranks call it."""

    def copies(self) -> Iterator[tuple[Sharing, Tensor]]:
        """Yield what this rank holds of weights and optimizer state, each with who must hold the
        same bits; in the same order on all of them."""

    def gather(
        self, kind: str, owners: Mapping[str, int], buffers: HostBuffers | None = None
    ) -> dict[str, Tensor]:
        """Return the logical tensors this rank owns, on the host. `kind` is "weight", "grad" (after
        `finish`) or one of `states`; `owners` gives a global rank for every weight. All ranks call
        it. With `buffers`, the copies are there only when the device has come to them, and may be
        in memory that is used again."""

    def gather_later(
        self, kinds: Sequence[str], owners: Mapping[str, int], buffers: HostBuffers
    ) -> Callable[[], dict[str, dict[str, Tensor]]]:
        """Return a function that does `gather` for several `kinds`, with the values of now. It is
        to be called once, from another thread; until it is done, no `step` and no `load` changes
        these values. `owners` and `buffers` are as in `gather`. All ranks call it."""


def make_engine(
    stages: Sequence[Stage], weights: Sequence[Weight], plan: Plan, mesh: Mesh, config: Config
) -> Engine:
    """Return the engine that `plan` asks for, on this rank of `mesh`.

    It gives the models of `stages`, this rank's parts on the meta device, their weights, and may
    replace a stage's `forward`; `weights` are the rows of exactly those. `config` gives optimizer,
    precision and offload."""
    if plan.engine == "deepspeed":
        from megalite.engine.deepspeed import DeepSpeedEngine

        (stage,) = stages
        return DeepSpeedEngine(stage, weights, plan, mesh, config)
    from megalite.engine.native import NativeEngine

    return NativeEngine([stage.model for stage in stages], weights, plan, mesh, config)
