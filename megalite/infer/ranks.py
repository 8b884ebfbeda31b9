"""A model that is too large for one device, over a tensor group and a pipeline, answering as a clean model does."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor

from megalite.checkpoint.load import from_hf
from megalite.config_file import parse_config
from megalite.errors import ConfigError
from megalite.mesh import Launch, Mesh, make_mesh
from megalite.models import build_model, set_parameters, weight_table
from megalite.models.layers import Places
from megalite.parallel.apply import apply_parallelism
from megalite.parallel.collectives import all_gather
from megalite.parallel.pipeline import Pipeline
from megalite.parallel.stage import Inputs, Stage
from megalite.plan import Plan, make_plan


class RanksModel(nn.Module):
    """Every rank calls it with the same tokens, and gets the same logits."""

    def __init__(self, stage: Stage, plan: Plan, mesh: Mesh, dtype: torch.dtype):
        super().__init__()
        self.stage, self.mesh = stage, mesh
        self.config = stage.model.config
        hidden = torch.empty((1, 1, self.config.hidden_size), dtype=dtype, device="meta")
        self.pipeline = Pipeline([stage], plan, mesh, hidden, [None]) if plan.pipeline > 1 else None

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Logits of the last position: [B,1,V] fp32."""
        inputs = Inputs(tokens_BT, Places.whole(tokens_BT.shape[1], tokens_BT.device))
        outputs = self.pipeline.forward([inputs]) if self.pipeline else [self.stage(None, inputs)]
        shape = (tokens_BT.shape[0], 1, self.config.vocab_size)
        logits = torch.empty(shape, device=tokens_BT.device)
        if outputs:
            whole = all_gather(outputs[0][:, -1:].float(), self.mesh.tensor, dim=2)
            logits.copy_(whole[..., : self.config.vocab_size])  # the rest is padding
        if self.pipeline:
            dist.broadcast(logits, group=self.mesh.pipeline.group, group_src=self.mesh.pipeline.size - 1)
        return logits


def load_on_ranks(folder: Path, launch: Launch, tensor: int, pipeline: int, dtype: torch.dtype | None) -> RanksModel:
    """This rank's part of the model in a Hugging Face folder. Raises ConfigError or CheckpointError."""
    if launch.world_size != tensor * pipeline:
        raise ConfigError(
            f"tensor {tensor} × pipeline {pipeline} needs {tensor * pipeline} ranks, not {launch.world_size}; "
            f"start them with torchrun --nproc-per-node={tensor * pipeline}"
        )
    config = parse_config(
        {
            "run": {"name": "generate"},
            "model": {"hf": str(folder)},
            "data": {"train": [{"path": "-"}], "seq_length": 1},
            "parallel": {"tensor": tensor, "pipeline": pipeline, "sequence": False},
            "train": {"steps": 1, "global_batch_size": pipeline},
            "optimizer": {"lr": 1.0},
        }
    )
    table = weight_table(config.model)
    plan = make_plan(config, table, launch.world_size)
    launch.join()
    mesh = make_mesh(plan, launch.device)
    (span,) = plan.stages_of(mesh.pipeline.rank)
    model = build_model(config.model)
    apply_parallelism(model, table, plan, span, mesh, config.train)
    read = from_hf(folder, table, config.model, mesh.tensor)
    parameters = {}
    for weight in span.weights(table):
        shape = torch.Size(weight.local_shape(tensor))
        local = read(weight, "weight", 0, shape.numel()).view(shape)
        parameters[weight.name] = nn.Parameter(local.to(mesh.device, dtype))
    set_parameters(model, parameters)
    stored = next(iter(parameters.values())).dtype
    whole = RanksModel(Stage(model, span), plan, mesh, stored)
    return whole.eval().requires_grad_(False)
