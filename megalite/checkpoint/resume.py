"""Which checkpoint a run goes on from: all ranks agree on the newest whose content is that of its manifest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megalite.checkpoint.folder import complete_steps, damaged_files, set_aside, step_folder
from megalite.checkpoint.tensors import CheckpointError
from megalite.mesh import Mesh
from megalite.parallel.collectives import all_agree


def find_checkpoint(root: Path, resume: str | Path, mesh: Mesh) -> tuple[Path | None, list[str]]:
    """The folder to resume from, or None for a fresh start, and warnings about damaged ones that were set aside.

    `resume` is "auto" (newest undamaged one below `root`), "never", or a folder to begin from while the run has no
    checkpoint of its own. All ranks call it, and each reads a share of the files. Raises CheckpointError on all."""
    steps = _steps_of_rank_0(root, mesh)
    if resume == "never":
        if steps:
            raise CheckpointError(
                f"checkpoint.resume = 'never', but {root} holds checkpoints that a new run would mix with; "
                "choose another run.name, or delete them"
            )
        return None, []
    if resume != "auto" and not steps:
        folder = Path(resume)
        if not _sound(folder, mesh):
            raise CheckpointError(
                f"checkpoint.resume = {folder}: no undamaged checkpoint there (files as its manifest.json says)"
            )
        return folder, []
    damaged: list[Path] = []
    for step in reversed(steps):
        folder = step_folder(root, step)
        if _sound(folder, mesh):
            if mesh.world.rank == 0:
                for other in damaged:
                    set_aside(other)
            return folder, [
                f"warning: {other} is damaged and was set aside; resuming from {folder}" for other in damaged
            ]
        damaged.append(folder)
    if damaged:
        raise CheckpointError(f"{root}: every checkpoint is damaged; move them away to start the run afresh")
    return None, []


def _sound(folder: Path, mesh: Mesh) -> bool:
    return all_agree(not damaged_files(folder, mesh.world.rank, mesh.world.size), mesh)


def _steps_of_rank_0(root: Path, mesh: Mesh) -> list[int]:
    """One rank looks, so that all see the same folders whatever their file systems have cached."""
    steps = complete_steps(root) if mesh.world.rank == 0 else []
    if mesh.world.size == 1:
        return steps
    count = torch.tensor(len(steps), device=mesh.device)
    dist.broadcast(count, 0)
    agreed = torch.tensor(steps + [0] * (int(count) - len(steps)), dtype=torch.int64, device=mesh.device)
    if steps or count:
        dist.broadcast(agreed, 0)
    return agreed.tolist()


def read_train_state(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "train_state.json").read_text())
