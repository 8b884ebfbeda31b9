"""Saving while training goes on: the loop pays for gathering tensors into host memory, a thread does the rest."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from megalite.checkpoint.folder import MANIFEST, digest, fsync, prune, step_folder, write_json
from megalite.checkpoint.gather import choose_owners, gather_logical
from megalite.engine.native import NativeEngine
from megalite.mesh import Mesh
from megalite.models.weights import Weight


class Saver:
    """Writes checkpoints of a run. Every rank has one and calls it at the same steps."""

    def __init__(
        self,
        root: Path,
        keep: int,
        weights: Sequence[Weight],
        mesh: Mesh,
        engine: NativeEngine,
        write_extras: Callable[[Path], None],
    ):
        """`write_extras` puts what is not a tensor (config.json, tokenizer) into a folder; rank 0 calls it."""
        self.root, self.keep, self.weights, self.mesh, self.engine = root, keep, weights, mesh, engine
        self.write_extras = write_extras
        self.owners = choose_owners(weights, mesh.world.size)
        self._thread: threading.Thread | None = None
        self._news: list[str] = []

    def save(self, step: int, train_state: dict[str, Any]) -> None:
        """Gather the state of this moment and start writing it. Waits first for an earlier save to end."""
        self.wait()
        folder = step_folder(self.root, step)
        temporary = folder.with_name(f"{folder.name}.tmp")
        if self.mesh.world.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            (temporary / "optimizer").mkdir(parents=True)
        if self.mesh.world.size > 1:
            dist.barrier()
        tensors = {
            kind: gather_logical(self.weights, kind, self.owners, self.mesh, self.engine)
            for kind in ("weight", *self.engine.states)
        }
        self._thread = threading.Thread(
            target=self._write_guarded, args=(folder, temporary, step, tensors, train_state), name="checkpoint"
        )
        self._thread.start()

    def wait(self) -> None:
        """Until this rank's part of the last save is on disk; on rank 0, until the whole checkpoint is."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def news(self) -> list[str]:
        """What the thread has to say since the last call, for the console."""
        said, self._news = self._news, []
        return said

    def _write_guarded(self, folder: Path, *args: Any) -> None:
        # Training outlives a save that fails: older checkpoints stand untouched, and this one never gets its name.
        try:
            self._write(folder, *args)
        except Exception as error:
            self._news.append(f"WARNING: {folder} was not saved: {error}")

    def _write(
        self,
        folder: Path,
        temporary: Path,
        step: int,
        tensors: dict[str, dict[str, Tensor]],
        train_state: dict[str, Any],
    ) -> None:
        begin, rank = time.monotonic(), self.mesh.world.rank
        part: dict[str, Any] = {"files": {}, "tensors": {}}
        for kind, logical in tensors.items():
            stem = Path("model") if kind == "weight" else Path("optimizer") / kind
            if logical:
                name = str(stem) + self._suffix(rank)
                part["tensors"][name] = self._write_tensors(temporary / name, logical)
                part["files"][name] = digest(temporary / name)
        write_json(temporary / f"part-{rank}.json", part)
        if rank == 0:
            self._complete(folder, temporary, train_state)
            self._news.append(f"saved {folder} in {time.monotonic() - begin:.1f} s")

    def _suffix(self, rank: int) -> str:
        writers = sorted(set(self.owners.values()))
        if len(writers) == 1:
            return ".safetensors"
        return f"-{writers.index(rank) + 1:05d}-of-{len(writers):05d}.safetensors"

    def _write_tensors(self, path: Path, logical: dict[str, Tensor]) -> dict[str, int]:
        """Write one file of Hugging Face tensors; returns their sizes in bytes."""
        table = {weight.name: weight for weight in self.weights}
        named = {hf: tensor for name, whole in logical.items() for hf, tensor in table[name].to_hf(whole).items()}
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
            part = _wait_for_json(temporary / f"part-{rank}.json")
            files |= part["files"]
            tensors |= part["tensors"]
            (temporary / f"part-{rank}.json").unlink()
        if len(set(self.owners.values())) > 1:
            _write_indices(temporary, tensors)
        for path in sorted(p for p in temporary.rglob("*") if p.is_file()):
            name = str(path.relative_to(temporary))
            if name not in files:
                fsync(path)
                files[name] = digest(path)
        write_json(temporary / MANIFEST, {"files": files})
        fsync(temporary / "optimizer")
        fsync(temporary)
        if folder.exists():
            shutil.rmtree(folder)  # the same step saved again, after a resume from an older one
        temporary.rename(folder)
        fsync(folder.parent)
        prune(self.root, self.keep)


def _wait_for_json(path: Path, timeout_s: float = 3600.0) -> Any:
    """Other ranks say through the file system that they are done: their threads must not use collectives."""
    deadline = time.monotonic() + timeout_s
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path.name} did not appear within {timeout_s:.0f} s")
        time.sleep(0.02)
    return json.loads(path.read_text())


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
