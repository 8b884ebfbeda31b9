"""Writes one checkpoint, in a thread of every rank.

Each rank writes the tensors it owns; rank 0 writes everything else and, once all parts are there,
gives the folder its name. A failure on any rank fails the attempt on all: nothing of it stays, and
a few more attempts follow.

The order of an attempt makes it safe:
    1. rank 0 makes step-N.tmp and tells the others (begin)
    2. every rank writes and fsyncs its files, and puts their digests on the board (part)
    3. rank 0 waits for all parts, writes index and manifest, fsyncs files and folders, renames
       step-N.tmp to step-N, fsyncs the parent folder, and tells the others (end)
So a folder named step-N is complete and on disk, whenever the power goes.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from megalite.checkpoint import card
from megalite.checkpoint.board import Board
from megalite.checkpoint.folder import MANIFEST, Worth, digest, prune, remove, replaced, write_json
from megalite.comm.mesh import Mesh
from megalite.models.peft import TENSORS as ADAPTER
from megalite.models.weights import Weight
from megalite.runtime.activity import NOW
from megalite.utils.resources import fsync
from megalite.utils.tensor_files import save_file

PATIENCE_S = 1800.0
"""Seconds that a rank that has written its part waits for the others."""
PAUSES_S = (5.0, 30.0, 120.0)
"""Seconds between attempts. A file system may come back, and somebody may make room on a full
one."""
VISIBLE_S = 60.0
"""Seconds after which a shared file system must show a file that another node wrote."""


Collect = Callable[[], Mapping[str, Mapping[str, Tensor]]]
"""Returns, by kind ("weight", "exp_avg"…), the tensors this rank owns."""


@dataclass
class Target:
    """Holds what is the same for all checkpoints of a run."""

    root: Path
    keep: int
    """Number of newest checkpoints to keep."""
    row: Callable[[str, str], Weight]
    """Gives the row by which a kind of tensors of a weight, both by their names, is written."""
    owners: Mapping[str, int]
    """The rank that writes each weight."""
    mesh: Mesh
    write_extras: Callable[[Path], None]
    """Writes everything but tensors (config.json, tokenizer) to a folder."""
    stem: str = "model"
    """Beginning of the names of files of weights."""
    keep_best: int = 0
    """Number of best checkpoints to keep."""

    def prune(self, newest: Worth | None) -> None:
        """Delete checkpoints that need not be kept beside `newest`. What cannot be deleted now is
        deleted next time."""
        with contextlib.suppress(OSError):
            prune(self.root, self.keep, self.keep_best, newest)


class Writing:
    """Writes one checkpoint. `run`, called in a thread of every rank, ends alike on all."""

    def __init__(
        self,
        target: Target,
        folder: Path,
        collect: Collect,
        train_state: dict[str, Any],
        worth: Worth | None,
        board: Board,
        hurry: threading.Event,
        say: Callable[[str], None],
    ):
        """Write to `folder` what `collect` returns, and `train_state`.

        `worth` decides what may be pruned for it, `board` connects the ranks, `say` reports. No
        attempt follows once `hurry` is set."""
        self.target = target
        self.folder = folder
        self.collect = collect
        self.train_state = train_state
        self.worth = worth
        self.tensors: Mapping[str, Mapping[str, Tensor]] = {}
        self.board = board
        self.hurry = hurry
        self.say = say
        self.temporary = folder.with_name(f"{folder.name}.tmp")
        self.rank = target.mesh.world.rank
        self.num_ranks = target.mesh.world.size

    def run(self) -> str:
        """Write the checkpoint. Returns why it was not saved, or an empty string."""
        broken = ""
        try:
            # Before anything else: the next training step waits for it.
            self.tensors = self.collect()
        except Exception as error:
            broken = explain(error)
        # Steps since the last save may have proved that one sound, so that older ones can go.
        if self.rank == 0:
            self.target.prune(self.worth)
        for attempt, pause in enumerate((*PAUSES_S, None), 1):
            reason = self._attempt(attempt, broken)
            if not reason or pause is None:
                break
            if attempt == 1:
                self.say(f"warning: {self.folder} was not saved: {reason}; trying again")
            if self._led(f"pause-{attempt}", partial(self._pause, pause)):
                break
        return reason

    def _attempt(self, number: int, broken: str) -> str:
        """Try once. `broken` is why this rank has no tensors: it takes part all the same, so that
        nobody waits."""
        if reason := self._led(f"begin-{number}", self._make_folder):
            return reason
        # An error is an answer as well: rank 0 waits for every rank's part.
        part = {"error": f"rank {self.rank}: {broken}"} if broken else self._write_part()
        if self.rank > 0:
            # Keyed by the attempt: what a slow rank answers to an earlier one must not count for
            # this one.
            self.board.put(f"part-{number}-{self.rank}", part)
        return self._led(f"end-{number}", lambda: self._complete(number, part))

    def _led(self, key: str, act: Callable[[], None]) -> str:
        """Let rank 0 act, and return on all ranks why it failed; empty if it did not."""
        if self.rank > 0:
            # Twice as patient as rank 0, which may itself wait for the others first.
            patience_s = 2 * PATIENCE_S
            return self.board.read(
                [key], patience_s, lambda _: f"rank 0 was silent for {patience_s:.0f} s"
            )[0]
        try:
            act()
            reason = ""
        except Exception as error:
            reason = explain(error)
        self.board.put(key, reason)
        return reason

    def _make_folder(self) -> None:
        remove(self.temporary)
        (self.temporary / "optimizer").mkdir(parents=True)

    def _pause(self, seconds: float) -> None:
        """Wait before the next attempt. Raises TimeoutError once there shall be none: the next save
        is due, or the run was asked to end."""
        # There may be more than asked for by now, and a full disk needs the room.
        self.target.prune(self.worth)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.hurry.wait(0.1):
                raise TimeoutError("there shall be no other attempt")
            NOW.beats += 1  # progress for the watchdog: the loop may be waiting for this thread

    def _write_part(self) -> dict[str, Any]:
        """Write this rank's files. Returns their digests and the sizes in bytes of their tensors,
        or an error."""
        files: dict[str, Any] = {}
        sizes: dict[str, dict[str, int]] = {}
        try:
            # Rank 0 has made it, but on a network file system it may show here only seconds later.
            if not _becomes_true((self.temporary / "optimizer").is_dir):
                raise OSError(
                    f"{self.target.root} is not there; run.dir must be on a file system all nodes share"
                )
            for kind, logical in self.tensors.items():
                if not logical:
                    continue
                stem = self.target.stem if kind == "weight" else f"optimizer/{kind}"
                name = stem + self._suffix()
                sizes[name] = self._write_tensors(self.temporary / name, kind, logical)
                # Read back from the file: the manifest vouches for what is on the disk.
                files[name] = digest(self.temporary / name)
                NOW.beats += 1
            if self.rank == 0:
                self.target.write_extras(self.temporary)
                write_json(self.temporary / "train_state.json", self.train_state)
        except Exception as error:
            return {"error": f"rank {self.rank}: {explain(error)}"}
        return {"files": files, "tensors": sizes}

    def _writers(self) -> list[int]:
        return sorted(set(self.target.owners.values()))

    def _suffix(self) -> str:
        """Return the end of this rank's file names, numbered as Hugging Face does if several ranks
        write."""
        writers = self._writers()
        if len(writers) == 1:
            return ".safetensors"
        number = writers.index(self.rank) + 1
        return f"-{number:05d}-of-{len(writers):05d}.safetensors"

    def _write_tensors(
        self, path: Path, kind: str, logical: Mapping[str, Tensor]
    ) -> dict[str, int]:
        """Write one file of Hugging Face tensors. Returns their sizes in bytes."""
        named: dict[str, Tensor] = {}
        for name, whole in logical.items():
            # Hugging Face's names and shapes, also for optimizer states: they are sharded, tied and
            # fused as the weights are, and any layout can read them.
            row = self.target.row(name, kind)
            named |= (tensors := row.to_hf(whole))
            if kind == "weight":
                named |= row.copies_of(tensors)
        save_file(named, path, metadata={"format": "pt"})
        fsync(path)
        return {name: tensor.nbytes for name, tensor in named.items()}

    def _complete(self, number: int, part: dict[str, Any]) -> None:
        """Wait for the other ranks' parts, and give the folder its name; on failure, delete it.
        Rank 0 calls it."""
        try:
            # Rank 0 hands its own part over directly.
            keys = [f"part-{number}-{rank}" for rank in range(1, self.num_ranks)]
            parts = [part, *self.board.take(keys, PATIENCE_S, _say_late)]
            if errors := [part["error"] for part in parts if "error" in part]:
                raise OSError("; ".join(errors[:3]))
            self._seal(parts)
            self._give_name()
        except Exception:
            # What cannot be deleted now is deleted by the next attempt.
            with contextlib.suppress(OSError):
                remove(self.temporary)
            raise

    def _seal(self, parts: list[dict[str, Any]]) -> None:
        """Write what makes the folder complete: index files and the manifest, and put all of it on
        disk."""
        files: dict[str, Any] = {}
        tensors: dict[str, dict[str, int]] = {}
        for part in parts:
            files |= part["files"]
            tensors |= part["tensors"]
        # A shared file system may show other nodes' files late; the manifest must not name what is
        # not there.
        for name, entry in files.items():
            path = self.temporary / name
            if not _becomes_true(lambda: path.exists() and path.stat().st_size == entry["size"]):  # noqa: B023
                raise OSError(
                    f"rank 0 does not see {path}; run.dir must be on a file system all nodes share"
                )
        if self.target.stem == ADAPTER:
            _join(self.temporary, files, tensors)
        if len(self._writers()) > 1:
            _write_indices(self.temporary, tensors)
        # What is left are rank 0's own files: extras, indices, train_state.json. The writers of
        # tensors have fsynced.
        for path in sorted(path for path in self.temporary.rglob("*") if path.is_file()):
            name = str(path.relative_to(self.temporary))
            # The card is for people, who may write in it.
            if name not in (*files, card.NAME):
                fsync(path)
                files[name] = digest(path)
                NOW.beats += 1
        # Folders hold the names of their files, which an fsync of the files does not save.
        for folder in (path for path in self.temporary.rglob("*") if path.is_dir()):
            fsync(folder)
        # Last, and with it the names in its folder: whoever finds a manifest may rely on all that
        # it names.
        write_json(self.temporary / MANIFEST, {"files": files})

    def _give_name(self) -> None:
        """Rename the folder to its final name, durably. A checkpoint of the same step is kept until
        then."""
        before = replaced(self.folder)
        remove(before)
        # The same step saved again, after a resume from an older one.
        replaces = self.folder.is_dir()
        if replaces:
            # Moved, not deleted: after a crash right here, `restore_replaced` gives it its name
            # back.
            self.folder.rename(before)
        named = False
        try:
            self.temporary.rename(self.folder)
            named = True
            fsync(self.folder.parent)
        except OSError:
            # Without the fsync a power cut may take the name away, and pruning relies on it: undo
            # both renames.
            if named:
                self.folder.rename(self.temporary)
            if replaces:
                before.rename(self.folder)
            raise
        with contextlib.suppress(OSError):  # the next start deletes it
            remove(before)


def explain(error: Exception) -> str:
    """Return an error's message in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f" ({error.filename})" if error.filename else "")
    return " ".join(str(error).split()) or type(error).__name__


def _say_late(missing: list[int]) -> str:
    """Name the ranks whose parts are missing, given their indices among ranks 1, 2, …"""
    ranks = ", ".join(str(number + 1) for number in missing[:8])
    if len(missing) > 8:
        ranks += ", …"
    return (
        f"nothing came of rank {ranks} within {PATIENCE_S:.0f} s after rank 0 had written its part"
    )


def _becomes_true(true: Callable[[], bool]) -> bool:
    """Wait until a condition holds, as long as a shared file system may take to show what another
    node wrote."""
    deadline = time.monotonic() + VISIBLE_S
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _join(folder: Path, files: dict[str, Any], tensors: dict[str, dict[str, int]]) -> None:
    """Join the files of an adapter into one, because PEFT reads only one. Updates `files` and
    `tensors`."""
    parts = sorted(name for name in files if name.startswith(ADAPTER))
    whole: dict[str, Tensor] = {}
    for part in parts:
        whole |= load_file(folder / part)
    for part in parts:
        del files[part], tensors[part]
        (folder / part).unlink()
    save_file(whole, folder / f"{ADAPTER}.safetensors", metadata={"format": "pt"})


def _write_indices(folder: Path, tensors: dict[str, dict[str, int]]) -> None:
    """Write the index file of each kind of tensors, as Hugging Face does. `tensors`: sizes by file
    and name."""
    by_stem: dict[str, dict[str, dict[str, int]]] = {}
    for file, sizes in tensors.items():
        by_stem.setdefault(file.split("-")[0], {})[file] = sizes
    for stem, files in by_stem.items():
        weight_map: dict[str, str] = {}
        total = 0
        for file, sizes in files.items():
            weight_map |= dict.fromkeys(sizes, Path(file).name)
            total += sum(sizes.values())
        weight_map = dict(sorted(weight_map.items()))
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / f"{stem}.safetensors.index.json", index)
