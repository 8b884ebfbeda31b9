"""What is found in a window of requests: drift, speed, errors and ratings, and which of it stands as
an alarm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from megalite.monitor.drift import Drift, drift_of_classes, drift_of_numbers
from megalite.monitor.intervals import Interval, newcombe, wilson
from megalite.monitor.records import (
    Row,
    Window,
    answered,
    asked,
    is_error,
    rated,
    values_of,
)
from megalite.monitor.topics import topics_of

NUMBERS = ("prompt_tokens", "completion_tokens", "score")
"""Features of requests that are numbers."""
QUANTILES = (50, 95, 99)
TIMES = ("seconds", "first_token_s")
P_OF_ALARM = 0.001
"""A difference counts only where chance makes as large a one more seldom than this."""
BAD = ("down", "corrected")


@dataclass(frozen=True)
class Limits:
    """Holds from where on something is an alarm."""

    psi: float = 0.25
    """Population stability index of a feature, where chance does not explain it."""
    max_errors: float = 0.01
    """Share of requests that the server fails."""
    max_p95_s: float | None = None
    """Seconds within which 95% of requests shall end; None: any."""
    max_drop: float = 0.1
    """Loss of the share of answers rated well, against the reference."""


class Speed(NamedTuple):
    """Holds quantiles of a time, in seconds."""

    name: str
    now: list[float]
    reference: list[float]


class Report(NamedTuple):
    """Holds all that is found."""

    window: Window
    drifts: list[Drift]
    speeds: list[Speed]
    errors: Interval
    """Share of requests that the server failed."""
    refused: Interval
    """Share of requests that were refused as the client's mistake, or as too many."""
    ratings: tuple[Interval, Interval]
    """Share of ratings that are good, now and in the reference."""
    alarms: dict[str, str]
    """What stands, in words, by name."""

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON can hold it, without rows."""
        return {
            "start": self.window.start,
            "end": self.window.end,
            "requests": len(asked(self.window.now)),
            "reference_requests": len(asked(self.window.reference)),
            "damaged_lines": self.window.num_damaged,
            "drift": {
                each.feature: each._asdict() | {"judged": each.is_judged} for each in self.drifts
            },
            "seconds": {each.name: each._asdict() for each in self.speeds},
            "errors": self.errors.as_json(),
            "refused": self.refused.as_json(),
            "ratings": self.ratings[0].as_json(),
            "reference_ratings": self.ratings[1].as_json(),
            "alarms": self.alarms,
        }


def examine(window: Window, limits: Limits) -> Report:
    """Return what is found in a window."""
    drifts, speeds = drifts_of(window), speeds_of(window)
    now = asked(window.now)
    errors = wilson(sum(map(is_error, now)), len(now))
    # 499 is a client that left: neither side's fault.
    refused = wilson(sum(400 <= row["status"] < 499 for row in now), len(now))
    ratings = good_share(window.now), good_share(window.reference)
    alarms = dict(_of_drift(drifts, limits))
    # The lower end: of ten requests one that fails may be chance, of a thousand a hundred are not.
    if errors.low > limits.max_errors:
        alarms["errors"] = (
            f"the server failed {errors.shown('.1%')} of the requests, more than {limits.max_errors:.1%}"
        )
    alarms |= _of_speed(answered(window.now), limits) | _of_ratings(ratings, limits)
    return Report(window, drifts, speeds, errors, refused, ratings, alarms)


def drifts_of(window: Window) -> list[Drift]:
    """Return how each feature differs. Topics are there only where texts were logged."""
    now, reference = answered(window.now), answered(window.reference)
    # Of answered requests only: a refused one has no score, and a failed one no length.
    found = [
        drift_of_numbers(name, values_of(now, name), values_of(reference, name)) for name in NUMBERS
    ]
    languages = [
        [str(r["language"]) for r in rows if r.get("language")] for rows in (now, reference)
    ]
    found.append(drift_of_classes("language", languages[0], languages[1]))
    texts = [
        [r["prompt"] for r in rows if isinstance(r.get("prompt"), str)] for rows in (now, reference)
    ]
    found.append(drift_of_classes("topic", *topics_of(texts[0], texts[1])))
    return [each for each in found if each.num_now or each.num_reference]


def speeds_of(window: Window) -> list[Speed]:
    """Return quantiles of the times of requests that were answered."""
    found = []
    for name in TIMES:
        sides = [values_of(answered(rows), name) for rows in (window.now, window.reference)]
        if len(sides[0]):
            now, reference = ([*np.percentile(x, QUANTILES)] if len(x) else [] for x in sides)
            found.append(Speed(name, [float(x) for x in now], [float(x) for x in reference]))
    return found


def good_share(rows: Sequence[Row]) -> Interval:
    """Return the share of ratings that are good; a corrected answer is not."""
    kinds = [row["rating"] for row in rated(rows)]
    return wilson(kinds.count("up"), len(kinds))


def _of_drift(drifts: Sequence[Drift], limits: Limits) -> list[tuple[str, str]]:
    found = []
    for each in drifts:
        # Large and no chance: with many requests the smallest difference is sure, and with few a
        # large one may be chance.
        if each.is_judged and each.psi >= limits.psi and each.p < P_OF_ALARM:
            name = each.feature.replace("_", " ")
            text = (
                f"{name}: PSI {each.psi:.2f} ≥ {limits.psi:g} (p {each.p:.1g}){_most_changed(each)}"
            )
            found.append((f"drift of {name}", text))
    return found


def _most_changed(drift: Drift) -> str:
    """Return the bin whose share has changed most, in words."""
    changes = np.abs(np.array(drift.shares_now) - np.array(drift.shares_reference))
    at = int(changes.argmax())
    before, now = drift.shares_reference[at], drift.shares_now[at]
    return f"; {drift.names[at]} was {before:.0%} and is {now:.0%}"


def _of_speed(rows: Sequence[Row], limits: Limits) -> dict[str, str]:
    """Return the alarm where more than 5% of requests surely took longer than allowed."""
    if limits.max_p95_s is None:
        return {}
    seconds = values_of(rows, "seconds")
    # A quantile of few requests has no simple interval; the share beyond the limit has Wilson's.
    slow = wilson(int((seconds > limits.max_p95_s).sum()), len(seconds))
    if not slow.low > 0.05:
        return {}
    return {"latency": f"{slow.shown('.1%')} of the requests took more than {limits.max_p95_s:g} s"}


def _of_ratings(ratings: tuple[Interval, Interval], limits: Limits) -> dict[str, str]:
    # Sure, and as large as asked for; without ratings on a side it is NaN, and no alarm.
    change = newcombe(*ratings)
    if not (change.high < 0 and change.value <= -limits.max_drop):
        return {}
    now, reference = ratings
    return {
        "ratings": f"{now.shown('.0%')} of the ratings are good, and were {reference.shown('.0%')}"
    }
