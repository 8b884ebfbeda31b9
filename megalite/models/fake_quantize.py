"""Which weights of a model `train.fake_quantize` rounds, those that `megalite quantize` does, and
whether their groups and blocks fit a layout."""

from __future__ import annotations

from collections.abc import Sequence

from megalite.config import Config
from megalite.errors import ConfigError
from megalite.models.fp8 import sizes
from megalite.models.weights import Weight


def check_fake_quantize(config: Config, weights: Sequence[Weight]) -> None:
    """Raise ConfigError for what is not trained with rounded weights, or would be quantised to
    others."""
    given, parallel, train = config.train.fake_quantize, config.parallel, config.train
    if given is None:
        return
    for key, value, only in (
        ("parallel.engine", parallel.engine, "native"), ("train.compile", train.compile, False),
        ("lora", config.lora, None), ("train.fp8", train.fp8, None),
    ):  # fmt: skip
        if value != only:
            needs = "null" if only is None else str(only).lower()
            raise ConfigError(f"train.fake_quantize needs {key}: {needs}")
    for weight in weights:
        if not weight.is_matrix:
            continue
        if weight.stack or weight.transpose:
            what = "experts" if weight.stack else "matrices stored as [in, out]"
            raise ConfigError(
                f"train.fake_quantize: {weight.name} is of {what}, which are not rounded in training"
            )
        _check_sizes(weight, given.scheme, given.group, parallel.tensor)


def _check_sizes(weight: Weight, scheme: str, group: int, tensor: int) -> None:
    """Raise ConfigError where a weight's rows or columns do not divide into groups or blocks on each
    rank."""
    if scheme not in ("w4a16", "fp8_block"):
        return
    if scheme == "fp8_block" and weight.by_unit:
        raise ConfigError(
            f"train.fake_quantize.scheme: fp8_block has blocks of rows, which {weight.hf[0]} has in another order than "
            "they are computed in; fp8 takes it"
        )
    for what, size, ranks in sizes(weight, tensor):
        is_rows = what.startswith("output")
        if size % (group * ranks) and (scheme == "fp8_block" or not is_rows):
            over = f" over parallel.tensor = {ranks}" if ranks > 1 else ""
            raise ConfigError(
                f"train.fake_quantize.group: {group} does not divide the {size} {what}{over}"
            )
