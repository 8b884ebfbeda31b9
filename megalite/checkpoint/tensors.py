"""Reading tensors by name and slice from a folder of safetensors files."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from megalite.activity import NOW
from megalite.models.weights import Weight

KEEPS = "a run keeps the model it began with; another one needs another run.name"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
"""How files are called that torch.save wrote."""


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used. The message names the folder and what is wrong with it."""


class NotSaved(CheckpointError):
    """The last checkpoint of a run could not be written."""


class TensorFolder:
    """The tensors of STEM.safetensors, or of the files that STEM.safetensors.index.json lists."""

    def __init__(self, folder: Path, stem: str = "model"):
        self.folder, self.stem = folder, stem
        self._open: dict[str, Any] = {}
        self._prefix = ""
        index, single = folder / f"{stem}.safetensors.index.json", f"{stem}.safetensors"
        try:
            if index.exists():
                self.files = _read_index(index, single)
            else:
                self.files = dict.fromkeys(self._file(single).keys(), single)
        except (OSError, SafetensorError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(
                f"{folder}: no readable {stem}.safetensors or {stem}.safetensors.index.json ({error}){_pickles(folder)}"
            ) from None
        self._add_unlisted()

    def _add_unlisted(self) -> None:
        """What the files of an index hold beside what it lists, as transformers does."""
        for file in sorted(set(self.files.values())):
            try:
                names = self._file(file).keys()
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{self.folder / file} cannot be read: {error}") from None
            for name in names:
                if (listed := self.files.setdefault(name, file)) != file:
                    raise CheckpointError(f"{self.folder}: {name} is stored in both {listed} and {file}")

    def _file(self, name: str) -> Any:
        if name not in self._open:
            self._open[name] = safe_open(self.folder / name, framework="pt")
        return self._open[name]

    def _slices(self, name: str) -> Any:
        try:
            return self._file(self.files[name]).get_slice(name.removeprefix(self._prefix))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.folder / self.files[name]} cannot be read: {error}") from None

    def fetch(self, name: str, where: tuple[slice, ...]) -> Tensor:
        """Read a slice of a tensor; only its bytes are read."""
        NOW.beats += 1
        return self._slices(name)[where]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slices(name).get_shape())

    def add_base_prefix(self, prefix: str, apart: Collection[str]) -> None:
        """Let names be asked for with the prefix ("transformer.") that a model stored without its head lacks, such as
        the hub's own gpt2. Names in `apart` have none."""
        if not any(name.startswith(prefix) for name in self.files):
            self._prefix = prefix
            self.files = {name if name in apart else prefix + name: file for name, file in self.files.items()}

    def check(self, weights: Sequence[Weight], ignore: Collection[str] = ()) -> None:
        """Raise CheckpointError unless names and shapes are exactly those of the table. Tensors in `ignore` may be
        there as well."""
        wanted = {name: shape for weight in weights for name, shape in weight.hf_shapes().items()}
        missing = sorted(wanted.keys() - self.files.keys())
        unknown = sorted(self.files.keys() - wanted.keys() - set(ignore))
        if missing or unknown:
            raise CheckpointError(
                f"{self.folder}/{self.stem}: the model does not match this checkpoint ({KEEPS}); "
                f"missing tensors: {_some(missing)}; tensors of no weight: {_some(unknown)}"
            )
        for name, shape in wanted.items():
            found = self.shape(name)
            if found != shape:
                raise CheckpointError(
                    f"{self.folder}/{self.stem}: {name} has shape {list(found)}, the model needs {list(shape)} "
                    f"({KEEPS})"
                )


def _read_index(index: Path, single: str) -> dict[str, str]:
    """Return the file of each tensor. Raises CheckpointError for a file that is elsewhere, or where there is also a
    single file, which transformers would take."""
    files = {name: str(file) for name, file in json.loads(index.read_text())["weight_map"].items()}
    if outside := next((file for file in files.values() if Path(file).name != file), None):
        raise CheckpointError(f"{index} names {outside}, which is outside of the folder")
    if index.with_name(single).exists() and set(files.values()) != {single}:
        raise CheckpointError(
            f"{index.parent} holds two models: {single}, and the files that {index.name} lists; remove one of them"
        )
    return files


def _pickles(folder: Path) -> str:
    names = sorted(path.name for path in folder.glob("*") if path.suffix in PICKLES)
    if not names:
        return ""
    return (
        f"; {_some(names)} may be pickles, which can run any program when they are loaded, and never are; where you "
        "trust them, convert them: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW) of transformers"
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") if names else "none"
