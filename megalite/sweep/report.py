"""What a sweep has found: a table, best.yaml, pictures, and one HTML page with all of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megalite.config_file import parse_config, short_yaml
from megalite.sweep.config import SweepConfig
from megalite.sweep.study import OUTCOME, RUN, own_trials
from megalite.utils.files import replacing
from megalite.utils.pages import aligned, html_page, html_picture, html_table
from megalite.utils.resources import read_yaml

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from optuna import Study
    from optuna.trial import FrozenTrial

SHOWN = 20
"""Trials in the table on the console."""
NAMED = 6
"""Trials whose validations are drawn in colour."""
TITLES = {
    "history": "History: each trial, and the best so far",
    "importance": "Importance of each setting",
    "slice": "Each setting alone",
    "parallel": "Settings of each trial",
    "progress": "Validations of each trial",
    "pareto": "What is best in one metric for what it costs in the others",
}


def write_report(sweep: SweepConfig, study: Study) -> list[str]:
    """Write what the sweep has found so far to its folder, and return the lines for the console."""
    trials = own_trials(study.get_trials(deepcopy=False))
    ranked = rank(sweep, trials)
    header, rows = table(sweep, ranked)
    best = best_trials(study)
    lines = aligned([header, *rows[:SHOWN]])
    if len(rows) > SHOWN:
        lines.append(f"… and {len(rows) - SHOWN} more in {sweep.folder / 'report.html'}")
    if best:
        text = best_config(sweep, best[0])
        with replacing(sweep.folder / "best.yaml") as temporary:
            temporary.write_text(text, encoding="utf-8")
        lines.append(
            f"the best is {best[0].user_attrs[RUN]}; its config is {sweep.folder / 'best.yaml'}"
        )
    else:
        lines.append("no trial is complete, so there is no best one")
    pictures, lacking = draw(sweep, study)
    lines += lacking
    with replacing(sweep.folder / "report.html") as temporary:
        temporary.write_text(page(sweep, header, rows, best, pictures), encoding="utf-8")
    lines.append(
        f"{sweep.folder / 'report.html'} shows all trials" + (", with pictures" if pictures else "")
    )
    return lines


def rank(sweep: SweepConfig, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Return the trials with the best first, by the first metric; those without a value last."""
    sign = -1.0 if sweep.objective[0].grows else 1.0
    states = ("COMPLETE", "PRUNED", "FAIL", "RUNNING", "WAITING")

    def key(trial: FrozenTrial) -> tuple[int, float, int]:
        value = sign * trial.values[0] if trial.state.name == "COMPLETE" else 0.0
        return states.index(trial.state.name), value, trial.number

    return sorted(trials, key=key)


def best_trials(study: Study) -> list[FrozenTrial]:
    """Return the best trial; of several metrics those than which none is better in all; none where
    none is complete."""
    try:
        return list(study.best_trials) if len(study.directions) > 1 else [study.best_trial]
    except ValueError:
        return []


def best_config(sweep: SweepConfig, trial: FrozenTrial) -> str:
    """Return the config of a trial as YAML, for a run of its own: what is not the default."""
    values = read_yaml(sweep.folder / trial.user_attrs[RUN] / "trial.yaml")
    # `run:` with nothing below it is None.
    values["run"] = (read_yaml(sweep.config).get("run") or {}) | {"name": f"{sweep.name}-best"}
    metrics = [each.metric for each in sweep.objective]
    pairs = zip(metrics, trial.values, strict=True)
    found = ", ".join(f"{metric} {value:.6g}" for metric, value in pairs)
    return (
        f"# {trial.user_attrs[RUN]} of {sweep.folder}: {found}\n{short_yaml(parse_config(values))}"
    )


def table(sweep: SweepConfig, trials: Sequence[FrozenTrial]) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of a table of `trials`."""
    header = ["run", *(each.metric for each in sweep.objective), "steps", *sweep.space, "outcome"]
    rows = []
    for trial in trials:
        values = trial.values if trial.state.name == "COMPLETE" else [None] * len(sweep.objective)
        # Reports are by step: the last one is how far the trial came.
        steps = max(trial.intermediate_values, default=None)
        # A trial whose worker died has failed without a word of why.
        without = {"RUNNING": "runs", "WAITING": "waits"}.get(trial.state.name, "failed")
        outcome = trial.user_attrs.get(OUTCOME) or without
        found = [*values, steps, *(trial.params.get(key, "") for key in sweep.space)]
        rows.append([trial.user_attrs.get(RUN, "-"), *map(_cell, found), outcome])
    return header, rows


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def draw(sweep: SweepConfig, study: Study) -> tuple[dict[str, Path], list[str]]:
    """Draw the pictures that there are enough trials for; return them by name, and lines for the
    console."""
    states = [trial.state.name for trial in study.get_trials(deepcopy=False)]
    if states.count("COMPLETE") < 2:
        return {}, []
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return {}, ["there are no pictures: these need matplotlib, pip install 'megalite[observe]'"]
    pictures = {}
    for name, plot in _plots(sweep, study).items():
        path = sweep.folder / f"{name}.png"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # optuna calls its pictures experimental
            try:
                plot()
            except (ValueError, RuntimeError):
                # Trials that have too little in common for this picture.
                pyplot.close("all")
                continue
            for axes in pyplot.gcf().axes:
                if axes.get_xscale() == "log":
                    # Within a decade each label is a product, such as 2 × 10⁻³, wider than its place.
                    axes.tick_params(axis="x", which="both", rotation=60)
            with replacing(path) as temporary:
                pyplot.gcf().savefig(
                    temporary, format="png", dpi=110, bbox_inches="tight", facecolor="white"
                )
        pyplot.close("all")
        pictures[name] = path
    return pictures, []


def _plots(sweep: SweepConfig, study: Study) -> dict[str, Callable[[], Any]]:
    """Return what draws each picture."""
    from optuna.importance import PedAnovaImportanceEvaluator
    from optuna.visualization import matplotlib as plots

    names = [each.metric for each in sweep.objective]
    if len(names) > 3:
        return {}  # the front has no picture in more than three dimensions
    if len(names) > 1:
        return {"pareto": lambda: plots.plot_pareto_front(study, target_names=names)}
    (name,) = names
    # PED-ANOVA, since optuna's default evaluator (fANOVA) needs scikit-learn.
    found: dict[str, Callable[[], Any]] = {
        "history": lambda: plots.plot_optimization_history(study, target_name=name),
        "importance": lambda: plots.plot_param_importances(
            study, evaluator=PedAnovaImportanceEvaluator(), target_name=name
        ),
        "slice": lambda: _spread_out(plots.plot_slice(study, target_name=name)),
        "parallel": lambda: plots.plot_parallel_coordinate(study, target_name=name),
        "progress": lambda: _draw_validations(
            rank(sweep, own_trials(study.get_trials(deepcopy=False))), name
        ),
    }
    return found


def _spread_out(panels: Axes | Sequence[Axes]) -> None:
    """Give each of several panels in a row room for the name of its setting and the numbers below
    it."""
    from matplotlib import pyplot
    from matplotlib.axes import Axes

    each = [panels] if isinstance(panels, Axes) else panels
    pyplot.gcf().set_size_inches(3.6 * len(each) + 1, 4.5)
    for axes in each:
        axes.xaxis.label.set_fontsize(9)
        axes.tick_params(axis="x", which="both", labelrotation=60, labelsize=8)


def _draw_validations(ranked: Sequence[FrozenTrial], name: str) -> None:
    """Draw what validations found in each trial, the best of them in colour and by the names of
    their runs."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    colors = pyplot.get_cmap("viridis")
    drawn = [trial for trial in ranked if trial.intermediate_values]
    for place, trial in reversed(list(enumerate(drawn))):  # the best lies on top
        steps, values = zip(*sorted(trial.intermediate_values.items()), strict=True)
        if place < NAMED and trial.state.name == "COMPLETE":
            style: dict[str, Any] = {"color": colors(place / NAMED), "label": trial.user_attrs[RUN]}
        else:
            style = {"color": "0.7", "linewidth": 1}
        axes.plot(steps, values, "o-", markersize=3, **style)
    axes.set(xlabel="step", ylabel=name)
    axes.grid(alpha=0.3)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(0.91, 0.5))


def page(
    sweep: SweepConfig,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    best: Sequence[FrozenTrial],
    pictures: dict[str, Path],
) -> str:
    """Return one HTML page that needs no other file."""
    drawn = "".join(
        f"<h2>{escape(TITLES[name])}</h2>{html_picture(path, name)}"
        for name, path in pictures.items()
    )
    winner = (
        f"<h2>The best config</h2><pre>{escape(best_config(sweep, best[0]))}</pre>" if best else ""
    )
    metrics = ", ".join(
        f"{each.metric} ({'most' if each.grows else 'least'})" for each in sweep.objective
    )
    told = f"{metrics}; {len(rows)} trials, {sweep.sampler}, pruner {sweep.pruner}."
    return html_page(
        sweep.name, f"<p>{escape(told)}</p>\n{html_table(header, rows)}\n{drawn}{winner}"
    )
