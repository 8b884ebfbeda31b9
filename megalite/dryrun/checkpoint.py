"""A checkpoint without numbers: what a dry run saves, and a restart on other GPUs resumes from."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megalite.checkpoint.folder import MANIFEST, write_json
from megalite.config import Config

HIDDEN = "saved"
"""Subfolder of a run for checkpoints of a start that has not ended."""


def write_checkpoint(saver: Any, config: Config, folder: Path, train_state: dict[str, Any]) -> None:
    """Write what the ranks' savers would have left in `folder`: settings as they are, and files of
    tensors whose numbers are holes, which take no room. `saver` is rank 0's `Saver`.

    It is found once `show_checkpoints` has been called: other ranks of this start, which come
    after rank 0, begin where it did."""
    target, folder = saver.target, folder.parent.with_name(HIDDEN) / folder.name
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
    files = {
        str(path.relative_to(folder)): {"size": path.stat().st_size, "sha256": ""}
        for path in folder.rglob("*")
        if path.is_file()
    }
    write_json(folder / MANIFEST, {"files": files})


def show_checkpoints(runs: Path) -> None:
    """Put what the runs below `runs` have saved where a restart looks for it."""
    for folder in runs.glob(f"*/{HIDDEN}/step-*"):
        root = folder.parent.with_name("checkpoints")
        root.mkdir(exist_ok=True)
        folder.rename(root / folder.name)


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


def resume_without_numbers() -> None:
    """Let this rank find a checkpoint of `write_checkpoint`, check it and read it as it would any
    other, but for its numbers."""
    import torch

    from megalite.checkpoint import load, resume
    from megalite.checkpoint.folder import Damage
    from megalite.checkpoint.tensors import TensorFolder

    agree = resume._of_rank_0

    def of_rank_0(look: Any, mesh: Any) -> list[int]:
        found: list[int] = []

        def keep() -> list[int]:
            found[:] = look()
            return found

        # What rank 0 sends does not arrive here: every rank looks itself, and sends as rank 0 does.
        agree(keep, replace(mesh, world=replace(mesh.world, rank=0)))
        return found

    def fetch(self: Any, name: str, where: tuple[slice, ...]) -> Any:
        stored = self._slices(name)
        sizes = stored.get_shape()
        parts = [*where, *[slice(None)] * (len(sizes) - len(where))]
        shape = [len(range(*part.indices(size))) for part, size in zip(parts, sizes, strict=True)]
        dtype = torch.bfloat16 if stored.get_dtype() == "BF16" else torch.float32
        return torch.empty(shape, dtype=dtype)

    resume._of_rank_0 = of_rank_0
    # The digest of a hole as large as the model would take minutes.
    resume.damage_of = lambda path, wanted: Damage.NONE
    TensorFolder.fetch = fetch  # type: ignore[method-assign]
    # The model beside adapters is not there.
    load.from_hf = lambda *arguments, **options: _zeros


def _zeros(weight: Any, kind: str, start: int, stop: int) -> Any:
    import torch

    return torch.empty(stop - start)
