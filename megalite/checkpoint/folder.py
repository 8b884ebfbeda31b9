"""Checkpoint folders on disk: durable writing, the manifest, damage, pruning."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
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
from megalite.utils.files import replacing
from megalite.utils.outside import read_limited, read_object, reading

MANIFEST = "manifest.json"
SENTENCES = ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json")
"""Files by which sentence-transformers makes one vector of a text's hidden states, beside those of its
modules."""

Files = dict[str, dict[str, Any]]
"""{"size": bytes, "sha256": hex} of every file of a checkpoint, by its path within the folder."""


class Damage(IntEnum):
    """Says what is wrong with a file. The larger value wins where ranks see different things."""

    NONE = 0
    MISSING = 1
    SIZE = 2
    CONTENT = 3
    UNREADABLE = 4

    @property
    def words(self) -> str:
        """Words for the damage, as the end of a sentence."""
        return (
            "is whole",
            "is missing",
            "is not as long as it was",
            "is not what was written",
            "cannot be read",
        )[self]


def step_folder(root: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint."""
    return root / f"step-{step:08d}"


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file durably: a crash leaves the old file or the new one."""
    with replacing(path, durable=True) as temporary:
        temporary.write_text(json.dumps(value, indent=1))


def step_of(folder: Path) -> int | None:
    """Return the step of a checkpoint's folder by its name, None for another folder."""
    match = re.fullmatch(r"step-(\d+)", folder.resolve().name)
    return int(match[1]) if match else None


def sentence_files(folder: Path) -> list[str]:
    """Return the files of sentence-transformers in the folder of a model, as relative paths; none
    where it is not one of its models."""
    if not (folder / SENTENCES[0]).is_file():
        return []
    # modules.json comes from outside and may name any path: folders are known by how that library
    # calls them, such as 1_Pooling.
    modules = sorted(path for path in folder.glob("[0-9]*_*/*") if path.is_file())
    return [
        *(name for name in SENTENCES if (folder / name).is_file()),
        *(str(path.relative_to(folder)) for path in modules),
    ]


def digest(path: Path) -> dict[str, Any]:
    """Return a file's entry in the manifest: its size and SHA-256."""
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": sha256}


def read_manifest(folder: Path) -> Files | Damage:
    """Read a checkpoint's manifest. Returns what is wrong with it instead of raising."""
    try:
        return parse_manifest(read_limited(folder / MANIFEST, CheckpointError))
    except FileNotFoundError:
        return Damage.MISSING
    except OSError:
        return Damage.UNREADABLE
    # Damaged JSON may parse to anything, and fail anywhere.
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        ArithmeticError,
        RecursionError,
        CheckpointError,
    ):
        return Damage.CONTENT


def parse_manifest(data: bytes) -> Files:
    """Parse a manifest so strictly that no flipped bit goes unnoticed, here or by the files that
    are named.

    Raises ValueError, KeyError, TypeError or AttributeError for anything else."""
    # The manifest itself has no checksum. A flipped bit in it must make it invalid, or name a file
    # or a digest that does not match.
    files = json.loads(data, object_pairs_hook=_no_key_twice)["files"]
    if not files or min(int(entry["size"]) for entry in files.values()) < 0:
        raise ValueError("no files, or of impossible sizes")
    for name in files:
        path = Path(name)
        if path.is_absolute() or ".." in path.parts or not name.isprintable():
            raise ValueError("a file outside of the folder, or that can have no such name")
    return files


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a dictionary of JSON's pairs. A flipped bit may turn a file's name into another file's:
    refuse that."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is given twice")
    return found


def damage_of(path: Path, wanted: dict[str, Any]) -> Damage:
    """Compare a file with its entry `wanted` in the manifest. The cheap checks come first."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            return Damage.UNREADABLE
        if found.st_size != wanted["size"]:
            return Damage.SIZE
        # Reads all of the file, so it comes last.
        return Damage.NONE if digest(path) == wanted else Damage.CONTENT
    except FileNotFoundError:
        return Damage.MISSING
    except OSError:  # a bad disk says so when it is read
        return Damage.UNREADABLE


def set_aside(folder: Path, why: str = "damaged") -> Path:
    """Rename a checkpoint that must not be resumed from: it is then neither found, nor counted by
    pruning, nor lost.

    The new name ends in `why`. Returns the new path."""
    aside = folder.with_name(f"{folder.name}.{why}-{time.time_ns()}")
    # If it cannot be renamed now, the next start passes over it again.
    with contextlib.suppress(OSError):
        folder.rename(aside)
    return aside


def steps_in(root: Path) -> list[int]:
    """Return the steps that have a checkpoint folder, complete or not, oldest first."""
    if not root.is_dir():
        return []
    steps = []
    for path in root.iterdir():
        match = re.fullmatch(r"step-(\d+)", path.name)
        if match and path.is_dir():
            steps.append(int(match[1]))
    return sorted(steps)


def complete_steps(root: Path) -> list[int]:
    """Return the steps that have a complete checkpoint, oldest first. Compares sizes, not
    contents."""
    return [step for step in steps_in(root) if _complete(step_folder(root, step))]


def _complete(folder: Path) -> bool:
    files = read_manifest(folder)
    if isinstance(files, Damage):
        return False
    try:
        return all((folder / name).stat().st_size == entry["size"] for name, entry in files.items())
    except OSError:
        return False


@dataclass(frozen=True)
class Worth:
    """Holds what decides whether a checkpoint is kept, and whether a run resumes from it."""

    step: int
    refused: int = 0
    """Number of steps in a row, up to this one, whose update was refused."""
    valid_loss: float = math.inf
    doubted: bool = False
    """Whether a step with bad numbers followed, which ended the run."""

    @property
    def updated(self) -> int:
        """Step whose update made the weights. Only the step after it shows whether they are
        sound."""
        return self.step - self.refused


def read_worth(folder: Path, step: int) -> Worth:
    """Return the worth of the checkpoint of `step`. One that does not say is taken for sound."""
    path = folder / "train_state.json"
    try:
        state = read_object(path, CheckpointError)
        with reading(path, CheckpointError):
            numbers = state.get("numbers") or {}  # as version 0.1 wrote it
            loss = math.inf if state.get("valid_loss") is None else float(state["valid_loss"])
            refused = int(state.get("refused", numbers.get("in_a_row", 0)))
            return Worth(step, refused, loss, bool(state.get("doubted")))
    except CheckpointError:
        return Worth(step)


def best_steps(root: Path, steps: Sequence[int], count: int) -> list[int]:
    """Return up to `count` of these `steps` below `root` with the lowest validation loss, the best
    first.

    Of equal losses the later step is the better."""
    worth = [read_worth(step_folder(root, step), step) for step in steps] if count else []
    # Ascending by loss; the negated step puts the later one of two equals first.
    judged = sorted(
        (each.valid_loss, -each.step) for each in worth if math.isfinite(each.valid_loss)
    )
    return [-step for _, step in judged[:count]]


def sound_steps(steps: Sequence[int], newest: Worth) -> list[int]:
    """Return those of `steps` whose weights were followed by a good step; `newest` tells which
    steps were bad.

    A step's own loss proves nothing: weights beyond repair may have a finite loss, and only its
    gradient shows it."""
    # A step's update is known to be good when the step after it had good numbers.
    return [step for step in steps if step < newest.updated]


def prune(root: Path, keep: int, keep_best: int = 0, newest: Worth | None = None) -> None:
    """Delete all complete checkpoints below `root` but the newest `keep` and the best `keep_best`
    by validation loss.

    Incomplete ones do not count, and stay for a person to look at. Beside `newest`, the state that
    is being saved, two more stay: the newest that a good step has followed, and the newest from
    before the refused steps."""
    # Sets of reasons to stay; what no reason keeps is deleted below.
    steps = complete_steps(root)
    kept = {*steps[-keep:], *best_steps(root, steps, keep_best)}
    if newest:
        kept |= {*sound_steps(steps, newest)[-1:]}
    if newest and newest.refused:
        before = [step for step in steps if step <= newest.updated]
        kept.update(before[-1:])
    for step in set(steps) - kept:
        discard(step_folder(root, step))


def discard(folder: Path) -> None:
    """Delete a checkpoint."""
    # Renamed first: a half-deleted folder must never be taken for a checkpoint.
    # The end .tmp is what `remove_unfinished` looks for.
    leaving = folder.with_name(f"{folder.name}.old.tmp")
    remove(leaving)  # of a crash in this very function
    folder.rename(leaving)
    remove(leaving)


def replaced(folder: Path) -> Path:
    """Return the path of an old checkpoint while the same step, saved again, takes its place."""
    return folder.with_name(f"{folder.name}.before.tmp")


def restore_replaced(root: Path) -> None:
    """Give old checkpoints their names back if a crash kept their successors from taking them.

    Such a checkpoint may be the only one."""
    for path in list(root.glob(replaced(Path("step-*")).name)):
        folder = path.with_name(path.name.partition(".")[0])
        if not folder.exists():
            path.rename(folder)


def remove_unfinished(root: Path) -> None:
    """Delete what a crash left of saving, replacing or pruning a checkpoint."""
    for path in root.glob("step-*.tmp"):
        remove(path)


def remove(path: Path) -> None:
    """Delete a folder with its contents, a file, or a link (not its target). Does nothing if there
    is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
