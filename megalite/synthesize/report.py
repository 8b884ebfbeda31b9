"""What a recipe came to: counts by reason, and costs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from megalite.synthesize.config import RecipeConfig
from megalite.utils.pages import aligned

if TYPE_CHECKING:
    from megalite.synthesize.run import Tally


def report_of(recipe: RecipeConfig, tally: Tally, num_short: int) -> dict[str, Any]:
    """Return the values of report.json. `num_short` evaluation texts are too short to look for."""
    return {
        "rows": tally.rows,
        "wanted": recipe.rows,
        "stopped": tally.stopped,
        "slots": tally.slots,
        "rejected": dict(tally.rejected.most_common()),
        "spent": {"endpoint": vars(tally.spent), "judge": vars(tally.judged)},
        "short_evaluation_texts": num_short,
    }


def lines_of(report: dict[str, Any], recipe: RecipeConfig) -> Iterator[str]:
    """Yield the lines of a report for the console."""
    yield f"{recipe.output}/rows.jsonl: {report['rows']:,} of {report['wanted']:,} rows from {report['slots']:,} slots"
    if report["stopped"]:
        yield f"{report['stopped']}, before there were enough rows"
    if report["rejected"]:
        yield f"rejected, in {recipe.output}/rejected.jsonl:"
        rows = [[f"  {reason}", f"{count:,}"] for reason, count in report["rejected"].items()]
        yield from aligned(rows)
    for name, spent in report["spent"].items():
        if spent["requests"]:
            yield _spent(name, spent, getattr(recipe, name) or recipe.endpoint)
    if short := report["short_evaluation_texts"]:
        yield f"{short:,} evaluation texts are too short to be looked for"


def _spent(name: str, spent: dict[str, Any], endpoint: Any) -> str:
    """Return what one endpoint took."""
    cost = f", cost {spent['cost']:.4g}" if endpoint.price else ""
    again = spent["tries"] - spent["requests"]
    told = [f", {again:,} tries more"] if again else []
    told += [f", {spent['unmetered']:,} of unknown size"] if spent["unmetered"] else []
    return (
        f"{name}: {spent['requests']:,} requests{''.join(told)}, {spent['prompt_tokens']:,} tokens of prompts, "
        f"{spent['completion_tokens']:,} of answers{cost}"
    )
