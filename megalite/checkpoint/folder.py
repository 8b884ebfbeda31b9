"""Checkpoint folders on disk: writing durably, the manifest, finding damage, pruning."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import stat
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from megalite.errors import CheckpointError
from megalite.outside import read_limited, read_object, reading

MANIFEST = "manifest.json"

Files = dict[str, dict[str, Any]]
"""{"size": bytes, "sha256": hex} of every file of a checkpoint, by its path inside."""


class Damage(IntEnum):
    """What is wrong with a file."""

    NONE = 0
    MISSING = 1
    SIZE = 2
    CONTENT = 3
    UNREADABLE = 4

    @property
    def words(self) -> str:
        return ("is whole", "is missing", "is not as long as it was", "is not what was written", "cannot be read")[self]


def step_folder(root: Path, step: int) -> Path:
    return root / f"step-{step:08d}"


def write_json(path: Path, value: Any) -> None:
    """Durably: a crash leaves the old file or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def digest(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def read_manifest(folder: Path) -> Files | Damage:
    """What it says, or what is wrong with it."""
    try:
        return parse_manifest(read_limited(folder / MANIFEST, CheckpointError))
    except FileNotFoundError:
        return Damage.MISSING
    except OSError:
        return Damage.UNREADABLE
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError, CheckpointError):
        return Damage.CONTENT


def parse_manifest(data: bytes) -> Files:
    """No single bit can change without being noticed, here or by the files that are named. Raises ValueError,
    KeyError, TypeError or AttributeError where it is no manifest."""
    files = json.loads(data, object_pairs_hook=_no_key_twice)["files"]
    if not files or min(int(entry["size"]) for entry in files.values()) < 0:
        raise ValueError("no files, or of impossible sizes")
    if any(Path(name).is_absolute() or ".." in Path(name).parts or not name.isprintable() for name in files):
        raise ValueError("a file outside of the folder, or that can have no such name")
    return files


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A bit of one file's name may make it another one's."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is given twice")
    return found


def damage_of(path: Path, wanted: dict[str, Any]) -> Damage:
    """Of a file, beside its entry in the manifest."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            return Damage.UNREADABLE
        if found.st_size != wanted["size"]:
            return Damage.SIZE
        return Damage.NONE if digest(path) == wanted else Damage.CONTENT
    except FileNotFoundError:
        return Damage.MISSING
    except OSError:  # a bad disk says so when it is read
        return Damage.UNREADABLE


def set_aside(folder: Path, why: str = "damaged") -> Path:
    """Rename a checkpoint that is not to be gone on from, so that it is neither taken, nor counted when pruning, nor
    lost. Returns its new place."""
    aside = folder.with_name(f"{folder.name}.{why}-{time.time_ns()}")
    with contextlib.suppress(OSError):  # where that cannot be, it is passed over again next time
        folder.rename(aside)
    return aside


def steps_in(root: Path) -> list[int]:
    """Steps that have a checkpoint, whole or not, oldest first."""
    if not root.is_dir():
        return []
    found = ((re.fullmatch(r"step-(\d+)", path.name), path) for path in root.iterdir())
    return sorted(int(match[1]) for match, path in found if match and path.is_dir())


def complete_steps(root: Path) -> list[int]:
    """Steps that have a complete checkpoint, oldest first. Compares sizes, not contents."""
    return [step for step in steps_in(root) if _complete(step_folder(root, step))]


def _complete(folder: Path) -> bool:
    files = read_manifest(folder)
    try:
        return not isinstance(files, Damage) and all(
            (folder / name).stat().st_size == entry["size"] for name, entry in files.items()
        )
    except OSError:
        return False


@dataclass(frozen=True)
class Worth:
    """What a checkpoint says of itself that decides whether it is kept, and gone on from."""

    step: int
    refused: int = 0
    """Steps in a row, this one the last, whose update was refused."""
    valid_loss: float = math.inf

    @property
    def updated(self) -> int:
        """The step that made its weights. Only the one after shows whether they are any good."""
        return self.step - self.refused


def read_worth(folder: Path, step: int) -> Worth:
    """Return the worth of a checkpoint of this step; nothing is held against one that does not say."""
    path = folder / "train_state.json"
    try:
        state = read_object(path, CheckpointError)
        with reading(path, CheckpointError):
            loss = math.inf if state.get("valid_loss") is None else float(state["valid_loss"])
            return Worth(step, int((state.get("numbers") or {}).get("in_a_row", 0)), loss)
    except CheckpointError:
        return Worth(step)


def best_steps(root: Path, steps: Sequence[int], count: int) -> list[int]:
    """Return up to `count` of these steps with the lowest validation loss, the best first; of equals, the later."""
    worth = [read_worth(step_folder(root, step), step) for step in steps] if count else []
    judged = sorted((each.valid_loss, -each.step) for each in worth if math.isfinite(each.valid_loss))
    return [-step for _, step in judged[:count]]


def sound_steps(steps: Sequence[int], newest: Worth) -> list[int]:
    """Return those of these steps whose weights a good step has followed. A loss alone shows nothing: that of weights
    which are beyond repair may be finite, and only its gradient is not."""
    return [step for step in steps if step < newest.updated]


def prune(root: Path, keep: int, keep_best: int = 0, newest: Worth | None = None) -> None:
    """Delete all complete checkpoints but the newest `keep` and the best `keep_best` by validation loss. Incomplete
    ones do not count, and are left to be looked at.

    Beside `newest`, the state that is saved now, two more stay: the newest that a good step has followed, and the
    newest from before the steps that were refused."""
    steps = complete_steps(root)
    kept = {*steps[-keep:], *best_steps(root, steps, keep_best)}
    if newest:
        kept |= {*sound_steps(steps, newest)[-1:]}
    if newest and newest.refused:
        kept |= {*[step for step in steps if step <= newest.updated][-1:]}
    for step in set(steps) - kept:
        discard(step_folder(root, step))


def discard(folder: Path) -> None:
    """Delete a checkpoint."""
    # Renamed first, so that a half-deleted folder is never taken for a checkpoint.
    leaving = folder.with_name(f"{folder.name}.old.tmp")
    remove(leaving)
    folder.rename(leaving)
    remove(leaving)


def replaced(folder: Path) -> Path:
    """Return the name that a checkpoint has while its step, saved again, takes its place."""
    return folder.with_name(f"{folder.name}.before.tmp")


def restore_replaced(root: Path) -> None:
    """Give checkpoints their names back whose successors a crash kept from taking them: one may be the only one."""
    for step in (int(path.name.split(".")[0].removeprefix("step-")) for path in root.glob("step-*.before.tmp")):
        folder = step_folder(root, step)
        if not folder.exists():
            replaced(folder).rename(folder)


def remove_unfinished(root: Path) -> None:
    """What a crash left of saving, replacing or pruning a checkpoint."""
    for path in root.glob("step-*.tmp"):
        remove(path)


def remove(path: Path) -> None:
    """A folder with all that is in it, a file, or a link but not what it leads to. Nothing, where there is nothing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
