"""Reading tensors by name and slice from a folder of safetensors files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from megalite.models.weights import Weight


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used. The message names the folder and what is wrong with it."""


class TensorFolder:
    """The tensors of STEM.safetensors, or of the files that STEM.safetensors.index.json lists."""

    def __init__(self, folder: Path, stem: str = "model"):
        self.folder, self.stem = folder, stem
        self._open: dict[str, Any] = {}
        index = folder / f"{stem}.safetensors.index.json"
        try:
            if index.exists():
                self.files: dict[str, str] = json.loads(index.read_text())["weight_map"]
            else:
                single = f"{stem}.safetensors"
                self.files = dict.fromkeys(self._file(single).keys(), single)
        except (OSError, SafetensorError, json.JSONDecodeError, KeyError) as error:
            raise CheckpointError(
                f"{folder}: no readable {stem}.safetensors or {stem}.safetensors.index.json ({error})"
            ) from None

    def _file(self, name: str) -> Any:
        if name not in self._open:
            self._open[name] = safe_open(self.folder / name, framework="pt")
        return self._open[name]

    def fetch(self, name: str, where: tuple[slice, ...]) -> Tensor:
        """Read a slice of a tensor; only its bytes are read."""
        return self._file(self.files[name]).get_slice(name)[where]

    def check(self, weights: Sequence[Weight], ignore: Sequence[str] = ()) -> None:
        """Raise CheckpointError unless names and shapes are exactly those of the table."""
        wanted = {name: shape for weight in weights for name, shape in weight.hf_shapes().items()}
        missing = sorted(wanted.keys() - self.files.keys())
        unknown = sorted(self.files.keys() - wanted.keys() - set(ignore))
        if missing or unknown:
            raise CheckpointError(
                f"{self.folder}/{self.stem}: the model does not match this checkpoint; "
                f"missing tensors: {_some(missing)}; tensors of no weight: {_some(unknown)}"
            )
        for name, shape in wanted.items():
            found = tuple(self._file(self.files[name]).get_slice(name).get_shape())
            if found != shape:
                raise CheckpointError(
                    f"{self.folder}/{self.stem}: {name} has shape {list(found)}, the model needs {list(shape)}"
                )


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") if names else "none"
