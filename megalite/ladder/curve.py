"""The losses over the steps of a large run, as a ladder predicts them.

The law says what a run ends with. In its middle, before the learning rate has come down, a run is
above what a shorter run would have ended with; how far is alike for runs of one schedule, whatever
their size. So it is taken from the ladder's own runs, as a factor of the law by the share of the
run that is over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, ValidationError, model_validator

from megalite.config import Config, Section
from megalite.config.errors import describe_errors
from megalite.errors import ConfigError
from megalite.ladder.config import multiplied
from megalite.ladder.fit import INTERVAL, Array, Law
from megalite.observe.band import Band
from megalite.observe.jsonl import read_metrics
from megalite.utils.outside import read_object

SHARES = np.linspace(0.05, 1.0, 20)
"""Shares of a run at which its losses are compared with the law."""
REACH = 0.025
"""Share of a run's steps to either side of a point over which its training losses are averaged."""


class LawReport(Section):
    """Holds the five numbers of a law, as ladder.json has them."""

    E: float = Field(gt=0)
    A: float = Field(ge=0)
    B: float = Field(ge=0)
    alpha: float = Field(gt=0)
    beta: float = Field(gt=0)

    @property
    def law(self) -> Law:
        """The law of these numbers."""
        return Law(self.E, self.A, self.B, self.alpha, self.beta)


class CurveReport(Section):
    """Holds what ladder.json says of the way to a run's last loss."""

    shares: tuple[float, ...] = Field(min_length=2)
    over_law: tuple[tuple[float, ...], ...] = Field(
        min_length=1,
        description="For each run, its losses at these shares as multiples of the law's.",
    )
    laws: tuple[LawReport, ...] = Field(min_length=1, description="Those of the bootstrap.")

    @model_validator(mode="after")
    def _fits(self) -> CurveReport:
        if any(len(row) != len(self.shares) for row in self.over_law):
            raise ValueError("over_law must have a number for each of shares in every run")
        # What is between two of them is interpolated.
        if not (np.diff(self.shares) > 0).all() or not 0 < self.shares[0] < self.shares[-1] <= 1:
            raise ValueError("shares must rise, from above 0 to at most 1")
        return self


@dataclass(frozen=True)
class Curve:
    """Predicts the losses of one run: of `parameters`, trained on `tokens` in all."""

    parameters: float
    tokens: float
    law: Law
    report: CurveReport

    def band(self, tokens: Array) -> Array:
        """Return low, middle and high of the loss after `tokens`, as [3, len(tokens)]; NaN before
        the first share of the run, in its warmup. 90% lie between low and high."""
        share = np.asarray(tokens, float) / self.tokens
        shares = self.report.shares
        known = (share >= shares[0] - 1e-9) & (share <= 1 + 1e-9)
        over = np.stack([np.interp(share, shares, way) for way in self.report.over_law])
        with np.errstate(divide="ignore"):  # after 0 tokens, which are not known
            middle = self.law.loss(self.parameters, tokens) * np.median(over, axis=0)
            drawn = [x.law.loss(self.parameters, tokens) for x in self.report.laws]
        # Every law of the bootstrap with the way of every run.
        each = np.stack(drawn)[:, None] * over[None]
        each = np.where(known, each.reshape(-1, len(share)), np.nan)
        low, high = np.percentile(each, INTERVAL, axis=0)
        middle = np.where(known, middle, np.nan)
        # An interval of few draws may lie beside the middle itself.
        return np.stack([np.fmin(low, middle), middle, np.fmax(high, middle)])


def over_law(run: Path, law: Law, parameters: float, tokens: float) -> list[float] | None:
    """Return the losses of the run in folder `run` at SHARES as multiples of what `law` says of so
    many tokens; its last one is the law's by definition. None for a run of too few steps, or whose
    losses are not all finite."""
    file = run / "metrics.jsonl"
    lines = read_metrics(file) if file.exists() else iter(())
    found = np.array([line["loss"] for line in lines if "loss" in line], dtype=float)
    if len(found) < len(SHARES) or not np.isfinite(found).all():
        return None
    count = len(found)
    reach = max(1, round(REACH * count))
    at = [max(1, round(share * count)) for share in SHARES]
    smooth = np.array([found[max(0, end - reach) : end + reach].mean() for end in at])
    # The law is of validation losses. Those of training differ by a factor: that of the last one.
    scaled = smooth / smooth[-1] * law.loss(parameters, tokens)
    expected = law.loss(parameters, SHARES * tokens)
    return [float(x) for x in scaled / expected]


def report_of(law_draws: Sequence[Law], ways: Sequence[list[float]]) -> dict[str, Any] | None:
    """Return what ladder.json holds of curves: `law_draws` of the bootstrap, and the `ways` of the
    runs, as `over_law` finds them. None where there is none."""
    if not ways:
        return None
    laws = [{name: float(number) for name, number in asdict(law).items()} for law in law_draws]
    return {"shares": SHARES.tolist(), "over_law": ways, "laws": laws}


def read_band(path: Path, config: Config) -> Band:
    """Return what the ladder.json at `path` predicts of a run by its steps. Raises ConfigError where
    it cannot be read or has no curve."""
    curve = read_curve(path, config)

    def band(steps: Sequence[int] | np.ndarray) -> np.ndarray:
        tokens = [config.train.samples_after(int(step)) * config.sample_tokens for step in steps]
        return curve.band(np.array(tokens, float))

    return band


def read_curve(path: Path, config: Config) -> Curve:
    """Return what the ladder.json at `path` predicts of a run by its tokens. Raises ConfigError as
    `read_band` does."""
    values = read_object(path, ConfigError)
    if not values.get("curve"):
        raise ConfigError(
            f"observe.ladder: {path} has no curve; `megalite ladder` writes one when its runs have "
            f"{len(SHARES)} steps or more"
        )
    held: dict[str, Any] = {}
    for name, kind in (("law", LawReport), ("curve", CurveReport)):
        try:
            held[name] = kind.model_validate(values.get(name))
        except ValidationError as error:
            raise ConfigError(
                f"observe.ladder: {path}: {name}: {describe_errors(error, kind, values)}"
            ) from None
    return Curve(multiplied(config), float(config.num_tokens), held["law"].law, held["curve"])
