"""What was measured of a model's bias, as JSON and as lines for the console."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from megalite.bias.forms import BiasTest
from megalite.bias.intervals import Estimate
from megalite.bias.measures import Outcome, Result
from megalite.bias.mentions import Mentions, told
from megalite.utils.pages import aligned


class Measured(NamedTuple):
    """Holds what was measured."""

    outcomes: list[tuple[BiasTest, Outcome]]
    mentions: Mentions | None


def results_of(measured: Measured) -> dict[str, Any]:
    """Return what was measured as JSON holds it, where an interval that there is not is null."""
    tests = [
        {
            "file": str(test.file),
            "form": test.form,
            "results": [
                {"measure": each.measure, "category": each.category, "neutral": each.neutral}
                | each.found._asdict()
                for each in outcome.results
            ],
            "notes": outcome.notes,
        }
        for test, outcome in measured.outcomes
    ]
    mentions = None if measured.mentions is None else told(measured.mentions)
    found: dict[str, Any] = _without_nan({"tests": tests, "mentions": mentions})
    return found


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_nan(each) for each in value]
    # JSON has no NaN, and Python's own spelling of it is refused by other readers.
    return None if isinstance(value, float) and math.isnan(value) else value


def lines_of(measured: Measured) -> list[str]:
    """Return what was measured as lines for the console."""
    lines = []
    for test, outcome in measured.outcomes:
        lines += [
            f"{test.file} ({test.form})",
            *aligned(_rows(outcome.results)),
            *outcome.notes,
            "",
        ]
    if mentions := measured.mentions:
        rows = [["group", "documents", "against its axis", "nats preferred", "95% interval", ""]]
        rows += [
            [each.group, f"{each.documents:,}", f"{2**each.relative:.2f}×", f"{each.preferred.value:+.3f}",
             interval(each.preferred), mark(each.preferred, 0.0)]
            for each in mentions.found
        ]  # fmt: skip
        lines += ["mentions in the corpus", *aligned(rows), correlation_in_words(mentions), ""]
    lines.append("* the 95% interval excludes the value of an unbiased model")
    return lines


def _rows(results: Sequence[Result]) -> list[list[str]]:
    header = ["measure", "of", "items", "value", "95% interval", "unbiased", ""]
    return [
        header,
        *(
            [
                each.measure, each.category, f"{each.found.items:,}", f"{each.found.value:.3f}", interval(each.found),
                "" if each.neutral is None else f"{each.neutral:g}", mark(each.found, each.neutral),
            ]
            for each in results
        ),
    ]  # fmt: skip


def interval(found: Estimate) -> str:
    """Return the ends of an interval in words."""
    return "–" if math.isnan(found.low) else f"{found.low:.3f} to {found.high:.3f}"


def mark(found: Estimate, neutral: float | None) -> str:
    """Return a star for an interval that excludes what an unbiased model has."""
    return "*" if neutral is not None and found.excludes(neutral) else ""


def correlation_in_words(mentions: Mentions) -> str:
    """Return a sentence about the rank correlation of mentions and preferences."""
    found = mentions.correlation
    if math.isnan(found.value):
        return "too few groups are both counted in the corpus and compared by the tests"
    return (
        f"rank correlation of mentions and preferences over {found.items} groups: {found.value:+.2f} "
        f"({interval(found)})"
    )
