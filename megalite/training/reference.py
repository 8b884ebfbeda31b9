"""Log-probabilities of preference data under the model a run starts from: computed once, on the
run's own layout, and kept in the run's folder, so that no second model is held."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megalite.comm.collectives import all_agree, all_reduce
from megalite.comm.mesh import Mesh
from megalite.config import Config
from megalite.data.dataset import RowSource, Split
from megalite.data.loader import Loader, MicroBatch
from megalite.data.mixture import Mixture
from megalite.data.order import Phase, PhasedOrder
from megalite.parallel.stage import Inputs
from megalite.runtime.activity import NOW
from megalite.training.objectives import DPO, Reference, sum_by_document
from megalite.training.parts import RankModel, forward
from megalite.training.run import Data, Run, make_loader
from megalite.utils.changes import Change, changes
from megalite.utils.files import replacing
from megalite.utils.tensor_files import save_file

Forward = Callable[[list[MicroBatch]], Iterable[tuple[Tensor, Inputs, MicroBatch]]]


def reference_parts(
    mixtures: Mapping[Split, Mixture], config: Config, base: Mapping[str, str]
) -> dict[str, Any]:
    """Return all that decides the log-probabilities: settings of `config`, the content of the
    starting model as far as it is there (`base`, from `base_files`), and that of the data in
    `mixtures`."""
    contents = {
        f"data.{split}": {
            name: source.fingerprint()
            for name, source in zip(mixture.names, mixture.sources, strict=True)
        }
        for split, mixture in mixtures.items()
    }
    adapter = str(config.lora.adapter) if config.lora else None
    start: dict[str, Any] = {
        "model.hf": str(config.model.hf),
        "lora.adapter": adapter,
        "lora.quantize_base": config.lora and config.lora.quantize_base,
        "train.precision": config.train.precision,
    }
    for name, given in (("fp8", config.train.fp8), ("fake_quantize", config.train.fake_quantize)):
        if given:
            start[f"train.{name}"] = given.model_dump(mode="json")
    return start | contents | {"weights": dict(base) or None}


def _key_of(parts: Mapping[str, Any]) -> str:
    """Return the digest that files of older versions have in place of the parts."""
    data = [
        [name.removeprefix("data."), *found.values()]
        for name, found in parts.items()
        if name.startswith("data.")
    ]
    start = (
        parts["model.hf"]
        if parts["lora.adapter"] is None
        else [parts["model.hf"], parts["lora.adapter"]]
    )
    identity = json.dumps([data, start, parts["train.precision"]])
    return hashlib.sha256(identity.encode()).hexdigest()[:32]


def compute_reference(
    mixture: Mixture, mesh: Mesh, open_loader: Callable[[Mixture], Loader], forward: Forward
) -> Reference:
    """Compute the log-probabilities by a pass of `forward` over every sample of every source, which
    `open_loader` reads. All ranks call it, and get all of them."""
    tables = []
    for name, source in zip(mixture.names, mixture.sources, strict=True):
        assert isinstance(source, RowSource)
        count = source.num_samples
        # Each sample of the source once, in its own order, whatever order the run draws them in.
        alone = Mixture(
            [source], [name], PhasedOrder([count], [Phase(0, [1.0])], 0, "sequential"), mixture.view
        )
        # Padding counts as one more document, and documents are counted in pairs.
        table = torch.zeros(count, source.most_documents + 2)
        with open_loader(alone) as loader:
            for _ in range(-(-count // loader.global_batch_size)):
                for losses_BT, micro, read in forward(next(loader)):
                    assert micro.places.document_BT is not None
                    found = -sum_by_document(
                        losses_BT, micro.places.document_BT, table.shape[1]
                    ).cpu()
                    is_new = read.samples < count  # the last batch begins again
                    table[read.samples[is_new]] = found[is_new]
        # A rank has the rows of its own samples, and its context rank's part of each; the rest of
        # its table is 0. So the sum over ranks is the whole table.
        on_device = table.to(mesh.device)
        tables.append(all_reduce(all_reduce(on_device, mesh.replicas), mesh.pipeline).cpu())
    return Reference(mixture, tables)


def write_references(
    path: Path, parts: Mapping[str, Any], references: Mapping[Split, Reference]
) -> None:
    """Write the log-probabilities, with the `parts` that decided them, to `path`; either all of the
    file is new or none."""
    tensors = {
        f"{split}.{n}": table
        for split, found in references.items()
        for n, table in enumerate(found.tables)
    }
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"parts": json.dumps(parts)})


def read_references(
    path: Path, parts: Mapping[str, Any], mixtures: Mapping[Split, Mixture]
) -> tuple[dict[Split, Reference] | None, list[Change]]:
    """Return the log-probabilities at `path` that were written for exactly these `parts`; or None,
    and what has changed since others were written. `mixtures` are what they belong to."""
    # A damaged file counts as none.
    damaged = (
        OSError,
        SafetensorError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        RecursionError,
    )
    with contextlib.suppress(*damaged), safe_open(path, framework="pt") as file:
        stored = file.metadata() or {}
        if "parts" not in stored:
            differs = (
                []
                if stored.get("key") == _key_of(parts)
                else [Change("what they are of", stored.get("key"), None)]
            )
        else:
            differs = [
                each
                for each in changes(json.loads(stored["parts"]), parts)
                if not _is_moved(each, stored, parts)
            ]
        if differs:
            return None, differs
        return (
            {
                split: Reference(
                    mixture, [file.get_tensor(f"{split}.{n}") for n in range(len(mixture.sources))]
                )
                for split, mixture in mixtures.items()
            },
            [],
        )
    return None, []


def _is_moved(change: Change, stored: Mapping[str, str], parts: Mapping[str, Any]) -> bool:
    """Return whether the same weights are elsewhere now, or are gone."""
    then = json.loads(stored["parts"])["weights"]
    if change.key == "model.hf":
        return bool(parts["weights"]) and parts["weights"] == then
    return change.key.startswith("weights") and not parts["weights"]


def prepare_references(run: Run, parts: RankModel, data: Data) -> None:
    """Give the objective the starting model's log-probabilities of every pair: from the run's
    folder, or computed on this layout and kept there."""
    assert isinstance(parts.objective, DPO)
    mixtures = {split: mixture for split, mixture in data.items() if mixture}
    path = run.config.run.folder / "reference.safetensors"
    made_of = reference_parts(mixtures, run.config, run.storage.base_files(run.config))
    found, changed = read_references(path, made_of, mixtures)
    # Ranks may see different files on a shared disk: all compute, or none.
    if not all_agree(found is not None, run.mesh) or found is None:
        NOW.begin("reference", NOW.step)
        run.say(
            "comparing with the starting model: its log-probabilities of all pairs are computed once"
        )
        if changed:
            run.say(f"again, since other ones were kept: {'; '.join(map(str, changed))}")
        # The trained model stands in for its own reference; `train_from` loads the run's weights
        # afterwards.
        parts.engine.load(run.storage.initial_state(run.config, run.mesh, None))
        parts.train(False)
        found = {
            split: compute_reference(
                mixture,
                run.mesh,
                lambda part: make_loader(part, run),
                lambda batch: forward(parts, batch, run.mesh),
            )
            for split, mixture in mixtures.items()
        }
        if run.recorder:
            write_references(path, made_of, found)
    parts.objective.references.update(found)
