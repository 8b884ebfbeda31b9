"""What the model a run starts from makes of preference data: computed once, on the run's own layout, and kept in the
run's folder, so that no second model is held."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megalite.config import Config
from megalite.data.dataset import RowSource, Split
from megalite.data.loader import Loader, MicroBatch
from megalite.data.mixture import Mixture
from megalite.data.order import Phase, PhasedOrder
from megalite.mesh import Mesh
from megalite.objective import Reference, sum_by_document
from megalite.parallel.collectives import all_reduce
from megalite.parallel.stage import Inputs

Forward = Callable[[list[MicroBatch]], Iterable[tuple[Tensor, Inputs, MicroBatch]]]


def reference_key(mixtures: Mapping[Split, Mixture], config: Config) -> str:
    """Names all that decides the log-probabilities."""
    parts = [[split, *(source.fingerprint() for source in mixture.sources)] for split, mixture in mixtures.items()]
    start = [str(config.model.hf), str(config.lora.adapter)] if config.lora else str(config.model.hf)
    identity = json.dumps([parts, start, config.train.precision])
    return hashlib.sha256(identity.encode()).hexdigest()[:32]


def compute_reference(
    mixture: Mixture, mesh: Mesh, open_loader: Callable[[Mixture], Loader], forward: Forward
) -> Reference:
    """By a pass over every sample of every source. All ranks call it, and get all."""
    tables = []
    for name, source in zip(mixture.names, mixture.sources, strict=True):
        assert isinstance(source, RowSource)
        count = source.num_samples
        alone = Mixture([source], [name], PhasedOrder([count], [Phase(0, [1.0])], 0, "sequential"), mixture.view)
        # What fills a sample up counts as one more document, and documents are counted in pairs.
        table = torch.zeros(count, source.most_documents + 2)
        with open_loader(alone) as loader:
            for _ in range(-(-count // loader.global_batch_size)):
                for losses_BT, micro, read in forward(next(loader)):
                    assert micro.places.document_BT is not None
                    found = -sum_by_document(losses_BT, micro.places.document_BT, table.shape[1]).cpu()
                    is_new = read.samples < count  # the last batch begins again
                    table[read.samples[is_new]] = found[is_new]
        on_device = table.to(mesh.device)
        tables.append(all_reduce(all_reduce(on_device, mesh.replicas), mesh.pipeline).cpu())
    return Reference(mixture, tables)


def write_references(path: Path, key: str, references: Mapping[Split, Reference]) -> None:
    tensors = {f"{split}.{n}": table for split, found in references.items() for n, table in enumerate(found.tables)}
    temporary = path.with_name(f"{path.name}.tmp")
    save_file(tensors, temporary, metadata={"key": key})
    temporary.replace(path)


def read_references(path: Path, key: str, mixtures: Mapping[Split, Mixture]) -> dict[Split, Reference] | None:
    """What was written for these very mixtures; None for any other, or none."""
    with contextlib.suppress(OSError, SafetensorError), safe_open(path, framework="pt") as file:
        if (file.metadata() or {}).get("key") == key:
            return {
                split: Reference(mixture, [file.get_tensor(f"{split}.{n}") for n in range(len(mixture.sources))])
                for split, mixture in mixtures.items()
            }
    return None
