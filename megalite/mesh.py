"""The process mesh: who shares a matrix with whom, and who averages gradients with whom.

Ranks are numbered with the tensor axis innermost, so that a tensor group sits on neighbouring GPUs of one node. A
`Mesh` is passed to whoever needs it; no module holds process groups.
"""

from __future__ import annotations

import datetime
import os
import subprocess
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from megalite.config import ConfigError
from megalite.plan import Plan


@dataclass(frozen=True)
class Axis:
    """One direction of the mesh as this rank sees it. A group of one has no process group: nothing is communicated."""

    size: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = None


@dataclass(frozen=True)
class Mesh:
    data: Axis
    tensor: Axis
    world: Axis
    device: torch.device

    def rank_at(self, data: int, tensor: int) -> int:
        """Global rank at these coordinates."""
        return data * self.tensor.size + tensor


def make_mesh(plan: Plan, device: torch.device) -> Mesh:
    """The groups of a plan. Every rank must call it. A lone process needs no torch.distributed."""
    if plan.world_size == 1:
        return Mesh(Axis(), Axis(), Axis(), device)
    world = _axis(dist.group.WORLD)
    # An axis that is the whole world needs no group of its own, and one of size 1 needs none at all.
    if plan.tensor == 1:
        return Mesh(world, Axis(), world, device)
    if plan.data == 1:
        return Mesh(Axis(), world, world, device)
    grid = init_device_mesh(device.type, (plan.data, plan.tensor), mesh_dim_names=("data", "tensor"))
    return Mesh(_axis(grid.get_group("data")), _axis(grid.get_group("tensor")), world, device)


def _axis(group: dist.ProcessGroup | None) -> Axis:
    return Axis(dist.get_world_size(group), dist.get_rank(group), group)


@dataclass(frozen=True)
class Launch:
    """How this process was started: by torchrun, by srun with a task a rank, or alone."""

    rank: int
    world_size: int
    local_rank: int

    @classmethod
    def from_environment(cls) -> Launch:
        env = os.environ
        if "RANK" in env:
            return cls(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0)))
        # sbatch alone also sets SLURM_PROCID; SLURM_STEP_NUM_TASKS is there only inside an srun step.
        if int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
            return cls(int(env["SLURM_PROCID"]), int(env["SLURM_STEP_NUM_TASKS"]), int(env["SLURM_LOCALID"]))
        return cls(0, 1, 0)

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")

    def join(self, timeout_minutes: float = 30.0) -> None:
        """Meet the other ranks. Does nothing for a lone process."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.world_size == 1 or dist.is_initialized():
            return
        if "MASTER_ADDR" not in os.environ:
            if "SLURM_JOB_NODELIST" not in os.environ:
                raise ConfigError("RANK is set but MASTER_ADDR is not; start the ranks with torchrun or srun")
            os.environ |= _slurm_rendezvous()
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo",
            rank=self.rank,
            world_size=self.world_size,
            timeout=datetime.timedelta(minutes=timeout_minutes),
            device_id=self.device if self.device.type == "cuda" else None,
        )


def _slurm_rendezvous() -> dict[str, str]:
    """First host of the job, and a port that follows from the job id so that two jobs on a node do not meet."""
    nodes = os.environ["SLURM_JOB_NODELIST"]
    hosts = subprocess.run(["scontrol", "show", "hostnames", nodes], check=True, capture_output=True, text=True)
    port = 10_000 + int(os.environ["SLURM_JOB_ID"]) % 20_000  # below the ports Linux hands out by itself
    return {"MASTER_ADDR": hosts.stdout.split()[0], "MASTER_PORT": str(port)}


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
