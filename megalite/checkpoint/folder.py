"""Checkpoint folders on disk: writing durably, the manifest, finding and pruning valid ones."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


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


def read_manifest(folder: Path) -> dict[str, dict[str, Any]] | None:
    """Files and digests of a complete checkpoint, or None where there is none. Compares sizes, not contents."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        if all((folder / name).stat().st_size == entry["size"] for name, entry in files.items()):
            return files
    except (OSError, ValueError, KeyError, TypeError):  # a flipped bit need not leave it text at all
        pass
    return None


def damaged_files(folder: Path, rank: int = 0, ranks: int = 1) -> list[str]:
    """Files whose content is not that of the manifest; of many ranks each reads its share."""
    files = read_manifest(folder)
    if files is None:
        return [MANIFEST]
    return [name for name in sorted(files)[rank::ranks] if not _intact(folder / name, files[name])]


def _intact(path: Path, wanted: dict[str, Any]) -> bool:
    try:
        return digest(path) == wanted
    except OSError:  # a bad disk says so when it is read
        return False


def set_aside(folder: Path) -> None:
    """Rename a damaged checkpoint, so that it is neither taken, nor counted when pruning, nor lost."""
    with contextlib.suppress(OSError):  # where that cannot be, it is passed over again next time
        folder.rename(folder.with_name(f"{folder.name}.damaged-{time.time_ns()}"))


def complete_steps(root: Path) -> list[int]:
    """Steps that have a complete checkpoint, oldest first."""
    if not root.is_dir():
        return []
    found = (re.fullmatch(r"step-(\d+)", path.name) for path in root.iterdir())
    steps = sorted(int(match[1]) for match in found if match)
    return [step for step in steps if read_manifest(step_folder(root, step)) is not None]


def prune(root: Path, keep: int) -> None:
    """Delete all but the newest `keep` complete checkpoints. Incomplete ones do not count, and are left to be looked
    at."""
    for step in complete_steps(root)[:-keep]:
        folder = step_folder(root, step)
        (folder / MANIFEST).unlink()  # first, so that a half-deleted folder is never taken for a checkpoint
        shutil.rmtree(folder)
