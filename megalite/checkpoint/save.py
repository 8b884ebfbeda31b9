"""Saving while training goes on: the loop pays for gathering tensors into host memory, a thread does the rest."""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from megalite.activity import NOW
from megalite.checkpoint.folder import MANIFEST, digest, prune, step_folder, write_json
from megalite.engine import Engine
from megalite.mesh import Mesh
from megalite.models.peft import TENSORS as ADAPTER
from megalite.models.weights import Weight
from megalite.parallel.collectives import all_agree
from megalite.resources import fsync

PATIENCE_S = 1800.0
"""How long rank 0 waits for the files of the other ranks."""


class Saver:
    """Writes checkpoints of a run. Every rank has one and calls it at the same steps.

    A save that fails costs training nothing: it is reported, older checkpoints stand untouched, and the folder never
    gets its name."""

    def __init__(
        self,
        root: Path,
        keep: int,
        weights: Sequence[Weight],
        mesh: Mesh,
        engine: Engine,
        owners: Mapping[str, int],
        write_extras: Callable[[Path], None],
        stem: str = "model",
    ):
        """`owners` says which rank writes each weight; `write_extras` puts what is not a tensor (config.json,
        tokenizer) into a folder, and rank 0 calls it. The files of weights begin with `stem`."""
        self.stem = stem
        self.root, self.keep, self.mesh, self.engine = root, keep, mesh, engine
        self.write_extras = write_extras
        self.table = {weight.name: weight for weight in weights}
        self.owners = owners
        self.error: str | None = None
        """Why the last save failed, as far as this rank knows; None if it did not. Ask after `wait`."""
        self._thread: threading.Thread | None = None
        self._abandoned = threading.Event()
        self._news: list[str] = []

    def save(self, step: int, train_state: dict[str, Any]) -> None:
        """Gather the state of this moment and start writing it. Waits first for an earlier save to end on all ranks."""
        # In short rounds: a rank that sat in one long collective would be taken for hanging.
        while not all_agree(self._thread is None or not self._thread.is_alive(), self.mesh):
            time.sleep(0.2)
        self.error = None
        folder = step_folder(self.root, step)
        temporary = folder.with_name(f"{folder.name}.tmp")
        if self.mesh.world.rank == 0:
            try:
                shutil.rmtree(temporary, ignore_errors=True)
                (temporary / "optimizer").mkdir(parents=True)
            except OSError as error:
                self._failed(folder, error)
        all_agree(True, self.mesh)  # nobody looks before rank 0 has made it
        if not all_agree((temporary / "optimizer").is_dir(), self.mesh):
            self._failed(folder, OSError(f"not every rank sees {self.root}; run.dir must be on a shared file system"))
            return
        kinds = ("weight", *self.engine.states)
        tensors = {kind: self.engine.gather(kind, self.owners) for kind in kinds}
        self._thread = threading.Thread(
            target=self._write_guarded, args=(folder, temporary, tensors, train_state), name="checkpoint"
        )
        self._thread.start()

    def wait(self, abandon: bool = False) -> None:
        """Until this rank's part of the last save is on disk; on rank 0, until the whole checkpoint is.

        `abandon` does not wait for other ranks, which may be gone."""
        if abandon:
            self._abandoned.set()
        if self._thread is not None:
            NOW.do("waiting for the checkpoint to be written")
            self._thread.join()

    def news(self) -> list[str]:
        """What there is to say since the last call, for the console."""
        said, self._news = self._news, []
        return said

    def _failed(self, folder: Path, error: Exception) -> None:
        if self.error is None:
            self.error = f"{folder} was not saved: {error}"
            self._news.append(f"warning: {self.error}")

    def _write_guarded(
        self, folder: Path, temporary: Path, tensors: dict[str, dict[str, Tensor]], train_state: dict[str, Any]
    ) -> None:
        begin, rank = time.monotonic(), self.mesh.world.rank
        try:
            part = self._write_part(temporary, tensors)
        except Exception as error:
            part = {"error": f"rank {rank}: {error}"}
            self._failed(folder, error)
        try:
            write_json(temporary / f"part-{rank}.json", part)
            if rank > 0:
                return
            self._complete(folder, temporary, train_state)
        except Exception as error:
            self._failed(folder, error)
            return
        self._news.append(f"saved {folder} in {time.monotonic() - begin:.1f} s")
        with contextlib.suppress(OSError):  # what cannot be deleted now is tried again after the next save
            prune(self.root, self.keep)

    def _write_part(self, temporary: Path, tensors: dict[str, dict[str, Tensor]]) -> dict[str, Any]:
        """This rank's files; returns their digests, and the sizes in bytes of the tensors in them."""
        part: dict[str, Any] = {"files": {}, "tensors": {}}
        for kind, logical in tensors.items():
            if logical:
                stem = self.stem if kind == "weight" else f"optimizer/{kind}"
                name = stem + self._suffix()
                part["tensors"][name] = self._write_tensors(temporary / name, logical)
                part["files"][name] = digest(temporary / name)
                NOW.beats += 1  # the loop may be waiting for this thread
        return part

    def _writers(self) -> list[int]:
        return sorted(set(self.owners.values()))

    def _suffix(self) -> str:
        writers = self._writers()
        if len(writers) == 1:
            return ".safetensors"
        return f"-{writers.index(self.mesh.world.rank) + 1:05d}-of-{len(writers):05d}.safetensors"

    def _write_tensors(self, path: Path, logical: dict[str, Tensor]) -> dict[str, int]:
        """Write one file of Hugging Face tensors; returns their sizes in bytes."""
        named = {hf: tensor for name, whole in logical.items() for hf, tensor in self.table[name].to_hf(whole).items()}
        save_file(named, path, metadata={"format": "pt"})
        fsync(path)
        return {name: tensor.nbytes for name, tensor in named.items()}

    def _complete(self, folder: Path, temporary: Path, train_state: dict[str, Any]) -> None:
        """Rank 0: add what is not a tensor, wait for the other ranks, and give the folder its name."""
        self.write_extras(temporary)
        write_json(temporary / "train_state.json", train_state)
        files: dict[str, Any] = {}
        tensors: dict[str, dict[str, int]] = {}
        for rank in range(self.mesh.world.size):
            part = self._wait_for_part(temporary / f"part-{rank}.json")
            NOW.beats += 1
            if "error" in part:
                raise OSError(part["error"])
            files |= part["files"]
            tensors |= part["tensors"]
            (temporary / f"part-{rank}.json").unlink()
        if self.stem == ADAPTER:
            _join(temporary, self.stem, files, tensors)
        if len(self._writers()) > 1:
            _write_indices(temporary, tensors)
        for path in sorted(p for p in temporary.rglob("*") if p.is_file()):
            name = str(path.relative_to(temporary))
            if name not in files:
                fsync(path)
                files[name] = digest(path)
                NOW.beats += 1
        write_json(temporary / MANIFEST, {"files": files})
        fsync(temporary / "optimizer")
        fsync(temporary)
        if folder.exists():
            shutil.rmtree(folder)  # the same step saved again, after a resume from an older one
        temporary.rename(folder)
        fsync(folder.parent)

    def _wait_for_part(self, path: Path) -> Any:
        """Other ranks say through the file system that they are done: their threads must not use collectives."""
        deadline = time.monotonic() + PATIENCE_S
        while not path.exists():
            if self._abandoned.is_set():
                raise TimeoutError("training ended before every rank had written its part")
            if time.monotonic() > deadline:
                raise TimeoutError(f"{path.name} did not appear within {PATIENCE_S:.0f} s")
            time.sleep(0.02)
        return json.loads(path.read_text())


def _join(folder: Path, stem: str, files: dict[str, Any], tensors: dict[str, dict[str, int]]) -> None:
    """Make one file of those of `stem`: PEFT reads no more than one of an adapter."""
    parts = sorted(name for name in files if name.startswith(stem))
    whole = {name: tensor for part in parts for name, tensor in load_file(folder / part).items()}
    save_file(whole, folder / f"{stem}.safetensors", metadata={"format": "pt"})
    for part in parts:
        del files[part], tensors[part]
        if part != f"{stem}.safetensors":
            (folder / part).unlink()


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
