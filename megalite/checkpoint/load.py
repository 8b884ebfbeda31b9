"""Where the weights of a run come from: a checkpoint, a Hugging Face folder, or the seed. Each rank reads only its
slices."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megalite.checkpoint.tensors import CheckpointError, TensorFolder
from megalite.checkpoint.unneeded import ends_of, unneeded
from megalite.config import Config, LoraConfig, ModelConfig
from megalite.engine import ReadState
from megalite.errors import ConfigError
from megalite.mesh import Axis
from megalite.models import peft, read_hf_config
from megalite.models.lora import Adapter, adapters_of, merged
from megalite.models.weights import Weight

VALUES = ("weight", "master")
"""Kinds that hold a weight's value. The others are the optimizer's states, which begin at zero."""


def from_seed(seed: int, tensor: Axis, device: torch.device | str = "cpu") -> ReadState:
    """Initial weights, the same on every layout, and moments of zero. `device` only says where they are computed."""

    def read(weight: Weight, kind: str, start: int, stop: int) -> Tensor:
        if kind not in VALUES:
            return torch.zeros(stop - start)
        return weight.read_local(
            lambda w, low, high, columns: w.initial_rows(seed, low, high, columns, device),
            tensor.rank,
            tensor.size,
            start,
            stop,
        )

    return read


def from_hf(
    folder: Path,
    weights: Sequence[Weight],
    model: ModelConfig,
    tensor: Axis,
    seed: int = 0,
    masters: bool = False,
) -> ReadState:
    """The weights of a Hugging Face folder, which are also the master weights, and moments of zero. Of an adapter's
    folder: the weights of the model it is for, with the adapter merged into them in fp32; as weights they are rounded
    to the precision of the model, as master weights not. With `masters`, the master weights are those that a run keeps
    beside its rounded weights, where the folder is its checkpoint. A head for classes that the folder's model has not
    begins with weights of the seed.

    Raises CheckpointError when names or shapes are not those of the model."""
    if peft.is_adapter(folder):
        return _with_adapter(folder, weights, model, tensor, masters)
    if found := sorted(path.name for path in folder.glob(f"{peft.TENSORS}.*")):
        raise CheckpointError(
            f"{folder} holds a whole model and an adapter ({found[0]}); move one of them to a folder of its own, so "
            "that it is clear which one is meant"
        )
    states = _masters_in(folder) if masters else ()
    return _from_folder(folder, weights, model, tensor, states, new_head=from_seed(seed, tensor))


def dtype_of(tensors: Collection[Tensor], folder: Path) -> torch.dtype:
    """Return the precision to compute in with the weights of a Hugging Face folder: theirs. Where some have another
    one, such as fp32 norms among bf16 matrices: that which config.json names, as in transformers, or of the largest
    part."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in tensors:
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
    hf = read_hf_config(folder)
    named = getattr(torch, str(hf.get("dtype") or hf.get("torch_dtype")).removeprefix("torch."), None)
    return named if len(sizes) > 1 and named in sizes else max(sizes, key=lambda kind: sizes[kind])


def from_checkpoint(config: Config, weights: Sequence[Weight], folder: Path, tensor: Axis) -> ReadState:
    """Weights, master weights and the optimizer's states, on whatever layout they were written.

    Raises CheckpointError when names or shapes are not those of the model."""
    return _from_folder(folder, weights, config.model, tensor, _states_in(folder, config))


def _states_in(folder: Path, config: Config) -> tuple[str, ...]:
    return (*_masters_in(folder), *config.optimizer.STATES)


def _masters_in(folder: Path) -> tuple[str, ...]:
    # Written in fp32, the weights are their own master copy.
    return ("master",) if any((folder / "optimizer").glob("master*")) else ()


def for_adapters(
    config: Config, weights: Sequence[Weight], checkpoint: Path | None, tensor: Axis, device: torch.device | str
) -> ReadState:
    """Frozen weights from the model a run of `lora` started from; those of its adapters, and their moments, from a
    checkpoint, the adapter to go on from, or the seed.

    Raises CheckpointError when names or shapes are not those of the model, ConfigError where that is an adapter."""
    assert config.lora is not None
    assert config.model.hf is not None
    if peft.is_adapter(config.model.hf):
        raise ConfigError(
            f"lora: model.hf = {config.model.hf} is an adapter, and PEFT opens no adapter of an adapter; go on from it "
            "with lora.adapter, or merge it into its model first (tools/convert_checkpoint.py)"
        )
    frozen, trained = ([weight for weight in weights if weight.frozen is which] for which in (True, False))
    base = from_hf(config.model.hf, frozen, config.model, tensor)
    if checkpoint:
        own = _from_folder(checkpoint, trained, config.model, tensor, _states_in(checkpoint, config), peft.TENSORS)
    elif config.lora.adapter:
        own = _from_folder(config.lora.adapter, trained, config.model, tensor, (), peft.TENSORS)
    else:
        own = from_seed(config.train.seed, tensor, device)
    return lambda weight, *what: (base if weight.frozen else own)(weight, *what)


def _with_adapter(
    folder: Path, weights: Sequence[Weight], model: ModelConfig, tensor: Axis, masters: bool
) -> ReadState:
    lora = LoraConfig.model_validate(peft.read_lora(folder))
    base = from_hf(peft.base_of(folder), weights, model, tensor)
    adapters = adapters_of(weights, lora)
    rows = {adapter.module: adapter.rows(lora.rank) for adapter in adapters}
    by_base: dict[str, list[Adapter]] = {}
    for adapter in adapters:
        by_base.setdefault(adapter.base.name, []).append(adapter)
    every, states = [row for pair in rows.values() for row in pair], _masters_in(folder) if masters else ()
    factors = _from_folder(folder, every, model, tensor, states, peft.TENSORS)

    def local(read: ReadState, weight: Weight, kind: str = "weight") -> Tensor:
        shape = weight.local_shape(tensor.size)
        return read(weight, kind, 0, torch.Size(shape).numel()).view(shape)

    def read(weight: Weight, kind: str, start: int, stop: int) -> Tensor:
        own: list[tuple[Adapter, Tensor, Tensor]] = []
        for adapter in by_base.get(weight.name, ()):
            a, b = rows[adapter.module]
            own.append((adapter, local(factors, a, "master"), local(factors, b, "master")))
        if kind not in VALUES or not own:
            return base(weight, kind, start, stop)
        before = local(base, weight)
        whole = merged(before, own, lora.scale, tensor.size).flatten()[start:stop]
        return whole if kind == "master" else whole.to(before.dtype)

    return read


def _from_folder(
    folder: Path,
    weights: Sequence[Weight],
    model: ModelConfig,
    tensor: Axis,
    states: tuple[str, ...],
    stem: str = "model",
    new_head: ReadState | None = None,
) -> ReadState:
    sources = {"weight": TensorFolder(folder, stem)}
    stored = sources["weight"].files
    new: set[str] = set()
    if new_head and model.task != "causal":
        new = {w.name for w in weights if w.name.startswith("head.") and not stored.keys() & set(w.hf)}
    source, prefix = sources["weight"], weights[0].hf[0].partition(".")[0] + "."
    spare: set[str] = set()
    if stem == "model":
        apart = {name for weight in weights for name in weight.hf if not name.startswith(prefix)}
        source.add_base_prefix(prefix, {*apart, ends_of(model)[1]})
        spare = unneeded(source, model, head_is_replaced=bool(new))
    source.check([weight for weight in weights if weight.name not in new], ignore=spare)
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
