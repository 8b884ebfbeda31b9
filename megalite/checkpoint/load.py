"""Where the weights of a run come from: a checkpoint, a Hugging Face folder, or the seed. Each rank reads only its
slices."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from megalite.checkpoint.tensors import TensorFolder
from megalite.config import ModelConfig
from megalite.engine import STATES, ReadState
from megalite.mesh import Axis
from megalite.models.weights import Weight


def from_seed(seed: int, tensor: Axis, device: torch.device | str = "cpu") -> ReadState:
    """Initial weights, the same on every layout, and moments of zero. `device` only says where they are computed."""

    def read(weight: Weight, kind: str, start: int, stop: int) -> Tensor:
        if kind.startswith("exp_avg"):
            return torch.zeros(stop - start)
        return weight.read_local(
            lambda w, low, high, columns: w.initial_rows(seed, low, high, columns, device),
            tensor.rank,
            tensor.size,
            start,
            stop,
        )

    return read


def from_hf(folder: Path, weights: Sequence[Weight], model: ModelConfig, tensor: Axis, seed: int = 0) -> ReadState:
    """The weights of a Hugging Face folder, which are also the master weights, and moments of zero. A head for classes
    that the folder's model has not begins with weights of the seed.

    Raises CheckpointError when names or shapes are not those of the model."""
    return _from_folder(folder, weights, model, tensor, (), from_seed(seed, tensor))


def from_checkpoint(folder: Path, weights: Sequence[Weight], model: ModelConfig, tensor: Axis) -> ReadState:
    """Weights, master weights and moments, on whatever layout they were written.

    Raises CheckpointError when names or shapes are not those of the model."""
    # Written in fp32, the weights are their own master copy.
    states = tuple(s for s in STATES if s != "master" or any((folder / "optimizer").glob("master*")))
    return _from_folder(folder, weights, model, tensor, states)


def _from_folder(
    folder: Path,
    weights: Sequence[Weight],
    model: ModelConfig,
    tensor: Axis,
    states: tuple[str, ...],
    new_head: ReadState | None = None,
) -> ReadState:
    sources = {"weight": TensorFolder(folder)}
    stored = sources["weight"].files
    new: set[str] = set()
    if new_head and model.task != "causal":
        new = {w.name for w in weights if w.name.startswith("head.") and not stored.keys() & set(w.hf)}
    sources["weight"].add_base_prefix(weights[0].hf[0].partition(".")[0] + ".")
    # Some writers store a tied head a second time, and one that is replaced is not needed.
    spare = ("lm_head.weight",) if model.tie_embeddings or new else ()
    sources["weight"].check([weight for weight in weights if weight.name not in new], ignore=spare)
    for state in states:
        sources[state] = TensorFolder(folder / "optimizer", state)
        sources[state].check(weights)

    def read(weight: Weight, kind: str, start: int, stop: int) -> Tensor:
        if new_head and weight.name in new:
            return new_head(weight, kind, start, stop)
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
