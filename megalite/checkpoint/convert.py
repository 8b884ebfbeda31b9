"""From whatever a model is stored as to a Hugging Face folder of it alone: a checkpoint without its optimizer state, an
adapter merged into its model, a model in another precision, a checkpoint of Megatron-LM's."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor

from megalite.checkpoint.folder import write_json
from megalite.checkpoint.load import from_hf
from megalite.checkpoint.megatron import find_megatron, open_megatron
from megalite.checkpoint.tensors import CheckpointError, TensorFolder
from megalite.data.tokenizer_files import copy_files
from megalite.mesh import ALONE
from megalite.models import copied_hf_config, model_config, peft, read_hf_config, to_hf_config, weight_table
from megalite.models.weights import Weight
from megalite.resources import fsync

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Model:
    """A model wherever it is stored."""

    config: dict[str, Any]
    """Its config.json."""
    weights: Sequence[Weight]
    read: Callable[[Weight], Tensor]
    """The logical tensor of a weight."""
    read_exact: Callable[[Weight], Tensor] | None = None
    """As `read`, but not rounded: with an adapter merged in fp32, and the fp32 master weights of a run. None: `read`
    rounds nothing."""
    extras: tuple[Path, ...] = ()
    """Folders with a tokenizer and generation_config.json; what the first lacks may be in the second."""


def open_source(path: Path, vocab_size: int | None = None) -> Model:
    """A Hugging Face folder, a checkpoint, a PEFT adapter with its model, or a checkpoint of Megatron-LM's, for which
    alone `vocab_size` is: its vocabulary without padding. Names and shapes are checked.

    Raises ConfigError or CheckpointError."""
    if (path / "config.json").is_file() or peft.is_adapter(path):
        return _open_hf(path)
    if (megatron := find_megatron(path)) is None:
        raise CheckpointError(
            f"{path} is none of: a folder with a config.json or an adapter_config.json, a checkpoint of Megatron-LM's"
        )
    model, weights, read = open_megatron(megatron, vocab_size)
    return Model(to_hf_config(model), weights, read)


def _open_hf(folder: Path) -> Model:
    model = model_config({"hf": str(folder)})
    weights = weight_table(model)
    stored = from_hf(folder, weights, model, ALONE)
    exact = from_hf(folder, weights, model, ALONE, masters=True)
    extras = (folder, *([peft.base_of(folder)] if peft.is_adapter(folder) else []))

    def read(weight: Weight) -> Tensor:
        return stored(weight, "weight", 0, weight.numel).view(weight.shape)

    def read_exact(weight: Weight) -> Tensor:
        return exact(weight, "master", 0, weight.numel).view(weight.shape)

    return Model(copied_hf_config(read_hf_config(folder), model), weights, read, read_exact, extras)


def write_model(
    model: Model, folder: Path, dtype: str | None = None, shard_bytes: int = 5 * 10**9, console: Console | None = None
) -> None:
    """Write a new Hugging Face folder, in files of at most `shard_bytes` where no single weight is larger. `dtype` is
    one of DTYPES; None leaves each weight as it is. A folder is there when it is complete.

    Raises CheckpointError where it exists, cannot be written, or a weight is more than `dtype` can hold."""
    if folder.exists():
        raise CheckpointError(f"{folder} exists; name a new folder")
    temporary = folder.with_name(f"{folder.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        # First: reading the weights, whose files are open, may take as long as a run needs to remove a checkpoint.
        copy_files(model.extras, temporary, "generation_config.json")
        found = _write_tensors(model, temporary, DTYPES[dtype] if dtype else None, shard_bytes, console)
        name = str(found).removeprefix("torch.")
        # The name that every version of transformers and vLLM reads.
        write_json(temporary / "config.json", model.config | {"torch_dtype": name})
        # As whoever opens it will: what is there is what its own config.json asks for.
        TensorFolder(temporary).check(weight_table(model_config({"hf": str(temporary)})))
        fsync(temporary)
        temporary.rename(folder)
    except OSError as error:
        raise CheckpointError(f"{folder} could not be written: {error}") from None


def _write_tensors(
    model: Model, folder: Path, dtype: torch.dtype | None, shard_bytes: int, console: Console | None
) -> torch.dtype:
    """Returns the precision of the largest part of them."""
    shards: list[list[str]] = []
    sizes: dict[torch.dtype, int] = {}
    for shard in _shards(model, dtype, shard_bytes, console):
        save_file(shard, folder / f"{len(shards)}.part", metadata={"format": "pt"})
        fsync(folder / f"{len(shards)}.part")
        shards.append(list(shard))
        for tensor in shard.values():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        (folder / f"{number}.part").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / "model.safetensors.index.json", index)
    return max(sizes, key=lambda kind: sizes[kind])


def _shards(
    model: Model, dtype: torch.dtype | None, shard_bytes: int, console: Console | None
) -> Iterator[dict[str, Tensor]]:
    """Hugging Face tensors, as many as fit into a file."""
    shard: dict[str, Tensor] = {}
    shown = console is not None and console.is_terminal
    # What is asked for in a precision is rounded once, to that.
    read = model.read_exact if dtype and model.read_exact else model.read
    for weight in track(model.weights, "weights", console=console, disable=not shown):
        logical = read(weight)
        written = logical.to(dtype or logical.dtype)
        if dtype == torch.float16 and not torch.equal(written.isinf(), logical.isinf()):
            raise CheckpointError(
                f"{weight.name} goes up to {logical.abs().max().item():.3g}, which fp16 cannot hold; take bf16 or fp32"
            )
        tensors = weight.to_hf(written)
        size = sum(tensor.nbytes for tensor in tensors.values())
        if shard and sum(tensor.nbytes for tensor in shard.values()) + size > shard_bytes:
            yield shard
            shard = {}
        # What is cut out of a larger tensor would be written as often as there are cuts.
        shard |= {name: tensor.clone() for name, tensor in tensors.items()}
    yield shard
