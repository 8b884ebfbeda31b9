"""Converts a stored model to a plain Hugging Face folder: a checkpoint without its optimizer state,
an adapter merged into its model, a model in another precision, a checkpoint of Megatron-LM.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from megalite.checkpoint import card
from megalite.checkpoint.folder import sentence_files, write_json
from megalite.checkpoint.load import from_hf
from megalite.checkpoint.megatron import find_megatron, open_megatron
from megalite.checkpoint.tensors import CheckpointError, TensorFolder
from megalite.comm.mesh import Mesh
from megalite.config import EMA
from megalite.data.tokenizer_files import copy_files
from megalite.models import (
    copied_hf_config,
    model_config,
    peft,
    read_hf_config,
    to_hf_config,
    weight_table,
)
from megalite.models.weights import Weight
from megalite.utils.resources import fsync
from megalite.utils.tensor_files import save_file

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Model:
    """Gives access to a model, wherever it is stored."""

    config: dict[str, Any]
    """Contents of its config.json."""
    weights: Sequence[Weight]
    read: Callable[[Weight], Tensor]
    """Returns the logical tensor of a weight: whole, whatever the layout it was written in."""
    read_exact: Callable[[Weight], Tensor] | None = None
    """Does the same without rounding: fp32 master weights of a run, an adapter merged in fp32.
    None: `read` rounds nothing."""
    extras: tuple[Path, ...] = ()
    """Folders with a tokenizer and generation_config.json, the first of them preferred."""
    encode: Callable[[Weight, dict[str, Tensor]], dict[str, Tensor]] | None = None
    """Returns what is written in place of the Hugging Face tensors of a weight; None: they are."""


def open_source(path: Path, vocab_size: int | None = None, ema: bool = False) -> Model:
    """Open a Hugging Face folder, a checkpoint, a PEFT adapter with its model, or a checkpoint of
    Megatron-LM.

    `vocab_size` is for the last one only: its vocabulary without padding. With `ema`, the weights
    are the average that a checkpoint holds beside them. Names and shapes are checked. Raises
    ConfigError or CheckpointError."""
    if (path / "config.json").is_file() or peft.is_adapter(path):
        return _open_hf(path, ema)
    if ema:
        raise CheckpointError(
            f"{path} holds no average of weights; a checkpoint of a run with optimizer.ema does"
        )
    if (megatron := find_megatron(path)) is None:
        raise CheckpointError(
            f"{path} is none of: a folder with a config.json or an adapter_config.json, a checkpoint of Megatron-LM's"
        )
    model, weights, read = open_megatron(megatron, vocab_size)
    return Model(to_hf_config(model), weights, read)


def _open_hf(folder: Path, ema: bool) -> Model:
    if ema and not any((folder / "optimizer").glob(f"{EMA}[.-]*")):
        raise CheckpointError(
            f"{folder} holds no average of weights; a checkpoint of a run with optimizer.ema does"
        )
    model = model_config({"hf": str(folder)})
    weights = weight_table(model)
    # Two readers of one folder: the rounded weights, and the fp32 ones beside them in optimizer/.
    stored = from_hf(folder, weights, model, Mesh.alone())
    exact = from_hf(folder, weights, model, Mesh.alone(), exact=EMA if ema else "master")
    extras: tuple[Path, ...] = (folder,)
    if peft.is_adapter(folder):
        extras += (peft.base_of(folder),)

    def read(weight: Weight) -> Tensor:
        found = stored(weight, "weight", 0, weight.numel).view(weight.shape)
        return read_exact(weight).to(found.dtype) if ema else found

    def read_exact(weight: Weight) -> Tensor:
        return exact(weight, EMA if ema else "master", 0, weight.numel).view(weight.shape)

    return Model(copied_hf_config(read_hf_config(folder), model), weights, read, read_exact, extras)


def check_new(folder: Path) -> None:
    """Raise CheckpointError if there is something at the path of a folder to write. What takes long
    before `write_model` calls it first."""
    if folder.exists():
        raise CheckpointError(f"{folder} exists; name a new folder")


def write_model(
    model: Model,
    folder: Path,
    dtype: str | None = None,
    shard_bytes: int = 5 * 10**9,
    console: Console | None = None,
) -> None:
    """Write `model` to the new Hugging Face folder `folder`, which appears only when complete.

    Files have at most `shard_bytes`, unless a single weight is larger. `dtype` is one of DTYPES;
    None leaves each weight as it is. `console` shows the progress. Raises CheckpointError if the
    folder exists or cannot be written, or a weight exceeds the range of `dtype`."""
    check_new(folder)
    temporary = folder.with_name(f"{folder.name}.tmp")
    try:
        # Of an earlier conversion that did not come to its end.
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        # Before the weights, which take long: a run may prune the checkpoint meanwhile. Their files
        # are open already.
        beside = [name for source in model.extras for name in sentence_files(source)]
        copy_files(model.extras, temporary, "generation_config.json", *beside)
        _copy_card(model.extras, temporary)
        found = _write_tensors(
            model, temporary, DTYPES[dtype] if dtype else None, shard_bytes, console
        )
        name = str(found).removeprefix("torch.")
        # "torch_dtype" is the key that every version of transformers and vLLM reads.
        write_json(temporary / "config.json", model.config | {"torch_dtype": name})
        # Open it as a reader will: the tensors must be those that its own config.json asks for.
        written = model_config({"hf": str(temporary)})
        table = weight_table(written)
        copies = [copy for weight in table for copy in weight.copies]
        TensorFolder(temporary).check(table, ignore=copies)
        if not (temporary / card.NAME).is_file():
            card.write_plain_card(temporary, written)
        fsync(temporary)
        temporary.rename(folder)
    except OSError as error:
        raise CheckpointError(f"{folder} could not be written: {error}") from None
    finally:
        # What a failed attempt has written would fill a disk that is full already.
        shutil.rmtree(temporary, ignore_errors=True)


def _copy_card(extras: Sequence[Path], folder: Path) -> None:
    """Copy the model card of the first of `extras`, but not that of an adapter: it says how the
    adapter is opened, which is merged by now."""
    for source in extras[:1]:
        if (source / card.NAME).is_file() and not peft.is_adapter(source):
            shutil.copyfile(source / card.NAME, folder / card.NAME)


def _write_tensors(
    model: Model,
    folder: Path,
    dtype: torch.dtype | None,
    shard_bytes: int,
    console: Console | None,
) -> torch.dtype:
    """Write the weights, with an index if there are several files. Returns the precision of most
    bytes."""
    shards: list[list[str]] = []
    sizes: dict[torch.dtype, int] = {}
    # The names hold the number of files, which is known only at the end: until then they are called
    # N.part.
    for shard in _shards(model, dtype, shard_bytes, console):
        path = folder / f"{len(shards)}.part"
        save_file(shard, path, metadata={"format": "pt"})
        fsync(path)
        shards.append(list(shard))
        for tensor in shard.values():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{number}.part").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = sum(sizes.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / "model.safetensors.index.json", index)
    # Numbers of quantised weights are in no precision that a model computes in.
    computed = [kind for kind in sizes if kind.is_floating_point and kind.itemsize > 1]
    return max(computed, key=lambda kind: sizes[kind])


def _shards(
    model: Model,
    dtype: torch.dtype | None,
    shard_bytes: int,
    console: Console | None,
) -> Iterator[dict[str, Tensor]]:
    """Yield Hugging Face tensors, as many at a time as fit into a file. Raises CheckpointError for
    what fp16 cannot hold."""
    shard: dict[str, Tensor] = {}
    shown = console is not None and console.is_terminal
    # Exact weights are rounded once, to the wanted precision; rounded ones would be rounded twice.
    read = model.read_exact if dtype and model.read_exact else model.read
    for weight in track(model.weights, "weights", console=console, disable=not shown):
        logical = read(weight)
        written = logical.to(weight.dtype_in(dtype) if dtype else logical.dtype)
        # bf16 has fp32's range and only loses digits; fp16 ends at 65,504.
        if dtype == torch.float16 and not torch.equal(written.isinf(), logical.isinf()):
            largest = logical.abs().max().item()
            raise CheckpointError(
                f"{weight.name} goes up to {largest:.3g}, which fp16 cannot hold; take bf16 or fp32"
            )
        tensors = weight.to_hf(written)
        tensors |= weight.copies_of(tensors)
        if model.encode:
            tensors = model.encode(weight, tensors)
        if shard and _bytes_of(shard) + _bytes_of(tensors) > shard_bytes:
            yield shard
            shard = {}
        # Cloned, so that slices of a fused weight do not share its storage in the file.
        shard |= {name: tensor.clone() for name, tensor in tensors.items()}
    yield shard


def _bytes_of(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
