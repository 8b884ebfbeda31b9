"""What `megalite prune` does: writes the model, and says what it costs."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from megalite.checkpoint.convert import check_new, write_model
from megalite.errors import ConfigError
from megalite.pruning.sparse import Sparsity, sparse
from megalite.pruning.structured import StructuredPruner, Target
from megalite.quantization.layers import LayerRuns, perplexity_of


def prune_weights(
    folder: Path,
    output: Path,
    target: Target,
    sparsity: str | None,
    method: str | None,
    prefix: str | None,
    rows: int,
    length: int,
) -> None:
    """Write the model in `folder` to `output` with single weights set to 0. `rows` of `length`
    tokens of the token files `prefix` calibrate and measure. Raises ConfigError or
    CheckpointError."""
    if sparsity is None:
        raise ConfigError("--method is of single weights: give --sparsity, such as 0.5 or 2:4")
    if target != Target():
        raise ConfigError("leave out parts first, and set single weights to 0 in a second command")
    how = Sparsity.parse(sparsity)
    check_new(output)
    runs = LayerRuns.from_tokens(folder, prefix, rows, length) if prefix else None
    model, report = sparse(folder, how, method or "magnitude", runs)
    write_model(model, output, console=Console(stderr=True))
    of = "outputs" if runs else "weights"
    print(
        f"{output}: {how.share:.0%} of {len(report.errors)} matrices is 0, mean error of their {of} "
        f"{report.mean_error:.2e}"
    )
    if runs and report.perplexities:
        _say_perplexities(len(runs.held_out), *report.perplexities)


def prune_parts(
    folder: Path, output: Path, target: Target, prefix: str | None, rows: int, length: int
) -> None:
    """Write the model in `folder` to `output` as the smaller one of `target`; see
    `prune_weights`."""
    if target == Target():
        raise ConfigError("nothing to leave out: give --sparsity, or how many parts stay (--help)")
    if prefix is None:
        raise ConfigError("what the parts do is measured on token files: give --data")
    check_new(output)
    runs = LayerRuns.from_tokens(folder, prefix, rows, length)
    pruner = StructuredPruner(folder, runs, target)
    smaller = pruner.model()
    write_model(smaller, output, console=Console(stderr=True))
    had, has = (sum(weight.numel for weight in each) for each in (runs.table, smaller.weights))
    print(f"{output}: {has:,} parameters of {had:,}; {pruner.summary()}")
    _say_perplexities(
        len(runs.held_out), pruner.importance.perplexity, perplexity_of(output, runs.held_out)
    )


def _say_perplexities(rows: int, before: float, after: float) -> None:
    print(f"perplexity of {rows} rows held out: {before:.4f} → {after:.4f}")
