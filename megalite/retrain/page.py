"""The page of a round: what it learned from, how the models compare, and why one is served."""

from __future__ import annotations

import time
from collections.abc import Mapping
from html import escape
from typing import Any

from megalite.retrain.judge import Verdict
from megalite.utils.pages import html_page, html_table

COLORS = {"swapped": "var(--good)", "kept": "var(--warn)"}


def page_of(state: Mapping[str, Any], verdict: Verdict, outcome: str, text: str) -> str:
    """Return the page of a round with this `state`; `text` says why it came to `outcome`."""
    began = time.strftime("%Y-%m-%d %H:%M", time.gmtime(state["began"]))
    rows = [
        ["new rows to train on", f"{state['num_train']:,}"],
        ["new rows held out", f"{state['num_held_out']:,}"],
        ["held-out rows that judge", f"{verdict.num_rows:,}"],
        ["of these the new model finds likelier", f"{verdict.num_better:,}"],
        ["gain in nats per token [95%]", verdict.gain.shown("+.4f") if verdict.num_rows else "-"],
        ["margin that must surely be exceeded", f"{state['margin']:g}"],
        ["served before", f"{state['served']} ({state['version']})"],
    ]
    compared = _compared("Tasks", verdict.tasks) + _compared("Bias", verdict.bias)
    if verdict.bias:
        sides = (("served", "served"), ("candidate", "new"))
        drawn = (f'<a href="bias-{side}.html">{name}</a>' for side, name in sides)
        compared += f"<p>Intervals: {', '.join(drawn)}.</p>"
    reasons = "".join(f"<li>{escape(reason)}</li>" for reason in verdict.reasons)
    why = f"<h2>Why it is not better</h2><ul>{reasons}</ul>" if reasons else ""
    return html_page(
        f"Round {state['number']}: {outcome}",
        f'<p style="color:{COLORS[outcome]}"><b>{escape(text)}</b></p><p>Begun {began} (UTC).</p>'
        f"{html_table(['', ''], rows)}{scale(verdict) if verdict.num_rows else ''}{compared}{why}"
        "<p>The gain is the mean over held-out questions of how much likelier the new model finds the answer that "
        "people want, per token; its interval is a bootstrap's. No round trains on these questions.</p>",
    )


def _compared(what: str, pairs: Mapping[str, tuple[float, float]]) -> str:
    """Return a headed table of what the served and the new model have; nothing without any."""
    rows = [[name, f"{a:.4f}", f"{b:.4f}", f"{b - a:+.4f}"] for name, (a, b) in pairs.items()]
    table = html_table(["", "served", "new", "new − served"], rows)
    return f"<h2>{what}</h2>{table}" if rows else ""


def scale(verdict: Verdict) -> str:
    """Return the gain drawn as a point with its interval, beside zero."""
    gain, width = verdict.gain, 520
    # Zero in the middle and the same scale to both sides, so that a glance tells gain from loss.
    reach = 1.15 * max(abs(gain.low), abs(gain.high), 1e-9)

    def at(value: float) -> str:
        return f"{width / 2 * (1 + value / reach):.1f}"

    return (
        f'<svg width="{width}" height="56" viewBox="0 0 {width} 56" role="img" aria-label="gain with its interval">'
        f'<line x1="{at(0)}" x2="{at(0)}" y1="4" y2="36" stroke="#8a8a8a" stroke-dasharray="4 3"/>'
        f'<line x1="{at(gain.low)}" x2="{at(gain.high)}" y1="20" y2="20" stroke="#2a6fbb" stroke-width="4"/>'
        f'<circle cx="{at(gain.value)}" cy="20" r="6" fill="#2a6fbb"/>'
        f'<text x="{at(0)}" y="52" text-anchor="middle" font-size="12" fill="currentColor">as served</text></svg>'
    )
