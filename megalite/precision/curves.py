"""How far the losses of each recipe are from bf16's of the same seed, beside what seeds alone change:
the spread of bf16's own losses over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megalite.observe.jsonl import read_metrics
from megalite.observe.plot import count_along, new_figure, style
from megalite.utils.files import replacing

BF16 = "bf16"
COLORS = ("#2a6fbb", "#3a8f5c", "#d9661f", "#8e44ad", "#b8860b", "#c0392b")


class Curve(NamedTuple):
    """Holds the validation losses of a run."""

    steps: list[int]
    losses: list[float]


Curves = Mapping[tuple[str, int], Curve]
"""By recipe, `BF16` among them, and seed."""


def read_curve(folder: Path) -> Curve:
    """Return the validation losses of the run in `folder`."""
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if "valid_loss" in line]
    return Curve([line["step"] for line in lines], [line["valid_loss"] for line in lines])


def seeds_of(curves: Curves, recipe: str) -> list[int]:
    """Return the seeds that a recipe was trained with."""
    return [seed for name, seed in curves if name == recipe]


def gaps(curves: Curves, recipe: str) -> list[list[float]]:
    """Return for each seed how far the recipe's losses are from bf16's, as shares of it."""
    found = []
    for seed in seeds_of(curves, recipe):
        pairs = zip(curves[recipe, seed].losses, curves[BF16, seed].losses, strict=True)
        found.append([loss / of_bf16 - 1 for loss, of_bf16 in pairs])
    return found


def last_gap(curves: Curves, recipe: str) -> float:
    """Return how far a recipe's last loss is from bf16's, the mean over seeds, as a share of it."""
    return statistics.mean(gap[-1] for gap in gaps(curves, recipe))


def spread(curves: Curves) -> list[float]:
    """Return the standard deviation of bf16's losses over seeds, as shares of their mean."""
    of_seeds = [curves[BF16, seed].losses for seed in seeds_of(curves, BF16)]
    if len(of_seeds) == 1:
        return [0.0] * len(of_seeds[0])
    return [statistics.stdev(at) / statistics.mean(at) for at in zip(*of_seeds, strict=True)]


def draw(path: Path, curves: Curves, recipes: Sequence[str], bound: float | None = None) -> None:
    """Draw the gap of each recipe over the steps to a PNG, beside the noise, and a `bound` of it.
    Raises ImportError without matplotlib."""
    from matplotlib.ticker import PercentFormatter

    figure = new_figure(8, 5)
    axes = figure.subplots()
    noise = np.array(spread(curves))
    steps = curves[BF16, seeds_of(curves, BF16)[0]].steps
    if noise.any():
        label = f"bf16: spread over seeds  ±{noise[-1]:.2%}"
        axes.fill_between(steps, -noise, noise, color="0.9", linewidth=0, label=label)
    axes.axhline(0, color="0.6", linewidth=0.8)
    for at in (-bound, bound) if bound else ():
        axes.axhline(at, color="0.6", linewidth=0.8, linestyle=":")
    for recipe, color in zip(recipes, COLORS, strict=False):
        of_seeds = gaps(curves, recipe)
        if len(of_seeds) > 1:
            for gap in of_seeds:
                axes.plot(steps, gap, color=color, alpha=0.3, linewidth=0.8)
        label = f"{recipe}  {last_gap(curves, recipe):+.2%}"
        axes.plot(steps, np.mean(of_seeds, axis=0), color=color, linewidth=1.8, label=label)
    style(axes)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set(xlabel="step", ylabel="validation loss, from bf16's of the same seed")
    count_along(axes)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", facecolor="white")
