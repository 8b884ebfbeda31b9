"""Which checkpoint a run goes on from: all ranks agree on the newest whose content is that of its manifest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megalite.checkpoint.folder import complete_steps, damaged_files, read_manifest, step_folder
from megalite.checkpoint.tensors import CheckpointError
from megalite.mesh import Mesh
from megalite.parallel.collectives import all_reduce


def find_checkpoint(root: Path, resume: str | Path, mesh: Mesh) -> tuple[Path | None, list[str]]:
    """The folder to resume from, or None for a fresh start, and warnings about damaged ones passed over.

    `resume` is "auto" (newest undamaged one below `root`), "never", or a folder to begin from while the run has no
    checkpoint of its own. All ranks call it, and each reads a share of the files. Raises CheckpointError."""
    if resume == "never":
        if complete_steps(root):
            raise CheckpointError(
                f"checkpoint.resume = 'never', but {root} holds checkpoints that a new run would mix with; "
                "choose another run.name, or delete them"
            )
        return None, []
    steps = _steps_of_rank_0(root, mesh)
    if resume != "auto" and not steps:
        folder = Path(resume)
        if read_manifest(folder) is None:
            raise CheckpointError(f"checkpoint.resume = {folder}: no complete checkpoint there (manifest.json)")
        if _damaged(folder, mesh):
            raise CheckpointError(f"checkpoint.resume = {folder}: damaged, its files differ from manifest.json")
        return folder, []
    warnings: list[str] = []
    for step in reversed(steps):
        folder = step_folder(root, step)
        if not _damaged(folder, mesh):
            return folder, warnings
        warnings.append(f"WARNING: {folder} is damaged, its files differ from its manifest; taking the one before")
    if warnings:
        raise CheckpointError(f"{root}: every checkpoint is damaged; move them away to start the run afresh")
    return None, []


def _damaged(folder: Path, mesh: Mesh) -> bool:
    count = torch.tensor(len(damaged_files(folder, mesh.world.rank, mesh.world.size)))
    return bool(all_reduce(count, mesh.world) > 0)


def _steps_of_rank_0(root: Path, mesh: Mesh) -> list[int]:
    """One rank looks, so that all see the same folders whatever their file systems have cached."""
    steps = complete_steps(root)
    if mesh.world.size == 1:
        return steps
    count = torch.tensor(len(steps))
    dist.broadcast(count, 0)
    agreed = torch.tensor(steps) if mesh.world.rank == 0 else torch.empty(int(count), dtype=torch.int64)
    if count:
        dist.broadcast(agreed, 0)
    return agreed.tolist()


def read_train_state(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "train_state.json").read_text())
