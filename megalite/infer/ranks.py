"""Inference with a model that is too large for one device: sharded over a tensor group and a
pipeline, it answers as an unsharded one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor

from megalite.checkpoint.load import OpenModel, dtype_of, from_hf
from megalite.comm.collectives import all_gather
from megalite.comm.mesh import Launch, Mesh, make_mesh
from megalite.config import Config, ModelConfig, TrainConfig
from megalite.config_file import parse_config
from megalite.errors import ConfigError
from megalite.infer.cache import CachedSequenceInfo, add_cache, copy_slots
from megalite.infer.cells import CacheKind
from megalite.models import build_model, set_parameters, weight_table
from megalite.models.layers import SequenceInfo
from megalite.parallel.apply import apply_parallelism
from megalite.parallel.stage import Inputs, Stage
from megalite.plan import Plan, StageSpan, make_plan


class RankLost(RuntimeError):
    """Raised where ranks that answer together cannot any more, since one of them is gone."""


class RanksModel:
    """Runs a sharded model as a `batch.Predictor`. Every rank calls it with the same tokens and
    gets the same logits."""

    def __init__(
        self,
        stage: Stage,
        plan: Plan,
        mesh: Mesh,
        dtype: torch.dtype,
        num_slots: int,
        max_length: int | None = None,
        kv_cache: CacheKind | None = None,
    ):
        """Wrap this rank's pipeline `stage` under `plan` and `mesh` and give it a cache of
        `num_slots` sequences, in 8 bits of `kv_cache` (None: in the model's precision). `dtype` is
        the precision of hidden states between stages; `max_length` limits prompt and answer
        (default: `max_positions`)."""
        self.stage, self.mesh, self.num_slots = stage, mesh, num_slots
        self.config, self.vocab_size = stage.model.config, stage.model.config.vocab_size
        self.capacity = min(max_length or self.config.max_positions, self.config.max_positions)
        self.turning_points, self.device = self.config.architecture.turning_points, mesh.device
        # Keys and values of this rank's layers and heads only.
        add_cache(stage.model, num_slots, kv_cache)
        self.pipeline = None
        if plan.pipeline > 1:
            from megalite.parallel.pipeline import Pipeline  # torch's schedules import its compiler

            # A meta tensor, for its dtype and width; batch and length differ at every call.
            hidden = torch.empty((1, 1, self.config.hidden_size), dtype=dtype, device="meta")
            self.pipeline = Pipeline([stage], plan, mesh, hidden, [None])

    def predict(self, tokens_BT: Tensor, places: CachedSequenceInfo, last_B: Tensor) -> Tensor:
        """Return the next-token logits behind the token `last_B` of each row of `tokens_BT`, fp32
        [B,V]; cache keys and values at `places`."""
        # The last stage projects only the tokens `last_B`: [B,1,V] comes back.
        return self._run(Inputs(tokens_BT, places, last_B=last_B))[:, 0]

    def logits(self, tokens_BT: Tensor, places: SequenceInfo) -> Tensor:
        """Return the next-token logits behind every token, fp32 [B,T,V]. The cache is left
        alone."""
        return self._run(Inputs(tokens_BT, places))

    @torch.inference_mode()
    def copy_slots(self, sources: Sequence[int], targets: Sequence[int], num_tokens: int) -> None:
        """Copy cached sequences between slots, of this rank's layers and heads."""
        copy_slots(self.stage.model, sources, targets, num_tokens)

    @torch.inference_mode()
    def _run(self, inputs: Inputs) -> Tensor:
        return self.logits_of(inputs)

    def logits_of(self, inputs: Inputs) -> Tensor:
        """Run all stages, gather the vocabulary over the tensor group, and broadcast the logits
        from the last stage."""
        outputs = self.pipeline.forward([inputs]) if self.pipeline else [self.stage(None, inputs)]
        batch, length = inputs.tokens_BT.shape
        shape = (batch, length if inputs.last_B is None else 1, self.vocab_size)
        # Every rank chooses the next token from the same logits, so that all go on alike.
        # On every rank, as the buffer that the broadcast fills; the last stage has what to fill it
        # with.
        logits = torch.empty(shape, device=self.device)
        if outputs:
            whole = all_gather(outputs[0].float(), self.mesh.tensor, dim=2)
            # The vocabulary is padded to divide among tensor ranks.
            logits.copy_(whole[..., : self.vocab_size])
        if self.pipeline:
            dist.broadcast(
                logits, group=self.mesh.pipeline.group, group_src=self.mesh.pipeline.size - 1
            )
        return logits


def parallel_section(tensor: int, pipeline: int, expert: int) -> dict[str, Any]:
    """Return the section `parallel` of a config for inference. Raise ConfigError where `expert` of
    the `tensor` ranks cannot hold different experts."""
    if tensor % expert:
        raise ConfigError(f"--expert {expert} must divide --tensor {tensor}, whose ranks it shares")
    return {
        "tensor": tensor, "pipeline": pipeline, "expert": expert, "expert_tensor": tensor // expert,
        "sequence": expert > 1,
    }  # fmt: skip


def plan_of_inference(config: Config, world_size: int) -> Plan:
    """Return the plan of ranks of which all tensor ranks have all tokens. Those that hold different
    experts have different tokens in training; a plan of that says the rest."""
    # Sequence parallelism cuts a sequence into equal parts, and a decode step has one token.
    return replace(make_plan(config, weight_table(config.model), world_size), sequence=False)


def load_on_ranks(
    folder: Path,
    launch: Launch,
    tensor: int,
    pipeline: int,
    num_slots: int,
    max_length: int | None = None,
    expert: int = 1,
    kv_cache: CacheKind | None = None,
) -> RanksModel:
    """Load this rank's part of the Hugging Face model in `folder`, in the stored precision, over
    `tensor` × `pipeline` ranks of `launch`. Of a mixture of experts, `expert` of the tensor ranks
    hold different experts. `num_slots` and `max_length` are those of `RanksModel`. Raise ConfigError
    or CheckpointError."""
    if launch.world_size != tensor * pipeline:
        raise ConfigError(
            f"tensor {tensor} × pipeline {pipeline} needs {tensor * pipeline} ranks, not {launch.world_size}; "
            f"start them with torchrun --nproc-per-node={tensor * pipeline}"
        )
    config = parse_config(
        {
            "run": {"name": "generate"},
            "model": {"hf": str(folder)},
            # What a plan of training needs and inference has not: any value does.
            "data": {"train": [{"path": "-"}], "seq_length": tensor},
            "parallel": parallel_section(tensor, pipeline, expert),
            "train": {"steps": 1, "global_batch_size": pipeline},
            "optimizer": {"lr": 1.0},
        }
    )
    # Predictors of further tokens are trained beside the model; answers do not need them.
    config = config.model_copy(update={"model": config.model.without_predictors()})
    plan = plan_of_inference(config, launch.world_size)
    launch.join()
    mesh = make_mesh(plan, launch.device)
    (span,) = plan.stages_of(mesh.pipeline.rank)
    stage, stored = load_stage(folder, config.model, plan, span, mesh, config.train)
    return RanksModel(stage, plan, mesh, stored, num_slots, max_length, kv_cache)


def load_stage(
    folder: Path,
    config: ModelConfig,
    plan: Plan,
    span: StageSpan,
    mesh: Mesh,
    train: TrainConfig,
    dtype: torch.dtype | None = None,
    open_model: OpenModel = from_hf,
) -> tuple[Stage, torch.dtype]:
    """Load the part `span` of the Hugging Face model in `folder`, frozen, as this rank of `mesh`
    has it under `plan`; `open_model` opens it. Return it with its precision: `dtype`, by default
    the stored one. Raise CheckpointError."""
    # As in training, but without an engine: parameters are read straight into the parallel model.
    table, model = weight_table(config), build_model(config)
    apply_parallelism(model, table, plan, span, mesh, train)
    read = open_model(folder, table, config, mesh)
    tensors = {}
    for weight in span.weights(table):
        shape = torch.Size(weight.local_shape(*mesh.fold_of(weight).cut))
        tensors[weight.name] = read(weight, "weight", 0, shape.numel()).view(shape)
    dtype = dtype or dtype_of(tensors.values(), folder)
    kept = {weight.name: weight.dtype_in(dtype) for weight in table}
    set_parameters(
        model,
        {name: nn.Parameter(local.to(mesh.device, kept[name])) for name, local in tensors.items()},
    )
    model.eval().requires_grad_(False)
    return Stage(model, span), dtype
