"""Reading tensors by name and slice from a folder of safetensors files."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from megalite.activity import NOW
from megalite.models.weights import Weight

KEEPS = "a run keeps the model it began with; another one needs another run.name"
BUFFERS = re.compile(r"(\.attn\.(masked_)?bias|\.attention\.(masked_)?bias|\.rotary_emb\.inv_freq)$")
"""No weights, but stored by older versions of transformers: causal masks of GPT-2 and GPT-NeoX, rotary frequencies."""

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
        index = folder / f"{stem}.safetensors.index.json"
        try:
            if index.exists():
                named = json.loads(index.read_text())["weight_map"].items()
                self.files = {name: str(file) for name, file in named}
            else:
                single = f"{stem}.safetensors"
                self.files = dict.fromkeys(self._file(single).keys(), single)
        except (OSError, SafetensorError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(
                f"{folder}: no readable {stem}.safetensors or {stem}.safetensors.index.json ({error}){_pickles(folder)}"
            ) from None
        if outside := next((file for file in self.files.values() if Path(file).name != file), None):
            raise CheckpointError(f"{index} names {outside}, which is outside of the folder")

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

    def add_base_prefix(self, prefix: str) -> None:
        """Let names be asked for with the prefix ("transformer.") that a model stored without its head lacks, such as
        the hub's own gpt2."""
        if not any(name.startswith(prefix) for name in self.files):
            self._prefix = prefix
            self.files = {prefix + name: file for name, file in self.files.items()}

    def check(self, weights: Sequence[Weight], ignore: Sequence[str] = ()) -> None:
        """Raise CheckpointError unless names and shapes are exactly those of the table."""
        wanted = {name: shape for weight in weights for name, shape in weight.hf_shapes().items()}
        missing = sorted(wanted.keys() - self.files.keys())
        extra = self.files.keys() - wanted.keys() - set(ignore)
        unknown = sorted(name for name in extra if not BUFFERS.search(name))
        if missing or unknown:
            raise CheckpointError(
                f"{self.folder}/{self.stem}: the model does not match this checkpoint ({KEEPS}); "
                f"missing tensors: {_some(missing)}; tensors of no weight: {_some(unknown)}"
            )
        for name, shape in wanted.items():
            found = tuple(self._slices(name).get_shape())
            if found != shape:
                raise CheckpointError(
                    f"{self.folder}/{self.stem}: {name} has shape {list(found)}, the model needs {list(shape)} "
                    f"({KEEPS})"
                )


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
