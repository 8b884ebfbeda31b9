"""The process mesh: which ranks share what.

    pipeline   ranks that each hold some of the layers
    data       ranks that each take other sequences
    context    ranks that share every sequence
    tensor     ranks that share every matrix

The ranks of a pipeline stage are folded once more for experts (Megatron's parallel folding, Liu et
al. 2025):

    expert replicas   ranks that hold the same experts
    expert            ranks that each hold some of the experts
    expert tensor     ranks that share every matrix of an expert

Ranks are numbered with the tensor axis innermost, so that a tensor group sits on neighbouring GPUs
of one node, and the pipeline axis, which needs the least of the network, outermost. A `Mesh` is
passed to whoever needs it; no module holds process groups."""

from __future__ import annotations

import datetime
import functools
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megalite.comm.meeting import Meeting, number_from, open_store, step_port
from megalite.errors import ConfigError
from megalite.plan import Cut, Plan, Sized
from megalite.runtime.streams import flush_output


@dataclass(frozen=True)
class Axis:
    """One dimension of the mesh as this rank sees it. A group of one has no process group: nothing
    is communicated."""

    size: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = None
    name: str = ""


@dataclass(frozen=True)
class Fold:
    """One of the two ways in which the ranks of a pipeline stage share its weights, as this rank
    sees it."""

    holders: Axis
    """Ranks that hold different parts of the same weights, in the order of `Weight.local_shape`:
    expert × tensor."""
    replicas: Axis
    """Ranks that hold the same parts, and share the work of summing their gradients."""
    tensor: Axis
    expert: Axis = Axis()

    @property
    def cut(self) -> Cut:
        return Cut(self.tensor.size, self.expert.size)


@dataclass(frozen=True)
class Mesh:
    """The axes of the process mesh as this rank sees them, and its device."""

    pipeline: Axis
    data: Axis
    context: Axis
    tensor: Axis
    replicas: Axis
    """data × context, the replica group: ranks that hold the same weights, and share the work of
    summing their gradients."""
    stage: Axis
    """replicas × tensor: ranks that hold the same layers, in the order of their global ranks."""
    world: Axis
    device: torch.device
    expert_fold: Fold | None = None
    """How experts are shared, where it is not as dense weights are."""

    @classmethod
    def alone(cls, device: torch.device | str = "cpu") -> Mesh:
        """Return the mesh of a process without others."""
        axis = Axis()
        return cls(axis, axis, axis, axis, axis, axis, axis, torch.device(device))

    @property
    def dense(self) -> Fold:
        """Return how dense weights are shared."""
        return Fold(self.tensor, self.replicas, self.tensor)

    @property
    def experts(self) -> Fold:
        """Return how experts are shared."""
        return self.expert_fold or self.dense

    @property
    def data_shares_experts(self) -> bool:
        """Return whether data ranks hold parts of the same experts."""
        # Ranks of one data rank follow one another (tensor × context). If a group of holders fits
        # into these a whole number of times it stays within one data rank, else it reaches over
        # several.
        return (self.tensor.size * self.context.size) % self.experts.holders.size > 0

    def fold_of(self, weight: Sized) -> Fold:
        """Return how a weight is shared."""
        return self.experts if weight.is_expert else self.dense

    def place_of(self, rank: int, fold: Fold | None = None) -> tuple[int, int, int]:
        """Return the (pipeline, replica, holder) coordinates of a global rank in a fold, of dense
        weights by default, whose holders are the tensor ranks; see `Plan.rank_at`."""
        fold = fold or self.dense
        # The numbering of global ranks, innermost last: pipeline, replica, holder.
        outer, holder = divmod(rank, fold.holders.size)
        return (*divmod(outer, fold.replicas.size), holder)


ALONE = Axis()


def make_mesh(plan: Plan, device: torch.device) -> Mesh:
    """Create the process groups of a plan. Every rank must call it. A lone process needs no
    torch.distributed."""
    sizes = {
        "pipeline": plan.pipeline,
        "data": plan.data,
        "context": plan.context,
        "tensor": plan.tensor,
    }
    # Axes of one rank get no group. In the order of this table: the last is innermost.
    sizes = {name: size for name, size in sizes.items() if size > 1}
    if not sizes:
        return Mesh.alone(device)
    world = _axis("world", dist.group.WORLD)
    backend = _backend_of_axes(plan, device)
    # An axis of size 1 needs no group at all, and one that is the whole world none of its own.
    if len(sizes) == 1:
        axes = {name: replace(world, name=name) for name in sizes}
    else:
        # Makes one group a row of each axis. Every rank takes part in making all of them.
        grid = _grid(sizes, device, backend)
        axes = {name: _axis(name, grid.get_group(name)) for name in sizes}
    if "data" not in axes or "context" not in axes:
        replicas = axes.get("data", axes.get("context", ALONE))
    elif len(sizes) == 2:
        replicas = replace(world, name="replicas")
    else:
        # One group over both axes, since gradients are summed over data and context ranks at once.
        both = grid["data", "context"]._flatten(backend_override=backend)
        replicas = _axis("replicas", both.get_group())
    # replicas × tensor: all of the world but the pipeline. Groups that exist are used again, since
    # each one costs a communicator, with NCCL also buffers on the device.
    if plan.pipeline == 1:
        stage = replace(world, name="stage")
    elif plan.tensor == 1:
        stage = replicas
    elif replicas.size == 1:
        stage = axes["tensor"]
    else:
        names = tuple(name for name in sizes if name != "pipeline")
        of_stage = grid[names]._flatten(backend_override=backend)
        stage = _axis("stage", of_stage.get_group())
    pipeline, data = axes.get("pipeline", ALONE), axes.get("data", ALONE)
    context, tensor = axes.get("context", ALONE), axes.get("tensor", ALONE)
    mesh = Mesh(pipeline, data, context, tensor, replicas, stage, world, device)
    if plan.folds_experts:
        return replace(mesh, expert_fold=_fold_experts(plan, mesh))
    return mesh


def _fold_experts(plan: Plan, mesh: Mesh) -> Fold:
    """Create the groups of experts: the ranks of every pipeline stage as replicas × expert ×
    tensor."""
    tensor, expert = plan.experts
    sizes = {
        "pipeline": plan.pipeline, "expert_replicas": plan.replicas_of(plan.experts), "expert": expert,
        "expert_tensor": tensor,
    }  # fmt: skip
    sizes = {name: size for name, size in sizes.items() if size > 1}
    backend = _backend_of_axes(plan, mesh.device)
    grid = _grid(sizes, mesh.device, backend)
    axes = {name: _axis(name, grid.get_group(name)) for name in sizes}
    # expert × expert_tensor are the holders of an expert weight's parts, in this order.
    axes["experts"] = axes.get("expert_tensor", axes.get("expert", ALONE))
    if expert > 1 and tensor > 1:
        flat = grid["expert", "expert_tensor"]._flatten(backend_override=backend)
        axes["experts"] = _axis("experts", flat.get_group())
    names = ("experts", "expert_replicas", "expert_tensor", "expert")
    return Fold(*(axes.get(name, ALONE) for name in names))


def _backend_of_axes(plan: Plan, device: torch.device) -> str | None:
    """Return the backend of the groups of axes; None for that of the world.

    Between GPUs only the world needs gloo beside NCCL, for numbers that hosts tell each other. It
    connects all ranks of a group to each other: at a thousand ranks, thousands of connections to
    each host that would never be used."""
    # DeepSpeed may keep on the host what ranks exchange.
    if device.type == "cpu" or plan.engine != "native":
        return None
    return dict(part.split(":") for part in dist.get_backend_config().split(","))[device.type]


def _grid(sizes: Mapping[str, int], device: torch.device, backend: str | None) -> DeviceMesh:
    """Create the groups of axes of these sizes, the innermost last."""
    override: Any = dict.fromkeys(sizes, backend) if backend else None
    return init_device_mesh(
        device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes), backend_override=override
    )


def _axis(name: str, group: dist.ProcessGroup | None) -> Axis:
    return Axis(dist.get_world_size(group), dist.get_rank(group), group, name)


def node_name() -> str:
    """Return Slurm's name of this machine, by which Slurm can exclude it; without Slurm its own
    name."""
    return os.environ.get("SLURMD_NODENAME") or os.uname().nodename


@functools.cache
def ranks_on_host() -> int:
    """Return how many ranks run on this host, as torchrun says, or srun where all its hosts have as
    many; otherwise 1."""
    if (told := os.environ.get("LOCAL_WORLD_SIZE")) is not None:
        return int(told)
    # Such as "8(x4)", 8 on each of 4 hosts; or "8(x3),4".
    tasks = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1")
    return 1 if "," in tasks else int(tasks.partition("(")[0])


@dataclass(frozen=True)
class Launch:
    """How this process was started: by torchrun, by srun with one task per rank, or alone."""

    rank: int
    world_size: int
    local_rank: int

    @classmethod
    def from_environment(cls) -> Launch:
        """Read rank and world size from the variables of torchrun or Slurm; without them, the
        process is alone. Raise ConfigError where one of them is missing, or no such number."""
        if "RANK" in os.environ:
            names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        # sbatch alone also sets SLURM_PROCID; SLURM_STEP_NUM_TASKS is there only inside an srun
        # step.
        elif number_from("SLURM_STEP_NUM_TASKS", 1) > 1:
            names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
        else:
            return cls(0, 1, 0)
        rank, world_size = number_from(names[0]), number_from(names[1])
        if not 0 <= rank < world_size:
            raise ConfigError(
                f"{names[0]}={rank} is none of {names[1]}={world_size} ranks; torchrun and srun set these variables"
            )
        return cls(rank, world_size, number_from(names[2], 0 if names[0] == "RANK" else None))

    @property
    def device(self) -> torch.device:
        """Return this rank's GPU, or the CPU: of those that it sees the one with its number, or the
        only one (`srun --gpus-per-task=1`)."""
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", self.local_rank % torch.cuda.device_count())

    def arrive(self, silence_s: float = 300.0) -> Meeting | None:
        """Tell the other ranks that this one is there, and on its way to `join`; see meeting.py.
        Returns None where there is nobody to meet. Raises Unreachable where rank 0 is not there in
        time."""
        if self.world_size == 1 or dist.is_initialized():
            return None
        _find_first_host()
        store = open_store(self.rank, self.world_size, silence_s or 1800.0)
        return Meeting(store, self.rank, self.world_size, node_name(), silence_s)

    def join(self, timeout_s: float = 1800.0, meeting: Meeting | None = None) -> None:
        """Form the process group with the other ranks, whom `arrive` may have told already. Does
        nothing for a lone process."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        meeting = meeting or self.arrive()
        if meeting is None:
            return
        meeting.wait()
        store = dist.PrefixStore("default_pg", meeting.store)
        store.set_timeout(datetime.timedelta(seconds=timeout_s))
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo",
            store=store,
            rank=self.rank,
            world_size=self.world_size,
            timeout=datetime.timedelta(seconds=timeout_s),
            # Lets NCCL connect at once: an unreachable GPU shows here and not in the first step.
            device_id=self.device if self.device.type == "cuda" else None,
        )

    def meet(self, timeout_s: float = 1800.0) -> dist.Store:
        """Return a store that all ranks see, and no more: no rank waits for another in a
        collective."""
        if self.world_size == 1:
            return dist.HashStore()
        _find_first_host()
        return open_store(self.rank, self.world_size, timeout_s)


def _find_first_host() -> None:
    """Set MASTER_ADDR and MASTER_PORT from Slurm where they are missing. Raises ConfigError without
    Slurm."""
    if "MASTER_ADDR" not in os.environ:
        if "SLURM_STEP_NODELIST" not in os.environ and "SLURM_JOB_NODELIST" not in os.environ:
            raise ConfigError(
                "RANK is set but MASTER_ADDR is not; start the ranks with torchrun or srun"
            )
        os.environ |= _slurm_rendezvous()


def _slurm_rendezvous() -> dict[str, str]:
    """Return the first host of this srun, where its rank 0 is, and a port of its own."""
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ["SLURM_JOB_NODELIST"]
    hosts = subprocess.run(
        ["scontrol", "show", "hostnames", nodes], check=True, capture_output=True, text=True
    )
    return {"MASTER_ADDR": hosts.stdout.split()[0], "MASTER_PORT": str(step_port())}


def leave(status: int = 0) -> None:
    """End a process that joined others. A lone one ends as any process does. What is printed is
    lost where nobody takes it: how the work ended counts."""
    has_joined = dist.is_initialized()
    if has_joined:
        dist.destroy_process_group()
    flush_output()
    # Threads of groups that sent messages from rank to rank live on, and may abort a process while
    # Python shuts down: one that has saved everything would count as failed.
    if has_joined:
        os._exit(status)
