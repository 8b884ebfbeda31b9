"""Which checkpoint a run goes on from: all ranks agree on the newest whose content is that of its manifest."""

from __future__ import annotations

import contextlib
import errno
import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megalite.activity import NOW
from megalite.checkpoint.folder import (
    MANIFEST,
    Damage,
    damage_of,
    read_manifest,
    restore_replaced,
    set_aside,
    step_folder,
    steps_in,
)
from megalite.checkpoint.tensors import CheckpointError
from megalite.mesh import Mesh
from megalite.parallel.collectives import all_reduce, start_highest

SHOWN = 3
"""Damaged files of a checkpoint that are named."""


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
        if damage := find_damage(folder, mesh):
            raise CheckpointError(f"checkpoint.resume = {folder}: no undamaged checkpoint there: {_tell(damage)}")
        return folder, []
    damaged: dict[Path, dict[str, Damage]] = {}
    for step in reversed(steps):
        folder = step_folder(root, step)
        damage = find_damage(folder, mesh)
        if not damage:
            if mesh.world.rank == 0:
                for other in damaged:
                    set_aside(other)
            return folder, [
                f"warning: {other} is damaged and was set aside ({_tell(what)}); resuming from {folder}"
                for other, what in damaged.items()
            ]
        damaged[folder] = damage
    if damaged:
        which = "; ".join(f"{folder.name}: {_tell(what)}" for folder, what in damaged.items())
        unreadable = any(Damage.UNREADABLE in what.values() for what in damaged.values())
        # What could not be read, a launcher tries again.
        raise CheckpointError(
            f"{root}: every checkpoint is damaged; move them away to start the run afresh ({which})"
        ) from (OSError(errno.EIO, "unreadable") if unreadable else None)
    return None, []


def find_damage(folder: Path, mesh: Mesh) -> dict[str, Damage]:
    """What is wrong with a checkpoint's files, by their names; the same on all ranks, of which each reads a share."""
    files = read_manifest(folder)
    names = [] if isinstance(files, Damage) else sorted(files)
    count = start_highest(len(names), mesh)()
    found = torch.zeros(count + 1, dtype=torch.int64)  # the last is of the manifest
    if isinstance(files, Damage):
        found[-1] = files
    elif len(names) < count:  # this rank sees another manifest than others do
        found[-1] = Damage.CONTENT
    else:
        for number in range(mesh.world.rank, count, mesh.world.size):
            name = names[number]
            found[number] = damage_of(folder / name, files[name])
            NOW.beats += 1  # of a large one, all together take longer than a run may be silent
    worst = all_reduce(found.to(mesh.device), mesh.world, dist.ReduceOp.MAX).tolist()
    if worst[-1]:
        return {MANIFEST: Damage(worst[-1])}
    return {name: Damage(what) for name, what in zip(names, worst[:-1], strict=True) if what}


def _tell(damage: dict[str, Damage]) -> str:
    told = [f"{name} {what.words}" for name, what in damage.items()]
    return ", ".join(told[:SHOWN]) + (f" and {len(told) - SHOWN} more files" if len(told) > SHOWN else "")


def _steps_of_rank_0(root: Path, mesh: Mesh) -> list[int]:
    """One rank looks, so that all see the same folders whatever their file systems have cached."""
    steps: list[int] = []
    if mesh.world.rank == 0:
        with contextlib.suppress(OSError):  # a disk that is read-only, or that has just come back
            restore_replaced(root)
        steps = steps_in(root)
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
