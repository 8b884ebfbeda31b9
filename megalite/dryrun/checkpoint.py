"""A checkpoint without numbers: what a dry run saves, and a restart on other GPUs resumes from."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalite.checkpoint.folder import MANIFEST, digest, write_json
from megalite.checkpoint.load import VALUES
from megalite.checkpoint.resume import find_checkpoint
from megalite.checkpoint.save import Saver
from megalite.comm.mesh import Mesh
from megalite.config import Config
from megalite.dryrun.data import dry_checkpoint
from megalite.dryrun.device import Places
from megalite.dryrun.groups import Log
from megalite.dryrun.rank import RESTART, Job, Phases, Record
from megalite.engine import ReadState
from megalite.engine.gather import HostBuffers
from megalite.models.weights import Weight
from megalite.training.run import Storage


class DryStorage(Storage):
    """Storage of a rank that is run dry: its models need not be there, and its checkpoints have no
    numbers."""

    def __init__(
        self,
        job: Job,
        config: Config,
        record: Record,
        log: Log | None,
        phases: Phases,
        places: Places,
    ):
        self._job, self._config, self._record = job, config, record
        self._log, self._phases, self._places = log, phases, places

    def find(
        self, root: Path, resume: str | Path, mesh: Mesh, bad_steps_limit: int | None = None
    ) -> tuple[Path | None, list[str]]:
        """Find the checkpoint to begin from, in a phase of its own."""
        if self._log:  # sees the mesh here for the first time
            self._log.name_axes(mesh)
        if self._job.begins_at:
            self._phases.begin(RESTART)
        return find_checkpoint(root, resume, mesh, bad_steps_limit)

    def base_files(self, config: Config) -> dict[str, str]:
        """Return nothing: no file is there."""
        return {}

    def open_model(self, *arguments: Any, **options: Any) -> ReadState:
        """Return a reader that reads nothing."""
        return _empty

    def initial_state(self, config: Config, mesh: Mesh, checkpoint: Path | None) -> ReadState:
        """Return a reader of tensors that have a size and no numbers, but for initial values drawn
        from a seed. Raises CheckpointError where names and shapes in `checkpoint` are others."""
        if config.model.hf and not checkpoint:
            return _empty
        of_weights = super().initial_state(config, mesh, checkpoint)
        if checkpoint:
            return _empty

        def read(weight: Weight, kind: str, start: int, stop: int) -> Tensor:
            # Optimizer states begin at zero, and can be most of the host's memory.
            return (of_weights if kind in VALUES else _empty)(weight, kind, start, stop)

        return read

    def make_saver(self, *arguments: Any, **options: Any) -> Saver:
        """Return a saver that writes a checkpoint only where it is resumed from later, on rank 0."""
        leaves = self._job.leaves and self._job.rank == 0
        return DrySaver(self._config if leaves else None, self._allocate, *arguments, **options)

    def _allocate(self, like: Tensor, *shape: int, pinned: bool = False) -> Tensor:
        """Return memory of the host that is not there: what a save puts together could be the whole
        model."""
        if not pinned:
            self._places.ask("waits: copies to the host")
        found = like.new_empty(shape, device="meta")
        self._record.gathered += found.nbytes
        return found


def _empty(weight: Weight, kind: str, start: int, stop: int) -> Tensor:
    return torch.empty(stop - start)


class DrySaver(Saver):
    """Gathers on the device what a save gathers, and writes no numbers."""

    def __init__(
        self,
        config: Config | None,
        allocate: Callable[..., Tensor],
        *arguments: Any,
        **options: Any,
    ):
        """Write a checkpoint of `config`'s run, or none. Memory of the host comes from `allocate`."""
        super().__init__(*arguments, **options)
        self._config, self._buffers = config, HostBuffers(allocate)

    def _write(self, folder: Path, collect: Any, train_state: dict[str, Any]) -> None:
        if self._config:
            write_checkpoint(self, self._config, train_state)


def write_checkpoint(saver: Saver, config: Config, train_state: dict[str, Any]) -> None:
    """Write what the ranks' savers would have left of a step: settings as they are, and files of
    tensors whose numbers are holes, which take no room. `saver` is rank 0's."""
    target, folder = saver.target, dry_checkpoint(config.run.folder, train_state["step"])
    weights = [target.row(name, "weight") for name in target.owners]
    (folder / "optimizer").mkdir(parents=True, exist_ok=True)
    for kind in ("weight", *saver.engine.states):
        of_some = kind in config.optimizer.all_states
        rows = [
            target.row(weight.name, kind)
            for weight in weights
            if not of_some or kind in config.optimizer.states_of(weight)
        ]
        shapes = {name: shape for row in rows for name, shape in row.hf_shapes().items()}
        stem = target.stem if kind == "weight" else f"optimizer/{kind}"
        is_short = kind == "weight" and config.train.precision == "bf16"
        if shapes:
            _write_holes(folder / f"{stem}.safetensors", shapes, "BF16" if is_short else "F32")
    target.write_extras(folder)
    write_json(folder / "train_state.json", train_state)
    # The digest of a hole as large as the model would take minutes: of settings alone.
    files = {path.name: digest(path) for path in folder.iterdir() if path.suffix == ".json"}
    write_json(folder / MANIFEST, {"files": files})


def _write_holes(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str) -> None:
    """Write a safetensors file of tensors of `dtype`: its header, and a hole for their numbers."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * (2 if dtype == "BF16" else 4)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(file.tell() + end)
