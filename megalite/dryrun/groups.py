"""Process groups of ranks that are not there: every collective and message succeeds at once and is
written down, in the order in which the program starts it, with what the program has waited for by
then."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_leaves

from megalite.comm.mesh import Mesh
from megalite.dryrun.device import Places

KINDS = {
    "allreduce": "all_reduce", "broadcast": "broadcast", "reduce": "reduce", "barrier": "barrier",
    "_allgather_base": "all_gather", "all_gather_single": "all_gather", "allgather": "all_gather",
    "_reduce_scatter_base": "reduce_scatter", "reduce_scatter_single": "reduce_scatter",
    "reduce_scatter": "reduce_scatter", "gather": "gather", "scatter": "scatter", "alltoall": "all_to_all",
    "alltoall_base": "all_to_all", "all_to_all_single": "all_to_all", "send": "send", "recv": "recv",
    "allreduce_coalesced": "all_reduce", "allgather_into_tensor_coalesced": "all_gather",
    "reduce_scatter_tensor_coalesced": "reduce_scatter", "all_gather_single_coalesced": "all_gather",
    "reduce_scatter_single_coalesced": "reduce_scatter",
}  # fmt: skip
"""Methods of torch's ProcessGroup, and the collectives that they are."""
AXES = {"world": "world", "stage": "data", "replicas": "data", "pipeline": "pipeline", "context": "context",
        "tensor": "tensor"}  # fmt: skip
"""Axes of a mesh that the log tells apart, and its names of them."""


class Work(dist.Work):
    """A collective that is done, as soon as it is begun; that the program waits for it is written
    down."""

    def __init__(self, log: Log, number: int, on_host: bool):
        super().__init__()
        self._log, self._number, self._on_host = log, number, on_host

    def wait(self, timeout: Any = None) -> bool:
        """Note the wait: of the host on a message between hosts, otherwise of the device's
        stream."""
        self._log.wait(self._number, self._on_host)
        return True

    def is_completed(self) -> bool:
        """Return True."""
        return True


class Log:
    """Everything that this rank sends and receives.

    A launch is what one communicator starts at once: a collective, a message, or several messages
    as a batch."""

    def __init__(self, rank: int, world_size: int, places: Places):
        self.rank, self.world_size, self._places = rank, world_size, places
        self.groups: list[dict[str, Any]] = []
        self.parts: list[dict[str, Any]] = []
        self.launches: list[tuple[int, list[int], list[int]]] = []
        """(group, parts, launches waited for since the one before on this side: host or device)."""
        self.phases: list[tuple[str, int]] = []
        """(phase, its first launch)."""
        self._group_numbers: dict[str, int] = {}
        self._part_numbers: dict[Any, int] = {}
        self._waited: dict[bool, list[int]] = {
            True: [],
            False: [],
        }  # by whether the next launch is of the host
        self._on_stream: list[
            int
        ] = []  # waited for by the device's stream, and not yet by the host
        self._batch: list[tuple[Any, int]] | None = None

    def begin(self, phase: str) -> None:
        """Note that a phase begins."""
        self.phases.append((phase, len(self.launches)))

    def wait(self, number: int, on_host: bool) -> None:
        """Note that what comes next waits for a launch."""
        self._waited[False].append(number)
        if on_host:
            self._waited[True].append(number)
        else:
            self._on_stream.append(number)

    def synchronize(self) -> None:
        """Note that the host waits for the device, and so for all that its stream waits for."""
        self._waited[True] += self._on_stream
        self._on_stream = []

    def start(self, group: Any, kind: str, tensors: list[torch.Tensor], peer: int, op: str) -> Work:
        """Write down a part; outside of a batch it is a launch of its own."""
        on_host = bool(tensors) and tensors[0].device.type == "cpu"
        place = self._places.here(sys._getframe(2), kind)
        for tensor in tensors:
            if not tensor.is_contiguous():
                raise RuntimeError(f"{kind} of a tensor that is not contiguous: NCCL refuses it")
        key = (kind, peer, tuple((tuple(t.shape), t.dtype) for t in tensors), op, on_host, place)
        if key not in self._part_numbers:
            self._part_numbers[key] = len(self.parts)
            numel = sum(tensor.numel() for tensor in tensors)
            size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            dtype = str(tensors[0].dtype).removeprefix("torch.") if tensors else ""
            self.parts.append(
                {"kind": kind, "peer": peer, "numel": numel, "bytes": size, "dtype": dtype, "op": op,
                 "host": on_host, "place": place}
            )  # fmt: skip
        # Parts that are alike are written down once: a step repeats the same few.
        part = self._part_numbers[key]
        if self._batch is not None:
            self._batch.append((group, part))
            # Of the batch that is being put together.
            return Work(self, len(self.launches), on_host)
        return self._launch(group, [part], on_host)

    def _launch(self, group: Any, parts: list[int], on_host: bool) -> Work:
        # Host and device go on independently; each launch keeps what its own side has waited for.
        waited, self._waited[on_host] = self._waited[on_host], []
        self.launches.append((self._number_of(group), parts, waited))
        return Work(self, len(self.launches) - 1, on_host)

    def _number_of(self, group: Any) -> int:
        name = group.group_name
        if name not in self._group_numbers:
            self._group_numbers[name] = len(self.groups)
            self.groups.append(
                {"name": name, "ranks": dist.get_process_group_ranks(group), "axis": ""}
            )
        return self._group_numbers[name]

    def name_axes(self, mesh: Mesh) -> None:
        """Note which axis of the mesh each group is. Of a group that is several axes, the last name
        counts."""
        fold = mesh.expert_fold
        named = [(getattr(mesh, axis), name) for axis, name in AXES.items()]
        if fold:
            experts = [(axis, "expert") for axis in (fold.holders, fold.tensor, fold.expert)]
            named = [(fold.replicas, "data"), *experts, *named]
        for axis, name in named:
            if axis.group is not None:
                self.groups[self._number_of(axis.group)]["axis"] = name

    def batch(self, operations: list[dist.P2POp]) -> list[Work]:
        """Start messages at once, in the place of torch's `batch_isend_irecv`."""
        self._batch = []
        try:
            for each in operations:
                peer = {"group_dst" if each.op is dist.isend else "group_src": each.group_peer}
                # Comes back to `start`, which adds to the batch that is open.
                each.op(each.tensor, group=each.group, tag=each.tag, **peer)
            group, parts = self._batch[0][0], [part for _, part in self._batch]
        finally:
            self._batch = None
        return [self._launch(group, parts, operations[0].tensor.device.type == "cpu")]


def open_groups(rank: int, world_size: int, places: Places) -> Log:
    """Make this process `rank` of `world_size`, and return the log of what it sends."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    log = Log(rank, world_size, places)
    for method, kind in KINDS.items():
        if hasattr(dist.ProcessGroup, method):
            setattr(dist.ProcessGroup, method, _recorded(log, kind))
    # The fake group knows no batches, but NCCL runs one as a single launch: that decides on
    # dead-locks.
    dist.batch_isend_irecv = log.batch  # type: ignore[assignment]
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    return log


def _recorded(log: Log, kind: str) -> Any:
    def call(group: Any, *arguments: Any, **named: Any) -> Work:
        values = [*arguments, *named.values()]
        # The options object is among the arguments, at another place in each method.
        options = next((each for each in reversed(values) if hasattr(each, "timeout")), None)
        peer = int(getattr(options, "rootRank", -1))
        if kind in ("send", "recv"):
            peer = int(values[1])
        op = options.reduceOp.op.name if "reduce" in kind else ""  # type: ignore[union-attr]
        # Of an all-gather the whole is the output, which comes first; of others it is the input,
        # which comes last.
        sides = [
            each
            for each in values
            if tree_leaves(each) and isinstance(tree_leaves(each)[0], torch.Tensor)
        ]
        side = sides[0] if kind == "all_gather" else sides[-1] if sides else []
        return log.start(group, kind, tree_leaves(side), peer, op)

    return call
