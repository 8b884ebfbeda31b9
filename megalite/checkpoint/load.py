"""Where the weights of a run come from: a checkpoint, a Hugging Face folder, or the seed. Each rank reads only its
slices."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from megalite.checkpoint.tensors import TensorFolder
from megalite.config import ModelConfig
from megalite.engine.native import STATES, ReadState
from megalite.mesh import Axis
from megalite.models.weights import Weight


def from_seed(seed: int, tensor: Axis) -> ReadState:
    """Initial weights, the same on every layout, and moments of zero."""

    def read(weight: Weight, kind: str, start: int, stop: int) -> Tensor:
        if kind.startswith("exp_avg"):
            return torch.zeros(stop - start)
        return weight.read_local(
            lambda w, low, high, columns: w.initial_rows(seed, low, high, columns),
            tensor.rank,
            tensor.size,
            start,
            stop,
        )

    return read


def from_folder(folder: Path, weights: Sequence[Weight], model: ModelConfig, tensor: Axis) -> ReadState:
    """Weights and, where the folder has them, master weights and moments, on whatever layout they were written.

    A plain Hugging Face folder has neither: its weights are then the master weights, and moments start at zero.
    Raises CheckpointError when names or shapes are not those of the model."""
    sources = {"weight": TensorFolder(folder)}
    # Some writers store a tied head a second time.
    sources["weight"].check(weights, ignore=("lm_head.weight",) if model.tie_embeddings else ())
    optimizer = folder / "optimizer"
    for state in STATES:
        if (optimizer / f"{state}.safetensors").exists() or (optimizer / f"{state}.safetensors.index.json").exists():
            sources[state] = TensorFolder(optimizer, state)
            sources[state].check(weights)

    def read(weight: Weight, kind: str, start: int, stop: int) -> Tensor:
        source = sources.get(kind, sources["weight"] if kind == "master" else None)
        if source is None:
            return torch.zeros(stop - start)
        return weight.read_local(
            lambda w, low, high, columns: w.rows_from_hf(source.fetch, low, high, columns),
            tensor.rank,
            tensor.size,
            start,
            stop,
        )

    return read
