"""Reads tensors by name and slice from a folder of safetensors files."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from megalite.checkpoint import quantised
from megalite.errors import CheckpointError, ConfigError
from megalite.models.weights import Weight
from megalite.runtime.activity import NOW
from megalite.utils.outside import beside, read_json, reading, shown

KEEPS = "a run keeps the model it began with; another one needs another run.name"
DTYPES = ("BF16", "F16", "F32", "F64")
"""Dtypes that weights may be stored in. Those of quantised models mean nothing without their scales
(`quantised`)."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
"""Suffixes of files that torch.save writes."""


class TensorFolder:
    """Reads the tensors of STEM.safetensors, or of the files that STEM.safetensors.index.json
    lists."""

    def __init__(self, folder: Path, stem: str = "model"):
        """Read the names of all tensors. Raises CheckpointError."""
        self.folder = folder
        self.stem = stem
        self._open: dict[str, Any] = {}
        self._stored: dict[str, str] = {}
        """Stored names of tensors that are known under others."""
        self._scaled: dict[str, Any] = {}
        """Tensors that are stored with scales, by their names."""
        index = folder / f"{stem}.safetensors.index.json"
        single = f"{stem}.safetensors"
        try:
            if index.exists():
                self.files = _weight_map(index, single)
            else:
                # `reading` turns what a damaged file can raise into a CheckpointError that names
                # it.
                with reading(folder / single, CheckpointError):
                    self.files = dict.fromkeys(self._file(single).keys(), single)
        except CheckpointError as error:
            raise CheckpointError(
                f"{folder}: no readable {stem}.safetensors or {stem}.safetensors.index.json ({error}){_pickles(folder)}"
            ) from None
        self._add_unlisted()
        self._add_scaled()
        self._add_packed()
        self._add_nf4()

    def _add_unlisted(self) -> None:
        """Add the tensors that files hold beside those an index lists, because transformers loads
        them, too."""
        for file in sorted(set(self.files.values())):
            with reading(self.folder / file, CheckpointError):
                names = self._file(file).keys()
            for name in names:
                if (listed := self.files.setdefault(name, file)) != file:
                    raise CheckpointError(
                        f"{self.folder}: {name} is stored in both {listed} and {file}"
                    )

    def _add_scaled(self) -> None:
        """Know numbers and their scales by the names of the tensors that these stand for."""
        for name, (kind, numbers, scales) in quantised.pairs(self.files, self._dtype_of).items():
            slices = self._slices(numbers), self._slices(scales)
            try:
                self._scaled[name] = kind(*slices)
            except ValueError as error:
                raise CheckpointError(f"{self.folder}/{self.stem}: {name}: {error}") from None
            self.files[name] = self.files.pop(numbers)
            del self.files[scales]
            self.files.pop(name + "_shape", None)  # of packed integers: their own shape says it too

    def _add_packed(self) -> None:
        """Likewise know what GPTQ's or AWQ's tools have written."""
        stems = [name.removesuffix("qweight") for name in self.files if name.endswith(".qweight")]
        if not stems:
            return
        try:
            said = quantised.packed_config(self.folder)
        except ConfigError as error:
            raise CheckpointError(f"{self.folder}: {error}") from None
        for stem in stems:
            ends = [end for end in quantised.PACKED if stem + end in self.files]
            if missing := {*quantised.PACKED[:3]} - {*ends}:
                raise CheckpointError(f"{self.folder}: there is no {stem}{min(missing)}")
            parts = {end: self._slices(stem + end) for end in ends}
            try:
                self._scaled[f"{stem}weight"] = quantised.PackedInputs(parts, said)
            except ValueError as error:
                raise CheckpointError(f"{self.folder}: {stem}qweight: {error}") from None
            self.files[f"{stem}weight"] = self.files[f"{stem}qweight"]
            for end in ends:
                del self.files[stem + end]
        what = f"{said['quant_method'].upper()}'s integers of {said['bits']} bits"
        _say_unpacked(self.folder, what, parts["scales"].get_dtype())

    def _add_nf4(self) -> None:
        """Likewise know what bitsandbytes has written."""
        names = [name for name in self.files if name.endswith(quantised.STATE)]
        for state in names:
            name = state.removesuffix(quantised.STATE)
            ends = [end for end in quantised.NF4 if name + end in self.files]
            if name not in self.files:
                raise CheckpointError(f"{self.folder}: there is no {name}")
            parts = {end: self._slices(name + end) for end in ends}
            try:
                self._scaled[name] = quantised.Nf4Blocks(self._slices(name), parts)
            except (ValueError, KeyError, TypeError) as error:
                raise CheckpointError(f"{self.folder}: {name}: {error}") from None
            for end in ends:
                del self.files[name + end]
        if names:
            _say_unpacked(self.folder, "bitsandbytes' NF4", self._dtype_of(name))

    def _dtype_of(self, name: str) -> str:
        return str(self._slices(name).get_dtype())

    def _file(self, name: str) -> Any:
        """Open a file once and keep it open: it stays readable if a run deletes the checkpoint
        meanwhile."""
        if name not in self._open:
            # `beside` refuses names that lead out of the folder.
            self._open[name] = safe_open(beside(self.folder, name, self.folder), framework="pt")
        return self._open[name]

    def _slices(self, name: str) -> Any:
        if stored := self.scaled(name):
            return stored
        file = self.files[name]
        with reading(self.folder / file, CheckpointError):
            return self._file(file).get_slice(self._stored.get(name, name))

    def fetch(self, name: str, where: tuple[slice, ...]) -> Tensor:
        """Read the slice `where` of the tensor `name`, and no other bytes of it."""
        NOW.beats += 1  # progress for the watchdog: loading a large model takes many reads
        with reading(self.folder / self.files[name], CheckpointError):
            return self._slices(name)[where]

    def scaled(self, name: str) -> Any:
        """Return the numbers and scales that the tensor `name` is stored as, one of `quantised`'s
        kinds; None where it is stored itself."""
        return self._scaled.get(self._stored.get(name, name))

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slices(name).get_shape())

    def add_base_prefix(self, prefix: str, apart: Collection[str]) -> None:
        """Accept names with a `prefix` ("transformer.") if the files lack it: models stored without
        a head, such as the hub's gpt2, have none. Names in `apart` never have it."""
        if not any(name.startswith(prefix) for name in self.files):
            self._rename({name: prefix + name for name in self.files if name not in apart})

    def end_names(self, ends: Mapping[str, str]) -> None:
        """Accept names with an older end ("LayerNorm.gamma") as those with a newer one; `ends` has
        the newer by the older."""
        old = [(name, end) for name in self.files for end in ends if name.endswith(end)]
        self._rename({name: name.removesuffix(end) + ends[end] for name, end in old})

    def start_names(self, starts: Mapping[str, str]) -> None:
        """Accept names that start in another way ("language_model.model."); `starts` has the known
        way by it."""
        other = [(name, start) for name in self.files for start in starts if name.startswith(start)]
        self._rename({name: starts[start] + name.removeprefix(start) for name, start in other})

    def _rename(self, names: Mapping[str, str]) -> None:
        """Know tensors by new `names`, given by those until now."""
        # Names may be changed twice (an old end, then a prefix): always back to what the file says.
        self._stored |= {new: self._stored.get(old, old) for old, new in names.items()}
        self.files = {names.get(name, name): file for name, file in self.files.items()}

    def check(self, weights: Sequence[Weight], ignore: Collection[str] = ()) -> None:
        """Raise CheckpointError unless names and shapes are exactly those of `weights`, and all
        have a known dtype.

        Tensors in `ignore` may be there as well."""
        # Both ways: a weight without a tensor, and a tensor without a weight, is an error.
        wanted = {name: shape for weight in weights for name, shape in weight.hf_shapes().items()}
        missing = sorted(wanted.keys() - self.files.keys())
        unknown = sorted(self.files.keys() - wanted.keys() - set(ignore))
        if missing or unknown:
            raise CheckpointError(
                f"{self.folder}/{self.stem}: the model does not match this checkpoint ({KEEPS}); "
                f"missing tensors: {_some(missing)}; tensors of no weight: {_some(unknown)}"
            )
        # Headers alone are read here: all mistakes are found before any bytes of weights are.
        for name, shape in wanted.items():
            stored = self._slices(name)
            dtype = stored.get_dtype()
            if dtype not in DTYPES:
                raise CheckpointError(
                    f"{self.folder}/{self.stem}: {name} is stored as {dtype}; weights must be one of "
                    f"{', '.join(DTYPES)}: a quantised model must be saved in one of these first"
                )
            found = tuple(stored.get_shape())
            if found != shape:
                raise CheckpointError(
                    f"{self.folder}/{self.stem}: {name} has shape {list(found)}, the model needs {list(shape)} "
                    f"({KEEPS})"
                )


@cache
def _say_unpacked(folder: Path, what: str, dtype: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"{folder}: {what} are unpacked to {dtype}", file=sys.stderr, flush=True)


def _weight_map(index: Path, single: str) -> dict[str, str]:
    """Return the file of each tensor, as an index says.

    Raises CheckpointError for a file outside the folder, and if there is a single file as well:
    transformers would load that one instead."""
    values = read_json(index, CheckpointError)
    files = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(files, dict):
        raise CheckpointError(
            f"{index} has no weight_map of names and files, but is {shown(values)}"
        )
    for file in {
        shown(file): file for file in files.values()
    }.values():  # each once; a damaged entry may be unhashable
        beside(index.parent, file, index)
    if index.with_name(single).exists() and set(files.values()) != {single}:
        raise CheckpointError(
            f"{index.parent} holds two models: {single}, and the files that {index.name} lists; remove one of them"
        )
    return files


def _pickles(folder: Path) -> str:
    """Say what to do about a folder that holds pickles instead; empty if it holds none."""
    names = sorted(path.name for path in folder.glob("*") if path.suffix in PICKLES)
    if not names:
        return ""
    return (
        f"; {_some(names)} may be pickles, which can run any program when they are loaded, and never are; where you "
        "trust them, convert them: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW) of transformers"
    )


def _some(names: list[str]) -> str:
    if not names:
        return "none"
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
