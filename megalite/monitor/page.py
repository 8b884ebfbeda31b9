"""The dashboard of a window: one picture, and one page that holds it and the tables."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megalite.monitor.drift import LEAST_ROWS, Drift
from megalite.monitor.intervals import wilson
from megalite.monitor.records import Array, Row, answered, asked, is_error, rated, values_of
from megalite.monitor.report import P_OF_ALARM, Limits, Report
from megalite.observe.plot import BLUE, GREEN, GREY, INK, ORANGE, new_figure, style
from megalite.utils.files import replacing
from megalite.utils.pages import html_page, html_picture, html_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STEPS_S = (60, 300, 900, 3600, 4 * 3600, 86400, 7 * 86400)
"""Lengths of the parts of time that are drawn as a point each."""
MOST_POINTS = 60
RED = "#c0392b"
KEY = (
    "<p>Shaded: the window that is judged. Bars below: shares of requests, grey in the reference, blue in the window, "
    "red where an alarm stands.</p>"
)
NAME_LENGTH = 26


class Parts:
    """Divides rows by time."""

    def __init__(self, rows: Sequence[Row], start: float, end: float):
        """Divide `rows` from `start` to `end` into at most MOST_POINTS parts of a round length."""
        fits = (each for each in STEPS_S if (end - start) / each <= MOST_POINTS)
        self.step_s = next(fits, (end - start) / MOST_POINTS)
        # On whole multiples of the length, such as full hours: a page of a minute later has the same
        # parts, and one point more.
        first, last = int(start // self.step_s), int(end // self.step_s)
        self.ends = [np.datetime64(int(at * self.step_s), "s") for at in (first, last + 1)]
        """When the first one begins and the last one ends."""
        self.rows: list[list[Row]] = [[] for _ in range(last - first + 1)]
        for row in rows:
            at = int(row["time"] // self.step_s) - first
            if 0 <= at < len(self.rows):
                self.rows[at].append(row)
        self.middles = [
            np.datetime64(int((first + at + 0.5) * self.step_s), "s")
            for at in range(len(self.rows))
        ]

    def measured(self, measure: Callable[[list[Row]], float]) -> Array:
        """Return what `measure` gives of each part; NaN for a part without rows."""
        return np.array([measure(rows) if rows else np.nan for rows in self.rows], dtype=float)

    def quantile(self, key: str, percent: float) -> Array:
        """Return a quantile of a number of each part's answered requests."""

        def measure(rows: list[Row]) -> float:
            values = values_of(answered(rows), key)
            return float(np.percentile(values, percent)) if len(values) else float("nan")

        return self.measured(measure)


def draw(report: Report, reference_is_before: bool, out_path: Path) -> None:
    """Draw the picture to a PNG. Where the reference is the log before the window, curves begin
    there. Raises ImportError without matplotlib."""
    window = report.window
    rows = [*(window.reference if reference_is_before else []), *window.now]
    start = float(rows[0]["time"]) if rows else window.start
    parts = Parts(rows, min(start, window.start), window.end)
    # Without distributions the lower half would be empty.
    figure = new_figure(13, 10.5 if report.drifts else 5.5)
    upper, lower = figure.subfigures(2, 1, squeeze=False)[:, 0] if report.drifts else (figure, None)
    curves = upper.subplots(2, 2).flat
    for axes, one in zip(curves, (_requests, _latencies, _scores, _ratings), strict=True):
        one(axes, parts)
        style(axes)
        _dates(axes)
        # One axis for all: where few parts have something to show, matplotlib would take years around them.
        axes.set_xlim(*parts.ends)
        # Another log's reference is not drawn over time, and nothing needs to be told from it.
        if reference_is_before and start < window.start:
            begins = np.datetime64(int(window.start), "s")
            ends = parts.middles[-1] + np.timedelta64(int(parts.step_s / 2), "s")
            axes.axvspan(begins, ends, color="#f3f1ea", zorder=-1)
        axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
    if lower is not None:
        for axes, drift in zip(
            np.atleast_1d(lower.subplots(1, len(report.drifts))), report.drifts, strict=True
        ):
            _shares(axes, drift, stands(report, drift))
            style(axes)
    with replacing(out_path) as temporary:
        figure.savefig(temporary, format="png", facecolor="white")


def _title(axes: Axes, text: str, color: str = INK) -> None:
    axes.set_title(text, loc="left", fontsize=11, color=color)


def _make_room(axes: Axes) -> None:
    """Leave room above the curves for a legend."""
    low, high = axes.get_ylim()
    # On a logarithmic axis room is a factor, on others a length.
    is_log = axes.get_yscale() == "log"
    axes.set_ylim(low, high * (high / low) ** 0.25 if is_log else high + 0.2 * (high - low))


def _dates(axes: Axes) -> None:
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter

    locator = AutoDateLocator(maxticks=7)
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))


def _length(seconds: float) -> str:
    for size, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.3g} {name}"
    return f"{seconds:.3g} s"


def _requests(axes: Axes, parts: Parts) -> None:
    counts = np.array([len(asked(rows)) for rows in parts.rows], dtype=float)
    failed = np.array([sum(map(is_error, asked(rows))) for rows in parts.rows], dtype=float)
    width = np.timedelta64(int(parts.step_s * 0.85), "s")
    axes.bar(parts.middles, counts, width, color=BLUE, alpha=0.55, label="requests")
    if failed.any():
        axes.bar(parts.middles, failed, width, color=RED, label="failed by the server")
    _title(axes, f"requests in {_length(parts.step_s)}")
    _make_room(axes)
    axes.legend(frameon=False, fontsize=9, ncols=2, loc="upper left")


def _latencies(axes: Axes, parts: Parts) -> None:
    from matplotlib.ticker import LogLocator

    for percent, color in ((50, GREEN), (95, BLUE), (99, ORANGE)):
        values = parts.quantile("seconds", percent)
        axes.plot(
            parts.middles,
            values,
            "o-",
            color=color,
            markersize=3,
            linewidth=1.4,
            label=f"p{percent}",
        )
    first = parts.quantile("first_token_s", 95)
    if np.isfinite(first).any():
        axes.plot(parts.middles, first, "--", color=GREY, linewidth=1.2, label="first token, p95")
    # p50 and p99 are often powers of ten apart, and a change of either should show.
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.yaxis.set_minor_formatter(lambda x, _: "")
    _make_room(axes)
    _title(axes, "seconds of a request")
    axes.legend(frameon=False, fontsize=9, ncols=4, loc="upper left")


def _scores(axes: Axes, parts: Parts) -> None:
    _band(axes, parts, "score", BLUE)
    _title(axes, "score (mean log probability of answers): median, 10% to 90%")


def _band(axes: Axes, parts: Parts, key: str, color: str) -> None:
    low, middle, high = (parts.quantile(key, percent) for percent in (10, 50, 90))
    axes.fill_between(parts.middles, low, high, color=color, alpha=0.18, linewidth=0)
    axes.plot(parts.middles, middle, "o-", color=color, markersize=3, linewidth=1.6)


def _ratings(axes: Axes, parts: Parts) -> None:
    shares = []
    for rows in parts.rows:
        kinds = [row["rating"] for row in rated(rows)]
        shares.append(wilson(kinds.count("up"), len(kinds)))
    # Parts without ratings are NaN, which is not drawn.
    values, lows, highs = np.array(shares, dtype=float).T
    axes.vlines(parts.middles, lows, highs, color=GREEN, alpha=0.35, linewidth=4)
    axes.plot(parts.middles, values, "o", color=GREEN, markersize=4)
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
    _title(axes, "ratings that are good, with intervals of 95%")


def _shares(axes: Axes, drift: Drift, is_alarm: bool) -> None:
    """Draw the shares of a feature's bins, now and in the reference."""
    # One above the other, since names of topics and languages are words.
    places = np.arange(len(drift.names))
    axes.barh(places - 0.2, drift.shares_reference, 0.38, color=GREY, alpha=0.6, label="reference")
    axes.barh(places + 0.2, drift.shares_now, 0.38, color=RED if is_alarm else BLUE, label="now")
    axes.set_yticks(places, [name[:NAME_LENGTH] for name in drift.names])
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
    told = f"PSI {drift.psi:.2f}" if drift.is_judged else "too few requests"
    _title(axes, f"{_name(drift.feature)}: {told}", RED if is_alarm else INK)
    axes.locator_params(axis="x", nbins=4)


def stands(report: Report, drift: Drift) -> bool:
    """Return whether a feature's drift is an alarm."""
    return f"drift of {_name(drift.feature)}" in report.alarms


def _name(feature: str) -> str:
    return feature.replace("_", " ")


def drift_table(report: Report) -> list[list[str]]:
    """Return a header, and a row a feature."""
    rows = [["feature", "PSI", "KS", "p", "requests", "reference", ""]]
    for each in report.drifts:
        told = "" if each.is_judged else f"fewer than {LEAST_ROWS}: not judged"
        ks = "-" if each.ks is None else f"{each.ks:.3f}"
        rows.append(
            [_name(each.feature), f"{each.psi:.3f}", ks, f"{each.p:.2g}", f"{each.num_now:,}",
             f"{each.num_reference:,}", "ALARM" if stands(report, each) else told]
        )  # fmt: skip
    return rows


def service_table(report: Report) -> list[list[str]]:
    """Return a header, and a row a measure of the service."""
    window = report.window
    rows = [["measure", "now", "reference"]]
    rows.append(["requests", f"{len(asked(window.now)):,}", f"{len(asked(window.reference)):,}"])
    rows.append(["failed by the server", report.errors.shown(".2%"), ""])
    rows.append(["refused", report.refused.shown(".2%"), ""])
    for speed in report.speeds:
        name = {"seconds": "seconds", "first_token_s": "seconds to the first token"}[speed.name]
        now, before = (
            " / ".join(f"{x:.3g}" for x in side) for side in (speed.now, speed.reference)
        )
        rows.append([f"{name}, p50 / p95 / p99", now, before])
    counts = [len(rated(side)) for side in (window.now, window.reference)]
    told = [
        f"{share.shown('.0%')} of {count:,}" if count else "-"
        for share, count in zip(report.ratings, counts, strict=True)
    ]
    rows.append(["good ratings", *told])
    return rows


def page_of(report: Report, limits: Limits, picture: Path | None) -> str:
    """Return the page. `picture` is the drawn PNG, where there is one."""
    window = report.window
    times = [time.strftime("%Y-%m-%d %H:%M", time.gmtime(t)) for t in (window.start, window.end)]
    alarms = "".join(f"<li><b>{escape(text)}</b></li>" for text in report.alarms.values())
    standing = (
        f'<ul style="color:var(--bad)">{alarms}</ul>' if alarms else "<p>No alarm stands.</p>"
    )
    drawn = html_picture(picture, "curves over time, and distributions") if picture else ""
    damaged = (
        f" {window.num_damaged:,} lines were damaged and left out." if window.num_damaged else ""
    )
    drift, service = drift_table(report), service_table(report)
    return html_page(
        "The model in service",
        f"<p>{times[0]} to {times[1]} (UTC).{damaged}</p>{standing}{drawn}{KEY if drawn else ''}"
        f"<h2>Drift</h2>{html_table(drift[0], drift[1:])}"
        f"<p>PSI: population stability index over deciles of the reference, or over classes. An alarm stands from "
        f"{limits.psi:g} on where p is below {P_OF_ALARM:g}; p is that of Kolmogorov's and Smirnov's test, for classes "
        "that of the index. Requests are taken as independent of each other.</p>"
        f"<h2>Service</h2>{html_table(service[0], service[1:])}"
        "<p>Brackets: intervals of 95%, by Wilson.</p>",
    )


def prometheus_text(report: Report) -> str:
    """Return the findings in Prometheus' text format, for the textfile collector of its node
    exporter."""
    lines = [
        "# HELP megalite_drift_psi population stability index of a feature of requests",
        "# TYPE megalite_drift_psi gauge",
        *(
            f'megalite_drift_psi{{feature="{x.feature}"}} {x.psi:.6g}'
            for x in report.drifts
            if x.is_judged
        ),
        "# HELP megalite_alarms alarms of megalite monitor that stand",
        "# TYPE megalite_alarms gauge",
        f"megalite_alarms {len(report.alarms)}",
        "# HELP megalite_monitored_time end of the window, in seconds since 1970",
        "# TYPE megalite_monitored_time gauge",
        f"megalite_monitored_time {report.window.end:.3f}",
    ]
    return "\n".join(lines) + "\n"
