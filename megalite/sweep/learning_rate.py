"""The learning rate range test (Smith 2017): one run whose rate rises from step to step, and where its
loss falls the fastest. The smallest search there is: it costs one short run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megalite.config_file import load_config
from megalite.errors import ConfigError
from megalite.observe.jsonl import read_metrics
from megalite.utils.files import replacing

STEPS = 200
REACH = 3
"""Steps to either side over which losses are averaged."""
DIVERGED = 1.5
"""Multiple of the lowest loss so far above which a run has diverged."""
FEWEST = 20
"""Steps before it diverges without which nothing is said."""


@dataclass(frozen=True)
class Found:
    """Holds the losses of a range test by learning rate, up to where it diverged."""

    rates: np.ndarray
    losses: np.ndarray
    smooth: np.ndarray

    @property
    def steepest(self) -> float:
        """The rate at which the loss falls the fastest by the logarithm of the rate."""
        # Behind the lowest point it no longer falls.
        end = max(2, int(self.smooth.argmin()) + 1)
        slopes = np.gradient(self.smooth[:end], np.log(self.rates[:end]))
        return float(self.rates[int(slopes.argmin())])

    @property
    def lowest(self) -> float:
        """The rate at which the loss is the lowest: a run at it would soon diverge."""
        return float(self.rates[int(self.smooth.argmin())])


def find_learning_rate(path: Path, overrides: Sequence[str], low: float, high: float) -> Path:
    """Train the config in `path` for STEPS steps at learning rates that rise from `low` to `high`,
    print what they say and draw it; return the picture's path. Raises ConfigError for rates that do
    not rise, a folder that exists, and a run that diverges at once."""
    from megalite.train import train

    if not 0 < low < high:
        raise ConfigError(f"--find-lr {low:g} {high:g}: rates must be above 0 and rise")
    config = load_config(path, overrides)
    config = load_config(path, [
        *overrides, f"run.dir={config.run.dir}", f"run.name={config.run.name}-lr", f"train.steps={STEPS}",
        "train.tokens=null", "train.epochs=null", f"optimizer.lr={high!r}", "train.patience=null",
        f"optimizer.schedule={{name: range_test, start_lr: {low!r}}}", "observe.eval_every=0",
        "checkpoint.every=0", "checkpoint.keep_best=0", "checkpoint.resume=never", "observe.tasks.every=0",
    ])  # fmt: skip
    folder = config.run.folder
    if (folder / "metrics.jsonl").exists():  # of other rates, maybe
        raise ConfigError(f"{folder} exists; remove it, or give another run.name")
    train(config)
    found = read(folder)
    print(
        f"the loss falls the fastest at lr {found.steepest:.2g} and is lowest at {found.lowest:.2g}; take one between "
        f"{min(found.steepest, found.lowest / 10):.2g} and {max(found.steepest, found.lowest / 10):.2g}"
    )
    picture = folder / "lr.png"
    draw(found, picture)
    return picture


def read(folder: Path) -> Found:
    """Return what a range test in `folder` has found. Raises ConfigError where it has diverged
    before it could say anything."""
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]
    losses = np.array([math.nan if x["loss"] is None else x["loss"] for x in lines], float)
    rates = np.array([x["lr"] for x in lines], float)
    best, end = math.inf, 0
    for loss in losses:
        if not loss <= DIVERGED * best:  # NaN, too
            break
        best, end = min(best, loss), end + 1
    if end < FEWEST:
        raise ConfigError(
            f"{folder}: the loss diverges within {end} steps, at lr {rates[end - 1] if end else 0:.2g}; begin lower"
        )
    rates, losses = rates[:end], losses[:end]
    padded = np.pad(losses, REACH, mode="edge")
    smooth = np.convolve(padded, np.ones(2 * REACH + 1) / (2 * REACH + 1), mode="valid")
    return Found(rates, losses, smooth)


def draw(found: Found, picture: Path) -> None:
    """Draw the losses by learning rate to the PNG `picture`, with the rates that stand out."""
    from megalite.observe.plot import BLUE, GREEN, ORANGE, limit_to, new_figure, style

    figure = new_figure(8, 4.5)
    axes = figure.subplots()
    axes.plot(found.rates, found.losses, color=BLUE, alpha=0.35, linewidth=0.9)
    axes.plot(found.rates, found.smooth, color=BLUE, linewidth=2)
    for rate, color, what in (
        (found.steepest, GREEN, "falls the fastest"),
        (found.lowest, ORANGE, "lowest"),
    ):
        axes.axvline(rate, color=color, linewidth=1.5, label=f"{what}  {rate:.2g}")
    axes.set_xscale("log")
    limit_to(axes, [found.smooth])
    style(axes)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_xlabel("learning rate", fontsize=11)
    axes.set_ylabel("loss (nats per token)", fontsize=11)
    axes.legend(frameon=False, fontsize=11)
    with replacing(picture) as temporary:
        figure.savefig(temporary, format="png", facecolor="white")
