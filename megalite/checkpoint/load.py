"""Reads the initial weights of a run: from a checkpoint, a Hugging Face folder, or the seed. Each
rank reads only its slices.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalite.checkpoint.tensors import CheckpointError, TensorFolder
from megalite.checkpoint.unneeded import ends_of, unneeded
from megalite.comm.mesh import Mesh
from megalite.config import EMA, Config, LoraConfig, ModelConfig
from megalite.engine import ReadState
from megalite.engine.optimizers import SummingOptimizer
from megalite.engine.quantised import in_few_bits
from megalite.errors import ConfigError
from megalite.models import peft, read_hf_config
from megalite.models.heads import lacking_head
from megalite.models.lora import Adapter, adapters_of, merged
from megalite.models.projections import PREFIX
from megalite.models.sharding import RowReader, read_local
from megalite.models.weights import Weight
from megalite.utils.outside import shown
from megalite.utils.resources import read_yaml

OpenModel = Callable[..., ReadState]
"""Opens the weights of a Hugging Face folder, as `from_hf` does."""
VALUES = ("weight", "master", EMA)
"""Kinds that hold a weight's value. The others are the optimizer's states, which begin at zero."""


def from_seed(seed: int, mesh: Mesh, device: torch.device | str = "cpu") -> ReadState:
    """Return a reader of initial weights from `seed`, the same on every layout, and of zero
    moments.

    `mesh` says which part of each a rank holds; `device` is where they are computed."""

    # A reader takes (weight, kind, start, stop): elements start..stop of this rank's part of it,
    # flattened.
    def read(weight: Weight, kind: str, start: int, stop: int) -> Tensor:
        # Whatever is asked for is drawn by its place in the logical tensor: no rank draws what it
        # does not hold.
        if kind not in VALUES:
            return torch.zeros(stop - start)
        return _local(
            weight, lambda w, *rows: w.initial_rows(seed, *rows, device), mesh, start, stop
        )

    return read


def from_hf(
    folder: Path,
    weights: Sequence[Weight],
    model: ModelConfig,
    mesh: Mesh,
    seed: int | None = None,
    exact: str | None = None,
) -> ReadState:
    """Return a reader of the `weights` of a Hugging Face `folder`, which are also the master
    weights, and zero moments.

    For the folder of an adapter, it reads the weights of the model with the adapter merged in fp32:
    rounded to the model's precision as weights, exact as master weights. With `exact`, the master
    weights are those that a checkpoint keeps beside its rounded weights: "master", or "ema", their
    average. A head for classes, or for masked tokens, that the folder's model lacks is initialized
    from `seed`; without one it is an error. `model` is the model to load into, `mesh` says which
    part of each weight a rank holds.

    Raises CheckpointError if names or shapes are not those of the model."""
    if peft.is_adapter(folder):
        return _with_adapter(folder, weights, model, mesh, exact)
    # An adapter without its adapter_config.json beside a model: either may be what was meant.
    if found := sorted(path.name for path in folder.glob(f"{peft.TENSORS}.*")):
        raise CheckpointError(
            f"{folder} holds a whole model and an adapter ({found[0]}); move one of them to a folder of its own, so "
            "that it is clear which one is meant"
        )
    # Kinds of state that the folder has, each for all weights.
    states = dict.fromkeys(_files_of(folder, [exact]) if exact else (), weights)
    new_head = None if seed is None else from_seed(seed, mesh)
    return _from_folder(folder, weights, model, mesh, states, new_head=new_head)


def dtype_of(tensors: Collection[Tensor], folder: Path) -> torch.dtype:
    """Return the precision to compute in with the weights of a Hugging Face folder.

    It is that of the tensors. If they have several, such as fp32 norms among bf16 matrices, it is
    the one config.json names, as in transformers, or else that of most bytes."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in tensors:
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
    hf = read_hf_config(folder)
    name = str(hf.get("dtype") or hf.get("torch_dtype")).removeprefix("torch.")
    named = getattr(torch, name, None)
    if len(sizes) > 1 and named in sizes:
        return named
    return max(sizes, key=lambda kind: sizes[kind])


def from_checkpoint(
    config: Config, weights: Sequence[Weight], folder: Path, mesh: Mesh
) -> ReadState:
    """Return a reader of the weights, master weights and optimizer states of a checkpoint, whatever
    layout it was written on.

    `folder` is the checkpoint, `weights` the table of the config's model, `mesh` says which part of
    each a rank holds. Raises CheckpointError if names or shapes are not those of the model."""
    read = _from_folder(folder, weights, config.model, mesh, _with_masters(folder, config, weights))
    return _beginning(read, states_that_begin(folder, config, weights))


def _beginning(read: ReadState, begin: Collection[str]) -> ReadState:
    """Return a reader whose optimizer states are zero of the weights named in `begin`."""

    def zero_or_read(weight: Weight, kind: str, start: int, stop: int) -> Tensor:
        if kind not in VALUES and weight.name in begin:
            return torch.zeros(stop - start)
        return read(weight, kind, start, stop)

    return zero_or_read


def stored_config(checkpoint: Path) -> dict[str, Any] | None:
    """Return the config a checkpoint was saved under, or None if it has none. Raises
    CheckpointError."""
    file = checkpoint / "config.yaml"
    if not file.exists():
        return None
    try:
        values = read_yaml(file)
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    # Every section is a mapping, but for the list of hooks.
    sections = [section for name, section in values.items() if name != "hooks"]
    if not values or not all(isinstance(section, dict | None) for section in sections):
        raise CheckpointError(f"{file} is no config of a run, but {shown(values)}")
    return values


UNLESS_SET: Mapping[str, Any] = {"name": "adamw", "groups": [], EMA: None}
"""Settings of the optimizer that decide which states are kept, and their defaults."""


def states_held(
    folder: Path, config: Config, trained: Sequence[Weight]
) -> dict[str, Sequence[Weight]]:
    """Return for each optimizer state of `config` the weights that a checkpoint holds it for,
    `trained` being all; as rows of the state, whose shape may be another.

    Those are the ones that need it, unless the optimizer is another one since: then what fits is
    carried over."""
    states = config.optimizer.all_states
    before = (stored_config(folder) or {}).get("optimizer") or {}
    now = config.optimizer.model_dump(mode="json")
    # Another optimizer than the checkpoint's: look at what is there, and begin the rest at zero.
    # With the same one a missing file is damage, and must be an error.
    if any(before.get(key, default) != now[key] for key, default in UNLESS_SET.items()):
        found = {
            state: TensorFolder(folder / "optimizer", state).files
            for state in _files_of(folder, states)
        }
        # Of a fused weight any of its Hugging Face tensors: `check` will ask for the others.
        held = {
            state: [w for w in trained if files.keys() & set(w.hf)]
            for state, files in found.items()
        }
    else:
        needed = {weight.name: config.optimizer.states_of(weight) for weight in trained}
        held = {
            state: [weight for weight in trained if state in needed[weight.name]]
            for state in states
        }
    row = config.optimizer.state_row
    # There are no files of a state that no weight has, such as AdamW's beside Muon in a LoRA run.
    return {state: [row(weight, state) for weight in some] for state, some in held.items() if some}


def states_that_begin(folder: Path, config: Config, trained: Sequence[Weight]) -> set[str]:
    """Return the weights of `trained` whose optimizer states begin at zero, by name: a checkpoint
    does not have all of them.

    These begin together, since one count of updates corrects all of them: those of a weight; under
    an optimizer that looks at all of its weights at once, and under DeepSpeed, those of all."""
    optimizer = config.optimizer
    members = {name: member.build() for name, member in optimizer.members().items()}
    held = {
        state: {row.name for row in rows}
        for state, rows in states_held(folder, config, trained).items()
    }

    def together(weight: Weight) -> str:
        if config.parallel.engine == "deepspeed":
            return "deepspeed"
        name = optimizer.treatment(weight).optimizer
        return name if isinstance(members.get(name), SummingOptimizer) else f"of {weight.name}"

    incomplete = {
        together(weight)
        for weight in trained
        for state in optimizer.states_of(weight)
        if state != EMA and weight.name not in held.get(state, ())
    }
    return {weight.name for weight in trained if together(weight) in incomplete}


def states_begun(
    folder: Path, state: Mapping[str, Any], config: Config, trained: Sequence[Weight]
) -> dict[str, int]:
    """Return after how many updates of a run each weight's optimizer states began, by its first
    Hugging Face name; 0 for those left out. `state` is the train_state.json of the checkpoint
    `folder`, from which the run goes on."""
    found = {
        name: begun["updates"]
        for begun in state.get("states_begun", ())
        for name in begun["weights"]
    }
    begin = states_that_begin(folder, config, trained)
    updates = state.get("updates", state["step"])
    found |= {weight.hf[0]: updates for weight in trained if weight.name in begin}
    return {name: number for name, number in found.items() if number}


def _with_masters(
    folder: Path, config: Config, trained: Sequence[Weight]
) -> dict[str, Sequence[Weight]]:
    return dict.fromkeys(_masters_in(folder), trained) | states_held(folder, config, trained)


def _files_of(folder: Path, names: Sequence[str]) -> tuple[str, ...]:
    """Return those of the kinds `names` of which a checkpoint has files."""
    return tuple(name for name in names if any((folder / "optimizer").glob(f"{name}[.-]*")))


def _masters_in(folder: Path) -> tuple[str, ...]:
    # Written in fp32, the weights are their own master copy.
    return _files_of(folder, ["master"])


def for_adapters(
    config: Config,
    weights: Sequence[Weight],
    checkpoint: Path | None,
    mesh: Mesh,
    device: torch.device | str,
    open_model: OpenModel = from_hf,
) -> ReadState:
    """Return a reader for a LoRA run: frozen weights from the model it started from, adapters from
    elsewhere.

    Adapters and their moments come from `checkpoint`; without one, from `config.lora.adapter` or
    the seed. `weights` is the table with the adapters, `mesh` says which part of each a rank holds;
    `device` computes initial weights, `open_model` opens the frozen model. Raises CheckpointError
    if names or shapes are not those of the model, ConfigError if that is an adapter itself."""
    assert config.lora is not None
    assert config.model.hf is not None
    if peft.is_adapter(config.model.hf):
        raise ConfigError(
            f"lora: model.hf = {config.model.hf} is an adapter, and PEFT opens no adapter of an adapter; go on from it "
            "with lora.adapter, or merge it into its model first (`megalite convert`)"
        )
    frozen = [weight for weight in weights if weight.frozen]
    trained = [weight for weight in weights if not weight.frozen]
    # Frozen weights are in no checkpoint of a LoRA run; match.py has compared the files' digests.
    base = open_model(config.model.hf, frozen, config.model, mesh)
    if checkpoint:
        states = _with_masters(checkpoint, config, trained)
        own = _from_folder(checkpoint, trained, config.model, mesh, states, peft.TENSORS)
        own = _beginning(own, states_that_begin(checkpoint, config, trained))
    elif config.lora.adapter:
        own = _from_folder(config.lora.adapter, trained, config.model, mesh, {}, peft.TENSORS)
    else:
        own = from_seed(config.train.seed, mesh, device)

    new = not (checkpoint or config.lora.adapter) and config.lora.dora
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    begin = _first_magnitudes(base, frozen, config.lora, mesh, dtype) if new else {}

    def read(weight: Weight, kind: str, start: int, stop: int) -> Tensor:
        source = base if weight.frozen else begin.get(weight.name, own)
        return source(weight, kind, start, stop)

    return read


def _first_magnitudes(
    base: ReadState, frozen: Sequence[Weight], lora: LoraConfig, mesh: Mesh, dtype: torch.dtype
) -> dict[str, ReadState]:
    """Return readers of the magnitudes that DoRA begins with, by the names of their rows: the norms
    of the rows of what is multiplied by, which is in few bits where `lora` says so, and in
    `dtype`."""

    def reader(adapter: Adapter) -> ReadState:
        def read(weight: Weight, kind: str, start: int, stop: int) -> Tensor:
            if kind not in VALUES:
                return torch.zeros(stop - start)
            row = adapter.base
            # A weight that no rank shares is read whole.
            whole = base(replace(row, shard=None), "weight", 0, row.numel).view(row.shape)
            if row.quantised is not None:
                numbers, place = in_few_bits(row, whole)
                whole = numbers.part(place, (0, row.shape[1])).rows(slice(None))
            norms = whole[adapter.start : adapter.stop].to(dtype).float().norm(dim=1)
            return _local(weight, lambda _, low, high, __: norms[low:high], mesh, start, stop)

        return read

    return {adapter.rows(lora)[-1].name: reader(adapter) for adapter in adapters_of(frozen, lora)}


def _with_adapter(
    folder: Path,
    weights: Sequence[Weight],
    model: ModelConfig,
    mesh: Mesh,
    exact: str | None,
) -> ReadState:
    """Return a reader that merges the adapter in `folder` into the weights of its model, slice by
    slice."""
    lora = peft.lora_of(folder)
    base = from_hf(peft.base_of(folder), weights, model, mesh)
    # A fused weight may have several adapters, one for each of the Hugging Face modules in it.
    adapters = adapters_of(weights, lora)
    rows = {adapter.module: adapter.rows(lora) for adapter in adapters}
    by_base: dict[str, list[Adapter]] = {}
    for adapter in adapters:
        by_base.setdefault(adapter.base.name, []).append(adapter)
    every = [row for some in rows.values() for row in some]
    states = dict.fromkeys(_files_of(folder, [exact]) if exact else (), every)
    factors = _from_folder(folder, every, model, mesh, states, peft.TENSORS)
    # DoRA divides a row by its norm, which a rank that has a part of the row does not know: there
    # the whole weight is merged, and cut afterwards.
    whole = lora.dora and mesh.tensor.size > 1

    def local(read: ReadState, weight: Weight, kind: str = "weight") -> Tensor:
        """Read this rank's part of a weight, in its shape."""
        if whole:
            return read(replace(weight, shard=None), kind, 0, weight.numel).view(weight.shape)
        shape = weight.local_shape(*mesh.fold_of(weight).cut)
        return read(weight, kind, 0, torch.Size(shape).numel()).view(shape)

    def read(weight: Weight, kind: str, start: int, stop: int) -> Tensor:
        own = [
            (adapter, [local(factors, row, exact or "master") for row in rows[adapter.module]])
            for adapter in by_base.get(weight.name, ())
        ]
        if kind not in VALUES or not own:
            return base(weight, kind, start, stop)
        before = local(base, weight)
        # The whole shard is merged for a slice of it: a product of two factors has no cheaper
        # slice.
        found = merged(before, own, lora.scale, 1 if whole else mesh.tensor.size)
        if whole:
            found = _local(weight, partial(_rows_of, found), mesh, start, stop)
        else:
            found = found.flatten()[start:stop]
        return found.to(before.dtype) if kind == "weight" else found

    return read


def _rows_of(
    whole: Tensor, weight: Weight, low: int, high: int, columns: tuple[int, int] | None
) -> Tensor:
    """Return some rows of a whole matrix, as a `RowReader`."""
    assert columns is not None
    return whole[low:high, slice(*columns)]


def _from_folder(
    folder: Path,
    weights: Sequence[Weight],
    model: ModelConfig,
    mesh: Mesh,
    states: Mapping[str, Sequence[Weight]],
    stem: str = "model",
    new_head: ReadState | None = None,
) -> ReadState:
    """Return a reader of the files STEM.safetensors in `folder`, and of `states` in its subfolder
    optimizer/, each with the weights that have it there; it is zero for others."""
    source = TensorFolder(folder, stem)
    sources = {"weight": source}
    new: set[str] = set()  # weights that the folder lacks: those of a head, and projections
    spare: set[str] = set()
    if stem == "model":
        source.end_names(model.OLD_ENDS)
        source.start_names(model.OLD_STARTS)
        prefix = weights[0].hf[0].partition(".")[0] + "."
        # A head's own names, such as lm_head.weight, which never have the base model's prefix.
        apart = {name for weight in weights for name in weight.hf if not name.startswith(prefix)}
        _, head = ends_of(model)
        source.add_base_prefix(prefix, {*apart, head})
        new = lacking_head(model, weights, source.files) if new_head else new
        spare = unneeded(source, model, bool(new), mesh.world)
        if new_head:  # which a run draws as well
            new |= {w.name for w in weights if w.hf[0].startswith(PREFIX)} - {
                w.name for w in weights if w.hf[0] in source.files
            }
    # All is checked before anything is read: a mistake must not cost a start of minutes.
    stored = {
        weight.name: weight.as_stored(source.files) for weight in weights if weight.name not in new
    }
    source.check([*stored.values()], ignore=spare)
    holders: dict[str, set[str]] = {}
    for state, held in states.items():
        sources[state] = TensorFolder(folder / "optimizer", state)
        sources[state].check(held)
        holders[state] = {weight.name for weight in held}

    def read(weight: Weight, kind: str, start: int, stop: int) -> Tensor:
        if new_head and weight.name in new:
            return new_head(weight, kind, start, stop)
        if kind in VALUES and weight.name not in holders.get(kind, ()):
            # An average begins as the exact weights, and weights that nothing is kept beside are
            # exact.
            kind = (
                "master" if kind == EMA and weight.name in holders.get("master", ()) else "weight"
            )
        elif weight.name not in holders.get(kind, ()):
            # An optimizer state that the checkpoint does not have begins at zero.
            return torch.zeros(stop - start)
        fetch = sources[kind].fetch
        if kind == "weight":  # states are megalite's own, by the names that it writes
            weight = weight.as_stored(source.files)
        return _local(weight, lambda w, *rows: w.rows_from_hf(fetch, *rows), mesh, start, stop)

    return read


def _local(weight: Weight, read_rows: RowReader, mesh: Mesh, start: int, stop: int) -> Tensor:
    """Return elements [start, stop) of this rank's part of a weight."""
    fold = mesh.fold_of(weight)
    return read_local(
        weight, read_rows, fold.holders.rank, fold.tensor.size, start, stop, fold.expert.size
    )
