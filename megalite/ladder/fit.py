"""The law of losses L = E + A/N^α + B/D^β of N parameters and D tokens (Hoffmann et al. 2022, approach
3): a Huber loss of log L, minimised from a grid of starts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

DELTA = 1e-3
"""Error of log L from which on it counts by its size and no longer by its square."""
DRAWN = 100
"""Fits of the bootstrap."""
INTERVAL = (5.0, 95.0)
"""Percentiles of what an interval reaches from and to."""
EXPONENTS = (0.1, 0.3, 0.6, 1.0)
FLOORS = (0.2, 0.5, 0.9)
"""Starts of E, as shares of the lowest loss."""


@dataclass(frozen=True)
class Law:
    """Holds a law L = E + A/N^α + B/D^β of the loss after training N parameters on D tokens."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, parameters: Array | float, tokens: Array | float) -> Array:
        """Return the loss of models of so many parameters after so many tokens."""
        n, d = np.asarray(parameters, float), np.asarray(tokens, float)
        return self.E + self.A / n**self.alpha + self.B / d**self.beta

    def best_parameters(self, flops: Array | float) -> Array:
        """Return the size that a budget of 6·N·D FLOPs is best spent on."""
        share = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        return share * (np.asarray(flops, float) / 6) ** (self.beta / (self.alpha + self.beta))


@dataclass(frozen=True)
class Runs:
    """Holds what was measured, in three arrays of one length: an element for each run."""

    parameters: Array
    tokens: Array
    losses: Array

    def without(self, number: int) -> Runs:
        """Return all but one of them."""
        return Runs(*(np.delete(x, number) for x in (self.parameters, self.tokens, self.losses)))

    @property
    def largest(self) -> int:
        """Return the number of the run with the most FLOPs."""
        return int(np.argmax(self.parameters * self.tokens))


class Fit:
    """Fits the law to runs, and to losses that might as well have been measured (a bootstrap)."""

    def __init__(self, runs: Runs, seed: int = 0):
        self.runs, self._seed = runs, seed
        self._log_n, self._log_d = np.log(runs.parameters), np.log(runs.tokens)
        # Counted from the middle, where A and B do not go with α and β.
        self._centre = float(self._log_n.mean()), float(self._log_d.mean())
        found = [self._minimise(start, np.log(runs.losses)) for start in self._starts()]
        self._best = min(found, key=lambda pair: pair[0])[1]
        self.law = self._law(self._best)

    def _starts(self) -> list[Array]:
        lowest, mean = self.runs.losses.min(), self.runs.losses.mean()
        starts = []
        for alpha, beta, floor in itertools.product(EXPONENTS, EXPONENTS, FLOORS):
            # What E leaves of the mean loss, in halves: at the centre, the other terms are A and B.
            rest = np.log((mean - floor * lowest) / 2)
            starts.append(np.array([rest, rest, np.log(floor * lowest), alpha, beta]))
        return starts

    def _terms(self, values: Array) -> Array:
        """Return log of the three terms of each run, [3, runs]."""
        a, b, e, alpha, beta = values
        n, d = self._log_n - self._centre[0], self._log_d - self._centre[1]
        return np.stack([a - alpha * n, b - beta * d, np.full_like(n, e)])

    def _minimise(self, start: Array, logs: Array) -> tuple[float, Array]:
        from scipy.optimize import minimize

        n, d = self._log_n - self._centre[0], self._log_d - self._centre[1]

        def objective(values: Array) -> tuple[float, Array]:
            terms = self._terms(values)
            total = np.logaddexp.reduce(terms, axis=0)
            off = total - logs
            size = np.abs(off)
            huber = np.where(size <= DELTA, off**2 / 2, DELTA * (size - DELTA / 2))
            # d log(Σ exp) / d term is the term's share of the loss, and the Huber loss has the
            # derivative of its clipped argument.
            pull = np.clip(off, -DELTA, DELTA) * np.exp(terms - total)
            gradient = [
                pull[0].sum(),
                pull[1].sum(),
                pull[2].sum(),
                -(pull[0] * n).sum(),
                -(pull[1] * d).sum(),
            ]
            # Of order 1, so that the tolerances of the minimiser mean something.
            return huber.sum() / DELTA**2, np.array(gradient) / DELTA**2

        # Exponents near 0 would be a second E, and A or B then has no end.
        bounds = [(None, None)] * 3 + [(1e-2, 3.0)] * 2
        done = minimize(
            objective, start, jac=True, method="L-BFGS-B", bounds=bounds,
            options={"maxiter": 500, "maxfun": 1000, "ftol": 1e-10, "gtol": 1e-8},
        )  # fmt: skip
        return float(done.fun), done.x

    def _law(self, values: Array) -> Law:
        # Back from the centre: a − α·(log N − c) = (a + α·c) − α·log N.
        a, b, e, alpha, beta = (float(x) for x in values)
        middle_n, middle_d = self._centre
        return Law(
            np.exp(e), np.exp(a + alpha * middle_n), np.exp(b + beta * middle_d), alpha, beta
        )

    @cached_property
    def drawn(self) -> list[Law]:
        """Return the laws of a bootstrap: of losses that are off the law as those measured are,
        each by another's error."""
        generator = np.random.default_rng(self._seed)
        expected = np.logaddexp.reduce(self._terms(self._best), axis=0)
        count = len(expected)
        # A law of five numbers comes nearer to the losses than the true one: errors look smaller.
        off = (np.log(self.runs.losses) - expected) * np.sqrt(count / max(1, count - 5))
        laws = []
        for _ in range(DRAWN):
            logs = expected + generator.choice(off, count)
            # From the best fit alone: the true minimum of such losses is near.
            _, values = self._minimise(self._best, logs)
            laws.append(self._law(values))
        return laws

    def interval(self, values: Sequence[Array | float]) -> Array:
        """Return from where to where 90% of `values`, one for each law drawn, lie: [2, …]."""
        return np.percentile(np.asarray(values, float), INTERVAL, axis=0)

    def predict(self, parameters: float, tokens: float) -> tuple[float, float, float]:
        """Return the loss of a run, and its interval."""
        low, high = self.interval([law.loss(parameters, tokens) for law in self.drawn])
        return float(self.law.loss(parameters, tokens)), float(low), float(high)
