"""The loss of a model on text that it was not trained on: as a run validates itself, or on any token
files. No engine is built: a rank holds its part of the weights, and nothing beside them."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from megalite.checkpoint.load import stored_config
from megalite.comm.collectives import all_reduce
from megalite.comm.mesh import Launch, Mesh, make_mesh
from megalite.config import Config, ModelConfig
from megalite.config_file import parse_config
from megalite.data.checks import check_vocabulary
from megalite.data.loader import Loader, MadeBatches, MicroBatch
from megalite.data.mixture import IGNORE, Mixture, build_mixtures
from megalite.data.tokenizer import Tokenizer, load_tokenizer
from megalite.engine import Engine
from megalite.errors import ConfigError, DataError
from megalite.infer.ranks import load_stage, parallel_section, plan_of_inference
from megalite.kernels import library
from megalite.models import model_config, read_hf_config
from megalite.plan import Plan
from megalite.registry import objectives
from megalite.training.parts import RankModel, connected, validate

OBJECTIVES = {"masked": "masked_lm", "seq2seq": "span_corruption"}
"""What models without a run are measured by, by their task; others predict the next token."""
LENGTH = 1024
"""Tokens of a sample for a model without a run, if it can take as many."""
KEPT = ("seq_length", "packing", "document_mask", "border_loss", "long_rows")
"""Settings of a run's data that samples of other token files are made by as well."""


class HeldOut(NamedTuple):
    """Holds what was measured."""

    numbers: dict[str, float]
    """The loss, what the objective tells beside it, and bits_per_byte where it is known."""
    num_samples: int
    num_labels: int
    """Tokens (or classes) that were predicted."""
    data: str
    """The data, in words."""


def measure(
    folder: Path,
    tokens: str | None,
    limit: int | None,
    launch: Launch,
    tensor: int = 1,
    pipeline: int = 1,
    expert: int = 1,
) -> HeldOut:
    """Measure the model in `folder`, a checkpoint or a Hugging Face folder, on the validation data of
    its run, or on the token files `tokens`. All ranks of `launch` call it.

    `limit` is the number of samples: by default as many as a validation of the run, or all of
    `tokens`. Ranks beyond `tensor` × `pipeline` share the samples. Raises ConfigError, DataError or
    CheckpointError."""
    config = held_out_config(folder, tokens, launch, tensor, pipeline, expert)
    tokenizer = load_tokenizer(folder) if config.data.tokenizer else None
    mixture = build_mixtures(config, tokenizer)["valid"]
    assert mixture is not None
    check_vocabulary(config, tokenizer)
    plan = plan_of_inference(config, launch.world_size)
    launch.join()
    mesh = make_mesh(plan, launch.device)
    parts = load_parts(folder, config, plan, mesh)
    size = config.train.global_batch_size
    if limit is None and tokens is None:
        count = samples_of_run(stored_config(folder) or {}, mixture)
    else:
        count = min(mixture.num_samples, mixture.num_samples if limit is None else limit)
    # Whole batches alone, the same on every layout; of too few samples one, which begins again.
    batches = max(1, count // size)
    labels = Labels(tokenizer if _tells_bytes(config) else None)
    with _loader(mixture, config, mesh, plan) as loader:
        watched = MadeBatches(loader, labels.note)
        numbers = validate(parts, watched, batches, "valid", mesh)
    # Data ranks have each their own samples; float64 counts bytes exactly up to 2^53.
    found = torch.tensor([labels.count, labels.num_bytes], dtype=torch.float64, device=mesh.device)
    num_labels, num_bytes = all_reduce(found, mesh.data).tolist()
    # Nats of a label to bits of a byte, by which models of other tokenizers compare.
    if num_bytes:
        numbers["bits_per_byte"] = numbers["loss"] * num_labels / num_bytes / math.log(2)
    where = tokens or "the validation data of its run"
    return HeldOut(numbers, batches * size, int(num_labels), where)


def held_out_config(
    folder: Path, tokens: str | None, launch: Launch, tensor: int, pipeline: int, expert: int
) -> Config:
    """Return a config whose valid split is the data to measure on. Raises ConfigError where there is
    none."""
    stored, model = stored_config(folder), model_config({"hf": str(folder)})
    if stored is None and tokens is None:
        raise ConfigError(
            f"{folder} is of no run, whose validation data could be taken: give --tokens PREFIX, token files that "
            "`megalite preprocess` wrote (or --tasks, or --data)"
        )
    train = (stored or {}).get("train") or {}
    micro = int(train.get("micro_batch_size") or 1)
    if launch.world_size % (tensor * pipeline):
        raise ConfigError(
            f"{launch.world_size} ranks are no multiple of --tensor {tensor} × --pipeline {pipeline}"
        )
    replicas = launch.world_size // (tensor * pipeline)
    return parse_config(
        {
            "run": {"name": "eval"},
            "model": {"hf": str(folder)},
            "data": _data(folder, stored, tokens, model),
            "objective": _objective(folder, stored, tokens, model),
            "parallel": parallel_section(tensor, pipeline, expert),
            # Full micro-batches on all ranks; what a plan of training needs beside them, any value does.
            "train": {
                "steps": 1,
                "global_batch_size": micro * replicas * pipeline,
                "micro_batch_size": micro,
                "precision": train.get("precision") or _stored_precision(folder),
                "seed": train.get("seed", 1234),
            },
            "optimizer": {"lr": 1.0},
        },
        origin=f"the config of {folder}",
    )


def _data(
    folder: Path, stored: dict[str, Any] | None, tokens: str | None, model: ModelConfig
) -> dict[str, Any]:
    """Return the `data:` section."""
    own = dict((stored or {}).get("data") or {})
    try:
        load_tokenizer(folder)
        tokenizer = str(folder)
    except DataError:  # token files can be read without one
        tokenizer = None
    if tokens is not None:
        kept = {name: own[name] for name in KEPT if name in own}
        length = {"seq_length": min(LENGTH, model.max_positions)}
        source = [{"path": tokens}]
        return length | kept | {"train": source, "valid": source, "tokenizer": tokenizer}
    # What orders training samples does not matter here.
    for name in ("fim", "augment", "phases", "seq_length_warmup", "order", "test"):
        own.pop(name, None)
    if own.get("valid"):
        own["train"] = own["valid"]  # training files need not be at hand
    elif not (own.get("split") and own["split"][1]):
        raise ConfigError(
            f"the run of {folder} has no validation data (data.valid, data.split); give --tokens PREFIX"
        )
    return own | {"tokenizer": tokenizer}


def _objective(
    folder: Path, stored: dict[str, Any] | None, tokens: str | None, model: ModelConfig
) -> dict[str, Any]:
    """Return the `objective:` section: the run's own, unless it compares with another model."""
    own = dict(
        (stored or {}).get("objective") or {"name": OBJECTIVES.get(model.task, "next_token")}
    )
    kind = objectives.get(str(own.get("name", "next_token")))
    if kind.DATA in ("preference", "pairs"):
        if tokens is None:
            raise ConfigError(
                f"the run of {folder} learned from {kind.DATA} data, whose loss is none of a text; give --tokens PREFIX"
            )
        return {"name": OBJECTIVES.get(model.task, "next_token")}
    return {"name": "next_token"} if own.get("name") == "distill" else own


def samples_of_run(stored: dict[str, Any], mixture: Mixture) -> int:
    """Return how many samples a validation of the run has, whose config is `stored`."""
    size = int((stored.get("train") or {}).get("global_batch_size", 1))
    most = int((stored.get("observe") or {}).get("eval_batches", 20))
    return size * mixture.num_batches(size, most)


def load_parts(folder: Path, config: Config, plan: Plan, mesh: Mesh) -> RankModel:
    """Return this rank's parts of the model in `folder`, without an engine."""
    library.use(config.kernels, config.train.deterministic)
    (span,) = plan.stages_of(mesh.pipeline.rank)
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    stage, _ = load_stage(folder, config.model, plan, span, mesh, config.train, dtype)
    nothing_trains = cast(Engine, None)  # a validation asks an engine for nothing
    return connected(config, plan, mesh, [stage], nothing_trains, [None], Counter())


def _stored_precision(folder: Path) -> str:
    """Return the precision to compute in with a model of no run: bf16 where it says so."""
    values = read_hf_config(folder)
    return "bf16" if "bfloat16" in (values.get("dtype"), values.get("torch_dtype")) else "fp32"


def _loader(mixture: Mixture, config: Config, mesh: Mesh, plan: Plan) -> Loader:
    return Loader(
        mixture,
        config.train.global_batch_size,
        plan.micro_batch_size,
        mesh.data.rank,
        mesh.data.size,
        vocab_size=config.model.vocab_size,
        pin=mesh.device.type == "cuda",
    )


def _tells_bytes(config: Config) -> bool:
    """Return whether a loss is of every token of a text, and so of its bytes."""
    return config.model.task == "causal" and config.objective.name == "next_token"


class Labels:
    """Counts the labels of batches that pass, and the bytes of their text."""

    def __init__(self, tokenizer: Tokenizer | None):
        """Count with a `tokenizer` the bytes of the text as well; without one there are none."""
        self._tokenizer = tokenizer
        self.count = self.num_bytes = 0

    def note(self, batch: list[MicroBatch]) -> list[MicroBatch]:
        """Count a batch, and return it as it is."""
        for micro in batch:
            for row in micro.labels:
                labels = row[row != IGNORE]
                self.count += len(labels)
                if self._tokenizer:
                    # Special tokens, such as ends of documents, are no bytes of the text.
                    self.num_bytes += len(self._tokenizer.decode_plain(labels.tolist()).encode())
        return batch
