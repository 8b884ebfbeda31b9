"""The folder of a run, which holds everything that the run writes."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import time
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

from megalite.errors import ConfigError

LOCK = "lock"
LOCK_PATIENCE_S = 100.0
"""Seconds to wait for the lock: time for an earlier run to end, and for a shared file system to
forget the locks of a lost node."""
KEPT_CONFIGS = 20
"""Configs of earlier starts that are kept; each checkpoint has its own beside its weights."""


def check_run_folder(folder: Path) -> None:
    """Check the folder before anything is written. Raises ConfigError where a link in it leads
    elsewhere: whoever may write to a shared folder could make the run write, and delete, in its
    owner's name."""
    for path in (*folder.glob("*"), *folder.glob("checkpoints/*")):
        if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
            raise ConfigError(
                f"{path} is a link to {path.resolve()}, but a run writes into its own folder only; remove the link, "
                "and let run.dir name the disk that is meant"
            )


def write_config(folder: Path, config_yaml: str, step: int = 0) -> Path | None:
    """Write the config of a start that goes on after `step` to `folder`. Returns where another one
    that was there is kept.

    Raises ConfigError where it cannot be written."""
    path, kept = folder / "config.yaml", None
    with _explained(folder):
        # Written beside it first: the existing config is not lost where the disk is full.
        temporary = folder / "config.yaml.tmp"
        temporary.write_text(config_yaml)
        # A start with the same config leaves no copy.
        before = path.read_bytes() if path.exists() else config_yaml.encode()
        if before != config_yaml.encode():
            kept = _place_for(before, folder, step)
            kept.write_bytes(before)
        temporary.replace(path)
        if kept:
            _forget_oldest(folder, kept)
    return kept


def _forget_oldest(folder: Path, newest: Path) -> None:
    """Delete the oldest kept configs beyond `KEPT_CONFIGS`."""
    ages = {
        path: path.stat().st_mtime_ns
        for path in folder.glob("config.until-step-*.yaml")
        if path != newest
    }
    for path in sorted(ages, key=lambda path: (ages[path], path))[
        : max(0, len(ages) + 1 - KEPT_CONFIGS)
    ]:
        path.unlink()


def _place_for(config_yaml: bytes, folder: Path, step: int) -> Path:
    """Return a free name for a kept config."""
    for number in itertools.count(1):
        path = folder / f"config.until-step-{step:08d}{f'-{number}' if number > 1 else ''}.yaml"
        # A start that was interrupted may have written a part of it.
        if not path.exists() or config_yaml.startswith(path.read_bytes()):
            return path
    raise AssertionError


@contextlib.contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Turn an OSError into a ConfigError that names `run.dir`."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise ConfigError(
            f"run.dir: {folder} cannot be written: {reason}; make room, or let run.dir name another disk"
        ) from None


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Make the folder and hold its lock: no other process gets in at the same time, where the file
    system has locks. A process that is killed releases it. Raises ConfigError where another one
    keeps it, or the folder cannot be written."""
    with _explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        # "a+" does not truncate: until the lock is taken, the file says who holds it.
        file = FileIO(folder / LOCK, "a+")
    with file:
        with contextlib.suppress(OSError):  # it has no locks, or the disk is full
            _take(file, folder)
        yield


def is_held(folder: Path) -> bool:
    """Return whether a run is in the folder now, as far as the file system has locks. Not for the
    process of the run itself, which would lose its lock."""
    with contextlib.suppress(OSError), open(folder / LOCK, "rb") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return True
    return False


def _take(file: FileIO, folder: Path) -> None:
    deadline, told = time.monotonic() + LOCK_PATIENCE_S, False
    while not _is_mine(file):
        holder = _holder(file)
        if not told:
            print(f"waiting for {holder} to leave {folder}", flush=True)
            told = True
        if time.monotonic() > deadline:
            raise ConfigError(
                f"{folder} is being written by {holder}; end that run, or take another run.name (if it is gone, "
                f"and its node for good, delete {folder / LOCK})"
            ) from BlockingIOError(errno.EAGAIN, "locked")
        time.sleep(0.5)
    _sign(file)


def _sign(file: FileIO) -> None:
    """Write into the lock file who holds it."""
    job = os.environ.get("SLURM_JOB_ID")
    file.truncate(0)
    file.write(
        f"process {os.getpid()} on {os.uname().nodename}{f' (job {job})' if job else ''}\n".encode()
    )


def _is_mine(file: FileIO) -> bool:
    """Try to take the lock; return whether this process has it."""
    try:
        # A POSIX lock, which NFS knows. The process loses it once it closes any descriptor of this
        # file.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # which of the two, differs by system
        return False
    return True


def _holder(file: FileIO) -> str:
    file.seek(0)
    return file.readall().decode(errors="replace").strip() or "another process"
