"""Merges models of one shape, weight by weight: checkpoints of a run (a decay that is never made,
Li et al. 2025), or finetuned models (model soups, Wortsman et al. 2022)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from megalite.checkpoint.convert import Model, open_source
from megalite.checkpoint.merging import METHODS, Read, TaskArithmetic
from megalite.checkpoint.tensors import CheckpointError
from megalite.errors import ConfigError
from megalite.models.weights import Weight

NEUTRAL = ("dtype", "torch_dtype", "transformers_version", "_name_or_path")
"""Keys of config.json in which models that are averaged may differ."""
DENSITY = 0.2
"""Share of a task vector that TIES keeps unless told otherwise, the paper's."""


def average_of(
    folders: Sequence[Path],
    shares: Sequence[float] | None = None,
    method: str = "linear",
    base: Path | None = None,
    scale: float | None = None,
    density: Sequence[float] | None = None,
) -> Model:
    """Return the models in `folders` merged, with everything but the weights taken from the last.

    `shares` weighs them; without it all count alike. `method` is one of METHODS; task arithmetic
    and TIES add `scale` (default 1) times what the models have learned since the one in `base`, of
    which TIES keeps the share `density` (one for all models, or one for each). The arithmetic is in
    fp64 over exact weights (the fp32 master weights of checkpoints), and rounded once. Raises
    ConfigError for numbers that make no average, CheckpointError for models that differ in more
    than their weights."""
    shares = [1.0] * len(folders) if shares is None else shares
    if len(shares) != len(folders):
        raise ConfigError(f"{len(shares)} shares for {len(folders)} models; give one for each")
    numbers = [*shares, *(density or ()), *([] if scale is None else [scale])]
    if not all(map(math.isfinite, numbers)):
        raise ConfigError(f"{', '.join(map(str, numbers))}: shares, scale and densities are finite")
    _check_options(method, base, scale, density)
    models = [open_source(folder) for folder in folders]
    for folder, model in zip(folders, models, strict=True):
        _check_alike(folders[-1], models[-1], folder, model)
    options: dict[str, Any] = {}
    if base:
        options["base"] = _exact(opened := open_source(base))
        _check_alike(folders[-1], models[-1], base, opened)
    if scale is not None:
        options["scale"] = scale
    if method == "ties":
        options["density"] = _for_each(density or [DENSITY], len(folders))
    last = models[-1]
    merging = METHODS[method](last.weights, [_exact(model) for model in models], shares, **options)

    def read_exact(weight: Weight) -> Tensor:
        return merging.merge(weight).float()

    def read(weight: Weight) -> Tensor:
        # In the dtype that this weight has in the last model.
        return read_exact(weight).to(last.read(weight).dtype)

    return replace(last, read=read, read_exact=read_exact)


def _exact(model: Model) -> Read:
    return model.read_exact or model.read


def _check_options(
    method: str, base: Path | None, scale: float | None, density: Sequence[float] | None
) -> None:
    """Raise ConfigError for an option that a method needs, or does not know."""
    based = issubclass(METHODS[method], TaskArithmetic)
    if based and base is None:
        raise ConfigError(f"--method {method} needs --base, the model that the others began as")
    for name, value, known in (
        ("base", base, based), ("scale", scale, based), ("density", density, method == "ties"),
    ):  # fmt: skip
        if value is not None and not known:
            raise ConfigError(f"--{name} means nothing under --method {method}")


def _for_each(density: Sequence[float], count: int) -> Sequence[float]:
    if len(density) not in (1, count):
        raise ConfigError(f"{len(density)} densities for {count} models; give one, or one for each")
    return list(density) * count if len(density) == 1 else density


def _check_alike(last_folder: Path, last: Model, folder: Path, model: Model) -> None:
    """Raise CheckpointError where two models are not of one shape."""
    for key in sorted(last.config.keys() | model.config.keys()):
        here, there = model.config.get(key), last.config.get(key)
        if key not in NEUTRAL and here != there:
            raise CheckpointError(
                f"{folder} and {last_folder} are not of one model: config.json has {key} = {here!r}, there {there!r}"
            )
