"""One checkpoint on its way to the disk, in a thread of every rank: each writes its tensors, rank 0 all else, and once
all is there, its name. Whatever fails, on any rank, fails the attempt on all; nothing of it stays, and there are a few
more."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from megalite.activity import NOW
from megalite.checkpoint.board import Board
from megalite.checkpoint.folder import MANIFEST, Worth, digest, prune, remove, replaced, write_json
from megalite.mesh import Mesh
from megalite.models.peft import TENSORS as ADAPTER
from megalite.models.weights import Weight
from megalite.resources import fsync

PATIENCE_S = 1800.0
"""How long a rank that has done its part waits for the others."""
PAUSES_S = (5.0, 30.0, 120.0)
"""Between attempts. A file system that was gone for a moment comes back, and of a full one somebody is told."""
VISIBLE_S = 60.0
"""After which a file that another node wrote must be seen on a shared file system."""


Collect = Callable[[], Mapping[str, Mapping[str, Tensor]]]
"""Of each kind ("weight", "exp_avg"…) the tensors this rank owns."""


@dataclass
class Target:
    """What is the same for all checkpoints of a run. `owners` says which rank writes each weight; `write_extras` puts
    what is not a tensor (config.json, tokenizer) into a folder; files of weights begin with `stem`."""

    root: Path
    keep: int
    table: Mapping[str, Weight]
    owners: Mapping[str, int]
    mesh: Mesh
    write_extras: Callable[[Path], None]
    stem: str = "model"
    keep_best: int = 0

    def prune(self, newest: Worth | None) -> None:
        """Delete checkpoints that are not to be kept beside `newest`. What cannot be deleted now is next time."""
        with contextlib.suppress(OSError):
            prune(self.root, self.keep, self.keep_best, newest)


class Writing:
    """`run` in the threads of all ranks comes to the same end."""

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
        """There are no more attempts once `hurry` is set."""
        self.target, self.folder, self.collect, self.train_state = target, folder, collect, train_state
        self.worth = worth
        self.tensors: Mapping[str, Mapping[str, Tensor]] = {}
        self.board, self.hurry, self.say = board, hurry, say
        self.temporary = folder.with_name(f"{folder.name}.tmp")
        self.rank, self.num_ranks = target.mesh.world.rank, target.mesh.world.size

    def run(self) -> str:
        """Why it was not saved; empty where it was."""
        broken = ""
        try:
            self.tensors = self.collect()  # at once: the next step waits for it
        except Exception as error:
            broken = explain(error)
        if self.rank == 0:  # steps since the last save may have shown that one to be sound
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
        if reason := self._led(f"begin-{number}", self._make_folder):
            return reason
        part = {"error": f"rank {self.rank}: {broken}"} if broken else self._write_part()
        if self.rank > 0:
            self.board.put(f"part-{number}-{self.rank}", part)
        return self._led(f"end-{number}", lambda: self._complete(number, part))

    def _led(self, key: str, act: Callable[[], None]) -> str:
        """What went wrong in what rank 0 does, told to all ranks; empty where nothing did."""
        if self.rank > 0:
            # Rank 0 itself waits for others.
            return self.board.read([key], 2 * PATIENCE_S, lambda _: f"rank 0 was silent for {2 * PATIENCE_S:.0f} s")[0]
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
        self.target.prune(self.worth)  # there may be more than asked for by now
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.hurry.wait(0.1):
                raise TimeoutError("the next save is due")
            NOW.beats += 1  # the loop may be waiting for this thread

    def _write_part(self) -> dict[str, Any]:
        """This rank's files: their digests, and the sizes in bytes of the tensors in them; or an error."""
        files: dict[str, Any] = {}
        sizes: dict[str, dict[str, int]] = {}
        try:
            if not _becomes_true((self.temporary / "optimizer").is_dir):
                raise OSError(f"{self.target.root} is not there; run.dir must be on a file system all nodes share")
            for kind, logical in self.tensors.items():
                if logical:
                    name = (self.target.stem if kind == "weight" else f"optimizer/{kind}") + self._suffix()
                    sizes[name] = self._write_tensors(self.temporary / name, logical)
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
        writers = self._writers()
        if len(writers) == 1:
            return ".safetensors"
        return f"-{writers.index(self.rank) + 1:05d}-of-{len(writers):05d}.safetensors"

    def _write_tensors(self, path: Path, logical: Mapping[str, Tensor]) -> dict[str, int]:
        """Write one file of Hugging Face tensors; returns their sizes in bytes."""
        table = self.target.table
        named = {hf: tensor for name, whole in logical.items() for hf, tensor in table[name].to_hf(whole).items()}
        save_file(named, path, metadata={"format": "pt"})
        fsync(path)
        return {name: tensor.nbytes for name, tensor in named.items()}

    def _complete(self, number: int, part: dict[str, Any]) -> None:
        """Rank 0: wait for the other ranks, and give the folder its name. Where that cannot be, nothing stays."""
        try:
            keys = [f"part-{number}-{rank}" for rank in range(1, self.num_ranks)]
            parts = [part, *self.board.take(keys, PATIENCE_S, _say_late)]
            if errors := [part["error"] for part in parts if "error" in part]:
                raise OSError("; ".join(errors[:3]))
            self._seal(parts)
            self._give_name()
        except Exception:
            with contextlib.suppress(OSError):  # what cannot be deleted now is when the next one is written
                remove(self.temporary)
            raise

    def _seal(self, parts: list[dict[str, Any]]) -> None:
        files = {name: entry for part in parts for name, entry in part["files"].items()}
        for name, entry in files.items():
            path = self.temporary / name
            if not _becomes_true(lambda: path.exists() and path.stat().st_size == entry["size"]):  # noqa: B023
                raise OSError(f"rank 0 does not see {path}; run.dir must be on a file system all nodes share")
        tensors = {name: sizes for part in parts for name, sizes in part["tensors"].items()}
        if self.target.stem == ADAPTER:
            _join(self.temporary, files, tensors)
        if len(self._writers()) > 1:
            _write_indices(self.temporary, tensors)
        for path in sorted(p for p in self.temporary.rglob("*") if p.is_file()):
            name = str(path.relative_to(self.temporary))
            if name not in files:
                fsync(path)
                files[name] = digest(path)
                NOW.beats += 1
        write_json(self.temporary / MANIFEST, {"files": files})
        for folder in (*(path for path in self.temporary.rglob("*") if path.is_dir()), self.temporary):
            fsync(folder)

    def _give_name(self) -> None:
        before = replaced(self.folder)
        remove(before)
        replaces = self.folder.is_dir()  # the same step saved again, after a resume from an older one
        if replaces:
            self.folder.rename(before)
        named = False
        try:
            self.temporary.rename(self.folder)
            named = True
            fsync(self.folder.parent)
        except OSError:  # an older one must not be pruned for one whose name a power cut may take away
            if named:
                self.folder.rename(self.temporary)
            if replaces:
                before.rename(self.folder)
            raise
        with contextlib.suppress(OSError):
            remove(before)


def explain(error: Exception) -> str:
    """In one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f" ({error.filename})" if error.filename else "")
    return " ".join(str(error).split()) or type(error).__name__


def _say_late(missing: list[int]) -> str:
    ranks = ", ".join(str(number + 1) for number in missing[:8]) + (", …" if len(missing) > 8 else "")
    return f"nothing came of rank {ranks} within {PATIENCE_S:.0f} s after rank 0 had written its part"


def _becomes_true(true: Callable[[], bool]) -> bool:
    """Within the time that a shared file system takes to show what another node wrote."""
    deadline = time.monotonic() + VISIBLE_S
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _join(folder: Path, files: dict[str, Any], tensors: dict[str, dict[str, int]]) -> None:
    """Make one file of those of an adapter: PEFT reads no more than one."""
    parts = sorted(name for name in files if name.startswith(ADAPTER))
    whole = {name: tensor for part in parts for name, tensor in load_file(folder / part).items()}
    for part in parts:
        del files[part], tensors[part]
        (folder / part).unlink()
    save_file(whole, folder / f"{ADAPTER}.safetensors", metadata={"format": "pt"})


def _write_indices(folder: Path, tensors: dict[str, dict[str, int]]) -> None:
    """The index file of each kind, as Hugging Face writes it."""
    by_stem: dict[str, dict[str, dict[str, int]]] = {}
    for file, sizes in tensors.items():
        by_stem.setdefault(file.split("-")[0], {})[file] = sizes
    for stem, files in by_stem.items():
        weight_map = {name: Path(file).name for file, sizes in files.items() for name in sizes}
        total = sum(size for sizes in files.values() for size in sizes.values())
        write_json(
            folder / f"{stem}.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
        )
