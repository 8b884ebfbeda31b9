"""`megalite monitor`: from a log of requests to a page, a state of alarms and an exit status."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megalite.checkpoint.folder import write_json
from megalite.errors import ConfigError
from megalite.monitor.alarms import AlarmState, tell
from megalite.monitor.page import draw, drift_table, page_of, prometheus_text, service_table
from megalite.monitor.records import read_window
from megalite.monitor.report import Limits, Report, examine
from megalite.utils.files import replacing
from megalite.utils.pages import aligned


def monitor(
    log: Path,
    reference: Path | None,
    window_s: float,
    limits: Limits,
    output: Path,
    webhook: str | None,
) -> tuple[Report, list[str]]:
    """Examine the last `window_s` seconds of the request log `log` against `reference`, another log,
    or against what is before them.

    Write the folder `output`: monitor.html, monitor.png, monitor.json, monitor.prom, and alarms.json,
    which remembers which alarms stand; tell `webhook` of those that begin or end. Return what was
    found, and lines for the console. Raises ConfigError and DataError."""
    window = read_window(log, reference, window_s)
    report = examine(window, limits)
    try:
        output.mkdir(parents=True, exist_ok=True)
        # The page before the webhook: who is told looks there.
        lines = _write(report, limits, reference is None, output)
        state = AlarmState(output / "alarms.json")
        # In the log's time, so that the same log says the same whenever it is looked at.
        state.update(report.alarms, window.end)
        warnings = tell(state, webhook)
    except OSError as error:
        raise ConfigError(f"--output {output}: {error.strerror or error}") from None
    return report, [*lines, *(f"warning: {text}" for text in warnings)]


def _write(report: Report, limits: Limits, reference_is_before: bool, output: Path) -> list[str]:
    """Write the page and what machines read; return lines about it."""
    picture: Path | None = output / "monitor.png"
    lines = []
    try:
        draw(report, reference_is_before, output / "monitor.png")
    except ImportError:
        picture = None
        lines.append("there is no picture: it needs matplotlib, pip install 'megalite[observe]'")
    texts = {
        "monitor.html": page_of(report, limits, picture),
        "monitor.prom": prometheus_text(report),
    }
    for name, text in texts.items():
        with replacing(output / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    write_json(output / "monitor.json", report.as_json())
    return [*lines, f"{output / 'monitor.html'}: the same, drawn"]


def told(report: Report, lines: Sequence[str]) -> list[str]:
    """Return what the console shows."""
    found = [*aligned(drift_table(report)), "", *aligned(service_table(report)), ""]
    found += [f"ALARM {text}" for text in report.alarms.values()] or ["no alarm stands"]
    return [*found, *lines]
