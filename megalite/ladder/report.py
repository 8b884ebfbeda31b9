"""What a ladder has found: a table and the law, ladder.json, and a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megalite.ladder.config import LadderConfig, Rung
from megalite.ladder.curve import over_law, report_of
from megalite.ladder.fit import DRAWN, Fit, Runs
from megalite.utils.counts import compact
from megalite.utils.files import replacing

NUMBERS = ("E", "A", "B", "alpha", "beta")


def write_report(ladder: LadderConfig, rungs: Sequence[Rung], runs: Runs) -> list[str]:
    """Write ladder.json and ladder.png to the folder of `ladder`, and return the lines for the
    console. `runs` holds what was measured of the `rungs`, in their order."""
    fit = Fit(runs)
    found = findings(ladder, rungs, fit)
    # Before the picture, which needs matplotlib: the numbers are what took days.
    with replacing(ladder.folder / "ladder.json") as temporary:
        temporary.write_text(json.dumps(found, indent=2), encoding="utf-8")
    draw(fit, ladder, ladder.folder / "ladder.png")
    return [*told(found), f"{ladder.folder / 'ladder.png'} shows it; ladder.json has the numbers"]


def findings(ladder: LadderConfig, rungs: Sequence[Rung], fit: Fit) -> dict[str, Any]:
    """Return what ladder.json holds: the runs of the `rungs`, the law of `fit` with its intervals,
    and what it predicts of the goals of `ladder`."""
    runs, law = fit.runs, fit.law
    off = runs.losses / law.loss(runs.parameters, runs.tokens) - 1
    measured = []
    for rung, loss, error in zip(rungs, runs.losses, off, strict=True):
        measured.append(
            {
                "run": rung.name,
                "parameters": rung.parameters,
                "tokens": rung.tokens,
                "loss": float(loss),
                "off": float(error),
            }
        )
    intervals = {}
    for name in NUMBERS:
        drawn = [getattr(each, name) for each in fit.drawn]
        intervals[name] = fit.interval(drawn).tolist()
    predictions = []
    for goal in ladder.predict:
        loss, low, high = fit.predict(goal.parameters, goal.tokens)
        best = float(law.best_parameters(6 * goal.parameters * goal.tokens))
        predictions.append(
            goal.model_dump() | {"loss": loss, "interval": [low, high], "best_parameters": best}
        )
    ways = [
        over_law(ladder.folder / rung.name, law, rung.parameters, rung.tokens) for rung in rungs
    ]
    return {
        "runs": measured,
        "law": {name: float(getattr(law, name)) for name in NUMBERS},
        "intervals": intervals,
        # How far the law may be trusted: the same fit, asked for what is known.
        "held_out": {"run": rungs[runs.largest].name} | held_out(runs),
        "predictions": predictions,
        "curve": report_of(fit.drawn, [way for way in ways if way]),
    }


def told(found: dict[str, Any]) -> list[str]:
    """Return what was found as lines for the console."""
    lines = [f"{'run':16}{'parameters':>14}{'tokens':>16}{'loss':>10}{'off the law':>13}"]
    lines += [
        f"{x['run']:16}{x['parameters']:>14,.0f}{x['tokens']:>16,}{x['loss']:>10.4f}{x['off']:>+13.2%}"
        for x in found["runs"]
    ]
    law, held = found["law"], found["held_out"]
    wrong_by = held["measured"] / held["predicted"] - 1
    lines.append(
        f"L = {law['E']:.4f} + {law['A']:.4g}/N^{law['alpha']:.4f} + {law['B']:.4g}/D^{law['beta']:.4f}"
    )
    ranges = (f"{name} {low:.4g} to {high:.4g}" for name, (low, high) in found["intervals"].items())
    lines.append(f"90% of {DRAWN} draws: {', '.join(ranges)}")
    lines.append(
        f"without its largest run, {held['run']}, the law predicts {held['predicted']:.4f} for it; it has "
        f"{held['measured']:.4f} ({wrong_by:+.2%})"
    )
    lines += [
        f"{x['parameters']:.4g} parameters, {x['tokens']:.4g} tokens: {x['loss']:.4f} "
        f"({x['interval'][0]:.4f} to {x['interval'][1]:.4f}); the same FLOPs are best spent on "
        f"{x['best_parameters']:.3g} parameters"
        for x in found["predictions"]
    ]
    return lines


def held_out(runs: Runs) -> dict[str, float]:
    """Return the loss of the largest run as the others predict it, and as it is."""
    largest = runs.largest
    law = Fit(runs.without(largest)).law
    predicted = law.loss(runs.parameters[largest], runs.tokens[largest])
    return {"predicted": float(predicted), "measured": float(runs.losses[largest])}


def draw(fit: Fit, ladder: LadderConfig, picture: Path) -> None:
    """Draw the losses by tokens and by FLOPs, the law of `fit`, and what it predicts of the goals
    of `ladder`, with intervals, to the PNG `picture`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs, law = fit.runs, fit.law
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), sharey=True)
    sizes = sorted(set(runs.parameters.tolist()))
    furthest = max([runs.tokens.max(), *(goal.tokens for goal in ladder.predict)])
    tokens = np.geomspace(runs.tokens.min() / 2, furthest * 2, 100)
    for number, size in enumerate(sizes):
        # The yellow end of the map is too light for lines on white.
        color = plt.get_cmap("viridis")(number / max(1, len(sizes) - 1) * 0.85)
        here = runs.parameters == size
        left.plot(
            runs.tokens[here],
            runs.losses[here],
            "o",
            color=color,
            label=f"{compact(size)} parameters",
        )
        left.plot(tokens, law.loss(size, tokens), "-", color=color, linewidth=1)
        right.plot(6 * size * runs.tokens[here], runs.losses[here], "o", color=color)
    spent = 6 * runs.parameters * runs.tokens
    most = max([spent.max(), *(6 * goal.parameters * goal.tokens for goal in ladder.predict)])
    flops = np.geomspace(spent.min() / 2, most * 2, 100)
    best = law.best_parameters(flops)
    lowest = law.loss(best, flops / 6 / best)
    right.plot(flops, lowest, "k-", linewidth=1, label="best size for the FLOPs")
    for goal in ladder.predict:
        loss, low, high = fit.predict(goal.parameters, goal.tokens)
        # An interval of few draws may lie beside the law itself; matplotlib refuses such bars.
        bars = [[max(0.0, loss - low)], [max(0.0, high - loss)]]
        label = f"predicted: {compact(goal.parameters)}"
        for axes, x in ((left, goal.tokens), (right, 6 * goal.parameters * goal.tokens)):
            axes.errorbar(
                x, loss, bars, fmt="*", color="#d9661f", markersize=11, capsize=3, label=label
            )
    for axes, what in ((left, "tokens"), (right, "FLOPs, 6·N·D")):
        axes.set(xscale="log", xlabel=what)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    left.set_ylabel("validation loss (nats per token)")
    figure.tight_layout()
    with replacing(picture) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    plt.close(figure)
