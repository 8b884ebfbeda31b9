"""Several runs side by side: their curves over steps, tokens and hours, what they came to, and in
which settings they differ. One picture, and one HTML page that holds it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megalite.errors import ConfigError
from megalite.observe.console import clock
from megalite.observe.plot import (
    INK,
    Records,
    column,
    count_along,
    limit_to,
    new_figure,
    smooth,
    style,
    thin,
    window,
)
from megalite.observe.runs import RunRecord
from megalite.utils.changes import flat, spelled
from megalite.utils.counts import compact
from megalite.utils.files import replacing
from megalite.utils.pages import html_page, html_picture, html_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_RUNS = 10
COLORS = (
    "#2a6fbb", "#d9661f", "#3a8f5c", "#b03a6f", "#7a52b3", "#8a6d1f", "#1f9aa0", "#c0392b", "#555555", "#6f9b1f",
)  # fmt: skip
"""One for each run: told apart also by who does not see red and green, by the legend's order."""
AXES = ("step", "tokens", "time")
UNITS = {"hours": 3600.0, "minutes": 60.0, "seconds": 1.0}
NAMES_APART = ("run.name", "run.dir")
"""Settings in which all runs differ."""


def compare(
    folders: Sequence[Path], output: Path
) -> tuple[list[list[str]], list[list[str]], list[str]]:
    """Compare the runs in `folders`, and write compare.png and compare.html to the folder `output`.

    Return the table of what they came to, that of the settings in which they differ, and lines on
    what was written. Raises ConfigError for folders without steps."""
    if not 2 <= len(folders) <= MOST_RUNS:
        raise ConfigError(f"give 2 to {MOST_RUNS} runs to compare, not {len(folders)}")
    # Everything is read before anything is written: a folder without steps leaves the last page alone.
    runs = dict(zip(_names(folders), map(RunRecord, folders), strict=True))
    records = {name: run.records() for name, run in runs.items()}
    for name, run in runs.items():
        if not any("loss" in record for record in records[name]):
            raise ConfigError(f"{run.folder} is no run with a step: its metrics.jsonl has no loss")
    results, settings = table_of_results(runs, records), table_of_settings(runs)
    picture, page, lines, drawn = output / "compare.png", output / "compare.html", [], ""
    try:
        output.mkdir(parents=True, exist_ok=True)
        try:
            draw(records, picture)
            drawn = html_picture(picture, "losses of the runs")
            lines.append(f"{picture}: the losses over steps, tokens and time")
        except ImportError:
            lines.append(
                "there is no picture: it needs matplotlib, pip install 'megalite[observe]'"
            )
        with replacing(page) as temporary:
            temporary.write_text(page_of(runs, results, settings, drawn), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--output {output}: {error.strerror or error}") from None
    return results, settings, [*lines, f"{page}: the same with the tables, in one file"]


def _names(folders: Sequence[Path]) -> list[str]:
    """Return a name for each run: the last part of its folder, or all of it where two are alike."""
    last = [folder.resolve().name for folder in folders]
    names = [
        name if last.count(name) == 1 else str(folder)
        for name, folder in zip(last, folders, strict=True)
    ]
    if len(set(names)) < len(names):
        raise ConfigError("a run is given twice; each is compared with the others")
    return names


def table_of_results(
    runs: Mapping[str, RunRecord], records: Mapping[str, Records]
) -> list[list[str]]:
    """Return a header and a row a run: how far it is, and what it came to."""
    rows = [["run", "state", "steps", "tokens", "time", "loss", "best valid", "tokens/s", "MFU"]]
    for name, run in runs.items():
        train = _train(records[name])
        valid = column(_validations(records[name]), "valid_loss")
        valid = valid[np.isfinite(valid)]
        # Of all steps the median: a few are slow, by a compilation or another job on the machine.
        speed, mfu = (_median(column(train, key)) for key in ("tokens_per_s", "mfu"))
        rows.append(
            [
                name,
                run.state,
                f"{int(train[-1]['step'] or 0):,}",
                compact(train[-1].get("tokens") or 0),
                clock(seconds_of(train)[-1]),
                f"{_last_losses(train):.4f}",
                f"{valid.min():.4f}" if len(valid) else "-",
                f"{speed:,.0f}",
                f"{mfu:.1%}" if np.isfinite(mfu) else "-",
            ]
        )
    return rows


def _last_losses(train: Records) -> float:
    """Return the mean loss of the last twentieth of the steps, for a single one is noisy."""
    # A single step's loss is that of its batch.
    losses = column(train, "loss")[-max(1, len(train) // 20) :]
    losses = losses[np.isfinite(losses)]
    return float(losses.mean()) if len(losses) else float("nan")


def table_of_settings(runs: Mapping[str, RunRecord]) -> list[list[str]]:
    """Return a header and a row for each setting that is not alike in all runs."""
    configs = [flat(run.config) for run in runs.values()]
    rows = [["setting", *runs]]
    for key in dict.fromkeys(key for config in configs for key in config):
        values: list[Any] = [config.get(key) for config in configs]
        # A setting that one config lacks is null there, as it is where it says nothing.
        if key not in NAMES_APART and any(value != values[0] for value in values):
            rows.append([key, *map(spelled, values)])
    return rows


def draw(records: Mapping[str, Records], out_path: Path) -> None:
    """Draw the losses of runs over steps, tokens and hours to a PNG. Raises ImportError without
    matplotlib."""
    figure = new_figure(15, 5.6)
    panels = figure.subplots(1, 3, sharey=True)
    longest = max(seconds_of(_train(found))[-1] for found in records.values())
    # The largest unit of which the longest run has two or more.
    unit = next((name for name, size in UNITS.items() if longest >= 2 * size), "seconds")
    labels = {"step": "steps", "tokens": "tokens", "time": f"{unit} of steps"}
    for axes, key in zip(panels, AXES, strict=True):
        shown = [
            _draw_run(axes, found, key, UNITS[unit], name, color)
            for (name, found), color in zip(records.items(), COLORS, strict=False)
        ]
        limit_to(axes, itertools.chain.from_iterable(shown))
        style(axes)
        axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.set_xlabel(labels[key], fontsize=11)
        if key != "time":
            count_along(axes)
    panels[0].set_ylabel("loss (nats per token)", fontsize=11)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(
        handles,
        names,
        loc="outside upper left",
        ncols=min(len(names), 5),
        frameon=False,
        fontsize=11,
    )
    text = "lines: training, smoothed; dots: validation"
    panels[0].set_title(text, loc="left", fontsize=10, color=INK)
    with replacing(out_path) as temporary:
        figure.savefig(temporary, format="png", facecolor="white")


def _draw_run(
    axes: Axes, records: Records, key: str, unit_s: float, name: str, color: str
) -> tuple[np.ndarray, np.ndarray]:
    """Draw the losses of one run over `key`, one of AXES; time in units of `unit_s` seconds. Return
    the smoothed and the validation losses."""
    train = _train(records)
    valid = _validations(records)
    x = seconds_of(train) / unit_s if key == "time" else column(train, key)
    loss, reach, some = column(train, "loss"), window(train), thin(train)
    line = smooth(smooth(loss, reach), reach)  # twice, as in loss.png
    axes.plot(x[some], line[some], color=color, linewidth=1.8, label=name)
    losses = column(valid, "valid_loss")
    # Validations have steps only: where a step is on another axis, its own record says.
    at = np.interp(column(valid, "step"), column(train, "step"), x) if valid else losses
    axes.plot(
        at, losses, "o", color=color, markersize=4.5, markeredgecolor="white", markeredgewidth=0.7
    )
    return line, losses


def _train(records: Records) -> Records:
    return [record for record in records if "loss" in record]


def _validations(records: Records) -> Records:
    return [record for record in records if "valid_loss" in record]


def seconds_of(train: Records) -> np.ndarray:
    """Return how long each step and those before it took, validations and saves left out."""
    return np.cumsum(np.nan_to_num(column(train, "step_time_s")))


def _median(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if len(finite) else float("nan")


def page_of(
    runs: Mapping[str, RunRecord],
    results: list[list[str]],
    settings: list[list[str]],
    drawn: str,
) -> str:
    """Return the page. `drawn` is the picture as HTML."""
    differ = (
        html_table(settings[0], settings[1:])
        if settings[1:]
        else "<p>The configs differ in nothing.</p>"
    )
    where = "".join(
        f"<li>{escape(name)}: {escape(str(run.folder.resolve()))}</li>"
        for name, run in runs.items()
    )
    return html_page(
        " · ".join(runs),
        f"{drawn}\n<h2>What they came to</h2>{html_table(results[0], results[1:])}"
        "<p>loss: the mean of the last twentieth of the steps; time: that of steps alone.</p>"
        f"\n<h2>Settings that differ</h2>{differ}\n<h2>Folders</h2><ul>{where}</ul>",
    )
