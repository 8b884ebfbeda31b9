"""Finds the checkpoint a run resumes from: all ranks agree on the newest one whose files match its
manifest."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from megalite.checkpoint.folder import (
    MANIFEST,
    Damage,
    complete_steps,
    damage_of,
    discard,
    read_manifest,
    read_worth,
    remove,
    restore_replaced,
    set_aside,
    sound_steps,
    step_folder,
    steps_in,
)
from megalite.checkpoint.load import stored_config
from megalite.comm.collectives import all_reduce, start_highest
from megalite.comm.mesh import Mesh
from megalite.errors import CheckpointError
from megalite.runtime.activity import NOW
from megalite.runtime.exit_codes import passes

SHOWN = 3
"""Number of a checkpoint's damaged files that a message names."""


def find_checkpoint(
    root: Path,
    resume: str | Path,
    mesh: Mesh,
    bad_steps_limit: int | None = None,
) -> tuple[Path | None, list[str]]:
    """Return (the folder to resume from or None for a fresh start, messages about it).

    `resume` is "auto" (the newest undamaged checkpoint below `root`), "never", or a folder: one to
    begin from while the run has no checkpoint of its own, or one of its own to go back to. A
    checkpoint saved after `bad_steps_limit` steps in a row with bad numbers gives way to the newest
    that is known to be good. Damaged ones are set aside.

    All ranks of `mesh` call it, and each reads a share of the files. Raises CheckpointError on
    all."""
    # What one rank sees counts for all: on a shared disk listings may differ, and ranks that
    # decided by themselves would wait for each other in different collectives.
    steps = _of_rank_0(lambda: _steps_in(root), mesh)
    if resume == "never":
        if steps:
            raise CheckpointError(
                f"checkpoint.resume = 'never', but {root} holds checkpoints that a new run would mix with; "
                "choose another run.name, or delete them"
            )
        return None, []
    asked = None if resume == "auto" else Path(resume)
    if asked and not steps:  # the first start of a run that begins from another checkpoint
        return _undamaged(asked, mesh), []
    damaged: dict[Path, dict[str, Damage]] = {}
    newest = _newest_undamaged(root, steps, damaged, mesh)
    if newest is None:
        _refuse_damaged(root, damaged)
        return None, []
    # A restarted job has the same config: a run that has begun at `asked` goes on with its own
    # checkpoints.
    if asked and not _has_begun_at(newest, asked):
        if asked.resolve().parent != root.resolve():
            raise CheckpointError(
                f"checkpoint.resume = {asked}, but the run has checkpoints of its own up to {newest.name}, which did "
                "not begin there; leave it out to go on from them, or choose another run.name"
            )
        return _undamaged(asked, mesh), [
            f"checkpoint.resume: going back to {asked} from {newest.name}"
        ]
    folder, why = _sound(root, steps, newest, damaged, mesh, bad_steps_limit)
    if mesh.world.rank == 0:
        for other in damaged:
            set_aside(other)
    told = [
        f"warning: {other} is damaged and was set aside ({_tell(what)}); resuming from {folder}"
        for other, what in damaged.items()
    ]
    if asked and not _is_same(asked, newest):
        told.append(f"checkpoint.resume: the run has begun at {asked}")
    return folder, told + why


def _refuse_damaged(root: Path, damaged: dict[Path, dict[str, Damage]]) -> None:
    """Raise CheckpointError if there are checkpoints below `root`, all of them damaged."""
    if not damaged:
        return
    which = "; ".join(f"{folder.name}: {_tell(what)}" for folder, what in damaged.items())
    unreadable = any(Damage.UNREADABLE in what.values() for what in damaged.values())
    # With a disk's error as its cause a launcher starts the run again: the disk may come back.
    cause = OSError(errno.EIO, "unreadable") if unreadable else None
    raise CheckpointError(
        f"{root}: every checkpoint is damaged; move them away to start the run afresh ({which})"
    ) from cause


def _undamaged(folder: Path, mesh: Mesh) -> Path:
    """Return the folder. Raises CheckpointError if it is damaged."""
    if damage := find_damage(folder, mesh):
        raise CheckpointError(
            f"checkpoint.resume = {folder}: no undamaged checkpoint there: {_tell(damage)}"
        )
    return folder


def _newest_undamaged(
    root: Path,
    steps: Sequence[int],
    damaged: dict[Path, dict[str, Damage]],
    mesh: Mesh,
) -> Path | None:
    """Return the newest undamaged checkpoint. Adds those that are passed over to `damaged`."""
    for step in reversed(steps):
        folder = step_folder(root, step)
        damage = find_damage(folder, mesh)
        if not damage:
            return folder
        damaged[folder] = damage
    return None


def _has_begun_at(folder: Path, asked: Path) -> bool:
    """Return whether a run's own checkpoint is `asked` itself, or comes from a start that was asked
    for the same."""
    if _is_same(folder, asked):
        return True
    before = (stored_config(folder) or {}).get("checkpoint", {}).get("resume", "auto")
    return before not in ("auto", "never") and _is_same(Path(before), asked)


def _is_same(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve()


def _sound(
    root: Path,
    steps: Sequence[int],
    newest: Path,
    damaged: dict[Path, dict[str, Damage]],
    mesh: Mesh,
    limit: int | None,
) -> tuple[Path, list[str]]:
    """Return the newest checkpoint, or the one before the bad steps that ended the run, and
    messages about it.

    Those found damaged on the way are added to `damaged`."""

    def judge() -> list[int]:
        step = next(step for step in steps if step_folder(root, step) == newest)
        worth = read_worth(newest, step)
        return [worth.refused, *sound_steps(steps, worth)]

    refused, *sound = _of_rank_0(judge, mesh)
    if limit is None or refused < limit:
        return newest, []
    bad = f"{newest} was saved after {refused} steps in a row with bad numbers (health.bad_steps_limit)"
    before = _newest_undamaged(root, sound, damaged, mesh)
    if before is None:
        return newest, [
            f"warning: {bad}, and there is none from before them: move it away to start the run afresh"
        ]
    return before, [f"warning: {bad}; going back to {before}, the newest that is known to be good"]


def way_back(root: Path, bad_steps_limit: int) -> list[str]:
    """Say from where a run that ended for bad numbers can be resumed. Rank 0 calls it.

    `root` holds its checkpoints; `bad_steps_limit` is the setting."""
    steps = complete_steps(root)
    if not steps:
        return ["no checkpoint was saved: started again, the run begins afresh"]
    worth = read_worth(step_folder(root, steps[-1]), steps[-1])
    before = sound_steps(steps, worth)
    if not before:
        return ["no checkpoint is left that is known to be good; another run.name begins afresh"]
    folder = step_folder(root, before[-1])
    if worth.refused >= bad_steps_limit:
        return [
            f"started again, the run goes back to {folder}, the newest that is known to be good"
        ]
    return [
        f"if it comes again, checkpoint.resume={folder} goes back to the newest that is known to be good"
    ]


def leave_newer(root: Path, step: int) -> list[str]:
    """Set aside the checkpoints after `step`, to which a run goes back, and say so.

    Those with the same weights, because no step between them was good, are deleted but for the last
    one. That replaces the one that was kept for the same reason before."""
    newer = [other for other in steps_in(root) if other > step]
    if not newer:
        return []
    last = read_worth(step_folder(root, newer[-1]), newer[-1])
    told = []
    for other in newer:
        folder = step_folder(root, other)
        if not last.refused or other < last.updated:
            told.append(f"{folder} is set aside as {set_aside(folder, 'left').name}")
        elif other < last.step:
            discard(folder)
    if last.refused:
        for old in root.glob("step-*.refused"):
            remove(old)
        aside = step_folder(root, last.step).with_suffix(".refused")
        step_folder(root, last.step).rename(aside)
        told.append(
            f"{step_folder(root, last.step)} is set aside as {aside.name}; checkpoint.resume={aside} would use it"
        )
    return told


def find_damage(folder: Path, mesh: Mesh) -> dict[str, Damage]:
    """Return what is wrong with a checkpoint's files, by name. Each rank reads a share; all get the
    same result."""
    files = read_manifest(folder)
    names = [] if isinstance(files, Damage) else sorted(files)
    # Ranks may see different manifests: they must agree on the number of files before they share
    # them out.
    count = start_highest(len(names), mesh)()
    found = torch.zeros(count + 1, dtype=torch.int64)  # one a file, and the last for the manifest
    if isinstance(files, Damage):
        found[-1] = files
    elif len(names) < count:  # this rank sees another manifest than others do
        found[-1] = Damage.CONTENT
    else:
        for number in range(mesh.world.rank, count, mesh.world.size):
            name = names[number]
            # Every world.size-th file: together the ranks read each file once.
            found[number] = damage_of(folder / name, files[name])
            NOW.beats += (
                1  # progress for the watchdog: all files together may take longer than its timeout
            )
    # The larger Damage wins, see the enum.
    worst = all_reduce(found.to(mesh.device), mesh.world, dist.ReduceOp.MAX).tolist()
    if worst[-1]:
        return {MANIFEST: Damage(worst[-1])}
    of_files = zip(names, worst[:-1], strict=True)
    return {name: Damage(what) for name, what in of_files if what}


def _tell(damage: dict[str, Damage]) -> str:
    told = [f"{name} {what.words}" for name, what in damage.items()]
    more = f" and {len(told) - SHOWN} more files" if len(told) > SHOWN else ""
    return ", ".join(told[:SHOWN]) + more


def _steps_in(root: Path) -> list[int]:
    try:
        restore_replaced(root)
    except OSError as error:
        # Such a checkpoint may be the only one. Without it a run would begin afresh, and then
        # delete it with all else that is unfinished.
        raise CheckpointError(
            f"{root}: a checkpoint that was being replaced cannot be given its name back: "
            f"{error.strerror or error}"
        ) from error
    return steps_in(root)


def _of_rank_0(look: Callable[[], list[int]], mesh: Mesh) -> list[int]:
    """Return what rank 0 finds, on all ranks: their file systems may have cached different
    listings. Raises CheckpointError on all where it cannot look."""
    found: list[int] = []
    error: CheckpointError | OSError | None = None
    if mesh.world.rank == 0:
        try:
            found = look()
        except (CheckpointError, OSError) as raised:  # not yet: the others wait for the number
            error = raised
    number = len(found)
    if error:  # below 0; and lower where a launcher shall try again, whichever rank leaves first
        number = -2 if passes(error) else -1
    count = torch.tensor(number, device=mesh.device)
    if mesh.world.size > 1:
        dist.broadcast(count, 0)
    if error:
        raise CheckpointError(f"{error}") from error
    if count < 0:
        cause = OSError(errno.EIO, "unreadable") if count == -2 else None
        raise CheckpointError("rank 0 cannot look for checkpoints, and says why") from cause
    if mesh.world.size == 1:
        return found
    # broadcast wants the same size everywhere; `found` is empty on all ranks but 0.
    padded = found + [0] * (int(count) - len(found))
    agreed = torch.tensor(padded, dtype=torch.int64, device=mesh.device)
    if found or count:
        dist.broadcast(agreed, 0)
    return agreed.tolist()
