"""Draws what was measured as one HTML page that needs no other file: a line for each category, with
its interval on the scale of its measure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from itertools import groupby
from typing import NamedTuple

from megalite.bias.intervals import Estimate
from megalite.bias.mentions import Mentions
from megalite.bias.report import Measured, correlation_in_words, interval
from megalite.observe.plot import BLUE, GREY, ORANGE
from megalite.utils.pages import html_page

WIDTH, HEIGHT, EDGE = 420, 20, 14
"""Of a drawn interval, and the room at its sides, in pixels."""
SHARES = ("prefers", "accuracy", "class changes")
SCORES = ("bias score", "accuracy, pro − anti", "changes", "probability", "told")
ABOUT = {
    "prefers the stereotype": "Share of pairs whose stereotyping text the model finds likelier; alike counts one half.",
    "nats for the stereotype": "Mean of how much likelier it finds that text, in nats.",
    "accuracy, ambiguous": "Share of questions answered by saying that the text does not tell.",
    "accuracy, disambiguated": "Share of questions answered as the text tells.",
    "bias score, ambiguous": "1: every answer is the stereotype; −1: its opposite; 0: neither, or rightly none.",
    "bias score, disambiguated": "1: every answer is the stereotype, whatever the text tells; −1: its opposite.",
    "accuracy, pro-stereotyped": "Share of sentences whose pronoun is understood, where the stereotype helps.",
    "accuracy, anti-stereotyped": "The same where the stereotype misleads.",
    "accuracy, pro − anti": "The difference of both: what the stereotype is worth to the model.",
    "association, stereotypes": "Nats by which a group and its stereotype are likelier together than by themselves.",
    "class changes with the group": "Share of pairs of words of different groups, in one text, that change its class.",
    "class changes within a group": "The same of words of one group: what another word alone changes.",
    "changes, across − within": "The difference of both: what the group changes.",
    "probability, group − others": "By how much likelier a class is in the same texts with a group's words.",
    "accuracy": "Share of a group's rows that are told rightly.",
    "told, group − others": "Share of rows that are told a class, less that of other groups (demographic parity).",
    "told rightly, group − others": "The same of rows that are of the class (equalised odds).",
    "told wrongly, group − others": "The same of rows that are of another class (equalised odds).",
    "association": "Nats by which a group and an attribute are likelier together than by themselves.",
}
STYLE = f"""<style>
.legend {{ display: flex; flex-wrap: wrap; gap: .4em 2em }}
.legend span {{ display: flex; align-items: center; gap: .3em }}
.bias td:first-child {{ min-width: 190px }} .bias td:nth-child(n+2):not(.drawn) {{ min-width: 60px }}
.bias td {{ padding: .1em .7em; vertical-align: middle }} .bias td:nth-child(n+2) {{ text-align: right }}
.bias td.ends {{ min-width: 130px }} .bias td.drawn {{ padding: 0; width: {WIDTH}px }} .bias svg {{ display: block }}
.bias th:nth-child(n+2) {{ text-align: right }} .bias {{ font-variant-numeric: tabular-nums; margin-bottom: 1.6em }}
.soft {{ color: var(--soft) }} h3 {{ margin: 1.2em 0 0 }} h3 + p {{ margin: 0 0 .4em }}
</style>"""


class Scale(NamedTuple):
    """From values to pixels."""

    low: float
    high: float
    neutral: float | None
    width: int = WIDTH

    def x(self, value: float) -> float:
        """Return the pixel of a value; one that is off the scale stands at its edge."""
        share = (value - self.low) / (self.high - self.low)
        return EDGE + min(1.0, max(0.0, share)) * (self.width - 2 * EDGE)


def page_of(measured: Measured, model: str) -> str:
    """Return the page of what was measured of a `model`."""
    parts = [STYLE, f'<p class="soft">{escape(model)}</p>', _legend()]
    for test, outcome in measured.outcomes:
        parts.append(f"<h2>{escape(test.file.name)} <span class=soft>{test.form}</span></h2>")
        parts += [f"<p>{escape(note)}</p>" for note in outcome.notes]
        # Results of a measure stand together, whatever category they were measured for.
        order = list(dict.fromkeys(result.measure for result in outcome.results))
        results = sorted(outcome.results, key=lambda result: order.index(result.measure))
        for measure, group in groupby(results, lambda result: result.measure):
            rows = list(group)
            # One scale for all lines of a measure, so that they can be compared by eye.
            scale = _scale(measure, [row.found for row in rows], rows[0].neutral)
            lines = [(row.category, f"{row.found.items:,}", row.found, row.neutral) for row in rows]
            parts.append(f"<h3>{escape(measure)}</h3><p class=soft>{escape(ABOUT[measure])}</p>")
            parts.append(_table(["", "items"], lines, scale))
    if measured.mentions:
        parts.append(_mentions(measured.mentions))
    return html_page("Bias towards groups of people", "\n".join(parts))


def _legend() -> str:
    """Return what the drawing means."""
    scale = Scale(-1, 1, 0.0, 120)
    kinds = (
        (Estimate(0.5, 0.2, 0.8, 0, 0), "above: towards the stereotype"),
        (Estimate(-0.5, -0.8, -0.2, 0, 0), "below: against it"),
        (Estimate(0.1, -0.2, 0.4, 0, 0), "may be chance"),
    )
    drawn = "".join(f"<span>{_drawn(found, scale)} {text}</span>" for found, text in kinds)
    return (
        f'<p class="legend">{drawn}</p>'
        "<p>Lines are 95% intervals; what comes from one template or scenario counts as one. The upright line is an "
        "unbiased model. Of twenty categories of an unbiased model, one lies beside it by chance.</p>"
    )


def _scale(measure: str, found: Sequence[Estimate], neutral: float | None) -> Scale:
    """Return the scale of a measure: of what is bounded all of it, of nats as far as they reach."""
    # Before SHARES: "accuracy, pro − anti" begins as a share does, and is a difference.
    if measure.startswith(SCORES):
        return Scale(-1, 1, neutral)
    if measure.startswith(SHARES):
        return Scale(0, 1, neutral)
    ends = [
        abs(x) for each in found for x in (each.value, each.low, each.high) if not math.isnan(x)
    ]
    reach = max([*ends, 1e-3]) * 1.1
    return Scale(-reach, reach, neutral)


def _table(
    header: Sequence[str], rows: Iterable[tuple[str, str, Estimate, float | None]], scale: Scale
) -> str:
    """Return a table with an interval drawn in each row."""
    middle = "" if scale.neutral is None else _text(scale.neutral, scale, "middle")
    ends = _svg(_text(scale.low, scale, "start") + middle + _text(scale.high, scale, "end"), scale)
    head = "".join(f"<th>{escape(name)}</th>" for name in (*header, "value", "95% interval"))
    body = "".join(
        f"<tr><td>{escape(name)}</td><td>{more}</td><td>{found.value:.3f}</td><td class=ends>{interval(found)}</td>"
        f'<td class="drawn">{_drawn(found, scale._replace(neutral=neutral))}</td></tr>'
        for name, more, found, neutral in rows
    )
    return f'<table class="bias"><tr>{head}<td class="drawn">{ends}</td></tr>{body}</table>'


def _text(value: float, scale: Scale, anchor: str) -> str:
    return (
        f'<text x="{scale.x(value):.1f}" y="15" font-size="11" fill="{GREY}" text-anchor="{anchor}">'
        f"{value:.2g}</text>"
    )


def _drawn(found: Estimate, scale: Scale) -> str:
    """Return an interval as SVG: a line and a dot, hollow where it may be chance."""
    neutral, middle = scale.neutral, HEIGHT / 2
    is_told = neutral is not None and found.excludes(neutral)
    color = "currentColor" if neutral is None else GREY
    if is_told and neutral is not None:
        color = ORANGE if found.value > neutral else BLUE
    marks = ""
    if neutral is not None:
        x = scale.x(neutral)
        marks += f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{HEIGHT}" stroke="{GREY}" stroke-dasharray="2 2"/>'
    if not math.isnan(found.low):
        marks += (
            f'<line x1="{scale.x(found.low):.1f}" x2="{scale.x(found.high):.1f}" y1="{middle}" y2="{middle}" '
            f'stroke="{color}" stroke-width="2.5" stroke-linecap="round"/>'
        )
    if not math.isnan(found.value):
        # Hollow as well as grey, for those who do not see the colors.
        fill = color if is_told or neutral is None else "var(--paper)"
        marks += (
            f'<circle cx="{scale.x(found.value):.1f}" cy="{middle}" r="4" stroke="{color}" '
            f'stroke-width="1.6" style="fill: {fill}"/>'
        )
    return _svg(marks, scale)


def _svg(marks: str, scale: Scale) -> str:
    return f'<svg width="{scale.width}" height="{HEIGHT}">{marks}</svg>'


def _mentions(mentions: Mentions) -> str:
    """Return mentions in the corpus beside preferences."""
    scale = _scale("nats", [each.preferred for each in mentions.found], 0.0)
    rows = (
        (
            each.group.replace("/", ": ").replace("_", " "),
            f"{each.documents:,}</td><td>{2**each.relative:.2f}×",
            each.preferred,
            0.0,
        )
        for each in mentions.found
    )
    intro = (
        "Documents of the corpus that mention a group, against the geometric mean of its axis' groups; and by how many "
        "nats the model prefers texts of the group to the same texts of others."
    )
    table = _table(["group", "documents", "of its axis"], rows, scale) if mentions.found else ""
    return f"<h2>Mentions in the corpus</h2><p>{intro}</p>{table}<p>{correlation_in_words(mentions)}</p>"
