"""Averages models of one shape, weight by weight: checkpoints of a run (a decay that is never made,
Li et al. 2025), or finetuned models (model soups, Wortsman et al. 2022)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from megalite.checkpoint.convert import Model, open_source
from megalite.checkpoint.tensors import CheckpointError
from megalite.errors import ConfigError
from megalite.models.weights import Weight

NEUTRAL = ("dtype", "torch_dtype", "transformers_version", "_name_or_path")
"""Keys of config.json in which models that are averaged may differ."""


def average_of(folders: Sequence[Path], shares: Sequence[float] | None = None) -> Model:
    """Return the average of the models in `folders`, with everything but the weights taken from the
    last.

    `shares` weighs them, and is scaled to a sum of 1; without it all count alike. The sums are in
    fp64 over exact weights (the fp32 master weights of checkpoints), and rounded once. Raises
    ConfigError for shares that make no average, CheckpointError for models that differ in more than
    their weights."""
    shares = [1.0] * len(folders) if shares is None else shares
    if len(shares) != len(folders):
        raise ConfigError(f"{len(shares)} shares for {len(folders)} models; give one for each")
    total = math.fsum(shares)
    if not all(math.isfinite(share) for share in shares) or total <= 0:
        raise ConfigError(f"shares {', '.join(map(str, shares))}: their sum must be above 0")
    models = [open_source(folder) for folder in folders]
    for folder, model in zip(folders, models, strict=True):
        _check_alike(folders[-1], models[-1], folder, model)

    def read_exact(weight: Weight) -> Tensor:
        # One weight of all models at a time: memory for one, whatever the models' size.
        summed = torch.zeros(weight.shape, dtype=torch.float64)
        for model, share in zip(models, shares, strict=True):
            summed.add_((model.read_exact or model.read)(weight), alpha=share / total)
        return summed.float()

    def read(weight: Weight) -> Tensor:
        # In the dtype that this weight has in the last model.
        return read_exact(weight).to(models[-1].read(weight).dtype)

    return replace(models[-1], read=read, read_exact=read_exact)


def _check_alike(last_folder: Path, last: Model, folder: Path, model: Model) -> None:
    """Raise CheckpointError where two models are not of one shape."""
    for key in sorted(last.config.keys() | model.config.keys()):
        here, there = model.config.get(key), last.config.get(key)
        if key not in NEUTRAL and here != there:
            raise CheckpointError(
                f"{folder} and {last_folder} are not of one model: config.json has {key} = {here!r}, there {there!r}"
            )
