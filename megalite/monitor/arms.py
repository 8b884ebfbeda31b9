"""Two models that were served at once, or one after the other, side by side: what differs, with
intervals of 95%."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megalite.errors import ConfigError, DataError
from megalite.monitor.intervals import Interval, bootstrap, newcombe, wilson
from megalite.monitor.records import SHADOW, Row, answered, asked, is_error, rated, read_log
from megalite.utils.files import replacing
from megalite.utils.pages import html_page, html_table

NUMBERS = {"score": "score", "completion_tokens": "tokens of answers"}
"""Features whose means are compared."""
PERCENTS = (50, 95)


class Measured(NamedTuple):
    """Holds a measure of both arms and the second's difference from the first."""

    name: str
    spec: str
    """Format of its numbers."""
    one: Interval
    other: Interval
    difference: Interval

    @property
    def differs(self) -> bool:
        """Return whether zero lies outside of the difference's interval."""
        return not self.difference.low <= 0 <= self.difference.high

    def row(self) -> list[str]:
        """Return it as a row of a table."""
        shown = [x.shown(self.spec) for x in (self.one, self.other, self.difference)]
        return [self.name, *shown, "differs" if self.differs else ""]


def arms_of(rows: Sequence[Row], key: str) -> tuple[str, str]:
    """Return the two values of `key`, "arm" or "version", that the newest requests have, in the
    order in which they first came. Raise DataError where there are not two."""
    order: dict[str, float] = {}
    last: dict[str, float] = {}
    for row in rows:
        # A shadow's version has answered nobody: beside it there would be nothing to compare.
        if key == "version" and row.get("arm") == SHADOW:
            continue
        if isinstance(value := row.get(key), str):
            order.setdefault(value, row["time"])
            last[value] = row["time"]
    newest = sorted(last, key=lambda value: last[value])[-2:]
    if len(newest) < 2:
        raise DataError(
            f"the log has requests of {len(newest)} {key}s; two are compared, such as those of "
            "`megalite serve --challenger`"
        )
    one, other = sorted(newest, key=lambda value: (order[value], value))
    # A shadow is asked after what it shadows, and the first arm is called a.
    return (one, other) if key == "version" else (min(one, other), max(one, other))


def compare_arms(rows: Sequence[Row], key: str) -> tuple[tuple[str, str], list[Measured]]:
    """Return the names of two arms, and what is measured of both.

    Shares have Wilson's intervals, their differences Newcombe's; others are bootstrapped by
    clients. A shadow is compared with the answers to the same requests, pair by pair."""
    names = arms_of(rows, key)
    if SHADOW in names:
        # Both were asked the same, so that what differs between requests cancels out.
        return names, _of_pairs(rows)
    sides = [[row for row in rows if row.get(key) == name] for name in names]
    found = [_share("failed by the server", [asked(side) for side in sides], is_error)]
    found += [_ratings(rows, sides)]
    for percent in PERCENTS:
        found.append(
            _bootstrapped(f"seconds, p{percent}", ".3g", sides, "seconds", _percentile(percent))
        )
    for feature, name in NUMBERS.items():
        found.append(_bootstrapped(name, ".4g", sides, feature, _mean))
    # NaN: one side has no such row, as where nobody rated.
    return names, [each for each in found if np.isfinite(each.difference.value)]


def _share(name: str, sides: Sequence[Sequence[Row]], test: Callable[[Row], bool]) -> Measured:
    one, other = (wilson(sum(map(test, side)), len(side)) for side in sides)
    return Measured(name, ".2%", one, other, newcombe(other, one))


def _ratings(rows: Sequence[Row], sides: Sequence[Sequence[Row]]) -> Measured:
    """Return the share of good ratings of each side's answers. A rating counts for whoever gave the
    answer, wherever it was sent."""
    # A rating's own row has the arm that its sender belongs to now, which may not be the answer's.
    ids = [{row["id"] for row in side if "id" in row} for side in sides]
    kinds = [[row for row in rated(rows) if row.get("of") in found] for found in ids]
    return _share("good ratings", kinds, lambda row: bool(row["rating"] == "up"))


def _mean(values: np.ndarray) -> float:
    return float(values.mean())


def _percentile(percent: int) -> Callable[[np.ndarray], float]:
    return lambda values: float(np.percentile(values, percent))


def _bootstrapped(
    name: str,
    spec: str,
    sides: Sequence[Sequence[Row]],
    feature: str,
    measure: Callable[[np.ndarray], float],
) -> Measured:
    """Return `measure` of a feature of each side's answers."""
    found = [
        [row for row in answered(side) if isinstance(row.get(feature), int | float)]
        for side in sides
    ]
    values = [np.array([row[feature] for row in side], dtype=float) for side in found]
    clients = [[str(row.get("client")) for row in side] for side in found]
    one, other = (bootstrap([x], [who], measure) for x, who in zip(values, clients, strict=True))
    # Both sides are drawn anew in each resample: a client is with one arm only, so that they are
    # independent. Of two versions one after the other a client may be in both.
    difference = bootstrap(values, clients, lambda x, y: measure(y) - measure(x))
    return Measured(name, spec, one, other, difference)


def _of_pairs(rows: Sequence[Row]) -> list[Measured]:
    """Return means of what clients got and of what the shadow made of the same requests."""
    shadows = {row["of"]: row for row in rows if row.get("arm") == SHADOW and row.get("of")}
    shadowed = [row for row in asked(rows) if row.get("id") in shadows]
    pairs = [(row, shadows[row["id"]]) for row in shadowed]
    sides = [shadowed, [shadow for _, shadow in pairs]]
    found = [_share("failed by the server", sides, is_error)]
    for feature, name in {**NUMBERS, "seconds": "seconds"}.items():
        whole = [
            pair for pair in pairs if all(isinstance(row.get(feature), int | float) for row in pair)
        ]
        # The pair is one observation of its client: resampled together, its difference stays whole.
        clients = [str(row.get("client")) for row, _ in whole]
        one = np.array([row[feature] for row, _ in whole], float)
        other = np.array([shadow[feature] for _, shadow in whole], float)
        each = [bootstrap([x], [clients], _mean) for x in (one, other, other - one)]
        found.append(Measured(f"{name}, mean", ".4g", *each))
    return [each for each in found if np.isfinite(each.difference.value)]


def compare(log: Path, key: str, window_s: float, output: Path) -> list[list[str]]:
    """Compare two arms of the last `window_s` seconds of a log, write compare.html to the folder
    `output`, and return the table. Raises ConfigError and DataError."""
    rows, _ = read_log(log)
    # Up to the newest row, not up to now: a log may be looked at later, on another machine.
    end = float(rows[-1]["time"])
    rows = [row for row in rows if row["time"] > end - window_s]
    names, found = compare_arms(rows, key)
    table = [["", *names, f"{names[1]} − {names[0]}", ""], *(each.row() for each in found)]
    counts = [
        len([row for row in rows if row.get(key) == name and "rating" not in row]) for name in names
    ]
    text = (
        f"<p>{counts[0]:,} requests of {key} {names[0]}, {counts[1]:,} of {names[1]}, up to "
        f"{time.strftime('%Y-%m-%d %H:%M', time.gmtime(end))} (UTC). Brackets: intervals of 95%; of shares by Wilson "
        "and Newcombe, else by a bootstrap of clients. A difference whose interval has no zero in it differs; of "
        f"{len(found)} measures one in twenty does so by chance.</p>"
    )
    try:
        output.mkdir(parents=True, exist_ok=True)
        with replacing(output / "compare.html") as temporary:
            page = html_page(f"{names[0]} and {names[1]}", text + html_table(table[0], table[1:]))
            temporary.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--output {output}: {error.strerror or error}") from None
    return table
