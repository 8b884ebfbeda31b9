"""Draws a simulated step: one row for each pipeline rank, time to the right."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megalite.planner.estimate import Estimate
from megalite.planner.simulate import Event
from megalite.utils.files import replacing

COLOURS = {
    "F": "#2a6fbb",
    "B": "#d9661f",
    "I": "#d9661f",
    "W": "#3a8f5c",
    "gather": "#7a5aa6",
    "reduce": "#8a8a8a",
}
NAMES = {
    "F": "forward",
    "B": "backward",
    "I": "backward, input",
    "W": "backward, weights",
    "gather": "weights gathered",
    "reduce": "gradients reduced",
    "optimizer": "norm and optimizer",
}
OPTIMIZER, BUBBLE, INK = "#222222", "#eae7df", "#222222"

HEIGHT, TRAFFIC_HEIGHT = 0.62, 0.14
"""Heights of a rank's passes and of the collectives drawn below them, in a row of height 1."""

WIDTH_IN, DPI = 14.0, 150
NARROWEST_LABEL_IN = 0.17
"""Inches a pass needs for the number of its micro-batch."""


def draw_timeline(estimate: Estimate, path: Path) -> None:
    """Draw the timeline of an `estimate` that was made with `record` to `path` (PNG).

    Raises ImportError without matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    events = estimate.timeline.events
    plan = estimate.plan
    assert events, "estimate(…, record=True) keeps the events a picture needs"
    scale, unit = _unit(estimate.step_time_s)
    rows = plan.pipeline
    height_in = 1.9 + 0.42 * max(rows, 2)
    figure = Figure(figsize=(WIDTH_IN, height_in), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_xlim(0, estimate.step_time_s * scale)
    axes.set_ylim(rows - 0.4, -0.5)
    passes_end = estimate.timeline.passes_end * scale
    # What no pass covers later is waiting.
    for rank in range(rows):
        axes.barh(rank, passes_end, height=HEIGHT, color=BUBBLE, zorder=1)
    few = len(events) < 4000  # edges around more boxes would hide them
    for kind in ("F", "B", "I", "W"):
        for chunk in range(plan.virtual):
            # Stage number // pipeline ranks is its place among the virtual stages of its rank.
            of_kind = [event for event in events if event.kind == kind]
            chosen = [event for event in of_kind if event.stage // plan.pipeline == chunk]
            colour = _lighter(COLOURS[kind], 0.55 * chunk / plan.virtual)
            _boxes(axes, chosen, scale, HEIGHT, 0.0, colour, edge=few)
    below = (HEIGHT + TRAFFIC_HEIGHT) / 2 + 0.02
    for kind in ("gather", "reduce"):
        chosen = [event for event in events if event.kind == kind]
        _boxes(axes, chosen, scale, TRAFFIC_HEIGHT, below, COLOURS[kind], edge=False)
    end = estimate.timeline.end * scale
    for rank in range(rows):
        axes.barh(
            rank, estimate.optimizer_s * scale, left=end, height=HEIGHT, color=OPTIMIZER, zorder=3
        )
    _number(axes, events, scale, estimate.step_time_s)
    _dress(figure, axes, estimate, unit)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", facecolor="white")


def _unit(seconds: float) -> tuple[float, str]:
    return (1.0, "seconds") if seconds >= 1 else (1e3, "milliseconds")


def _boxes(
    axes: Any,
    events: Sequence[Event],
    scale: float,
    height: float,
    below: float,
    colour: str,
    edge: bool,
) -> None:
    """Draw a box for each event, `below` the middle of its rank's row."""
    from matplotlib.collections import PolyCollection

    # One collection for all boxes of a colour: there may be tens of thousands.
    corners = []
    for event in events:
        left = event.start * scale
        right = event.end * scale
        top = event.rank + below - height / 2
        bottom = event.rank + below + height / 2
        corners.append(((left, top), (right, top), (right, bottom), (left, bottom)))
    line = {"edgecolors": "white", "linewidths": 0.5} if edge else {"linewidths": 0}
    axes.add_collection(PolyCollection(corners, facecolors=colour, zorder=2, **line))


def _lighter(colour: str, share: float) -> str:
    """Mix a colour with a share of white. Later stages of a rank are lighter."""
    mixed = "#"
    for i in (1, 3, 5):
        part = int(colour[i : i + 2], 16)
        mixed += f"{round(part + (255 - part) * share):02x}"
    return mixed


def _number(axes: Any, events: Iterable[Event], scale: float, step: float) -> None:
    """Write the number of its micro-batch into each pass that is wide enough."""
    inches_a_second = WIDTH_IN * 0.9 / step
    for event in events:
        if (
            event.micro_batch >= 0
            and (event.end - event.start) * inches_a_second >= NARROWEST_LABEL_IN
        ):
            middle = (event.start + event.end) / 2 * scale
            text = str(event.micro_batch + 1)
            axes.text(
                middle,
                event.rank,
                text,
                ha="center",
                va="center",
                fontsize=7,
                color="white",
                zorder=4,
            )


def _dress(figure: Any, axes: Any, estimate: Estimate, unit: str) -> None:
    """Add legend, title, labels and scales."""
    from matplotlib.patches import Patch

    plan = estimate.plan
    hardware = estimate.hardware
    seen = {event.kind for event in estimate.timeline.events}
    kinds = [kind for kind in COLOURS if kind in seen]
    if "I" in kinds:  # of the same colour as B
        kinds = [kind for kind in kinds if kind != "B"]
    handles = [Patch(color=COLOURS[kind], label=NAMES[kind]) for kind in kinds]
    handles += [
        Patch(color=OPTIMIZER, label=NAMES["optimizer"]),
        Patch(color=BUBBLE, label="waiting"),
    ]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9, handlelength=1.1,
        columnspacing=1.6,
    )  # fmt: skip
    model = estimate.config.model.preset or estimate.config.model.family
    stages = "one stage" if plan.virtual == 1 else f"{plan.virtual} stages"
    schedule = f"{plan.schedule}, {stages} a rank, " if plan.pipeline > 1 else ""
    axes.set_title(
        f"{model} on {plan.world_size} × {hardware.chip.chip}: one step, predicted",
        loc="left", fontsize=13, fontweight="bold", color=INK, pad=24,
    )  # fmt: skip
    axes.annotate(
        f"{schedule}{plan.micro_batches} micro-batches   ·   bubble {estimate.bubble:.1%}   ·   MFU {estimate.mfu:.1%}",
        (0, 1), xytext=(0, 9), xycoords="axes fraction", textcoords="offset points", fontsize=10, color="#444444",
    )  # fmt: skip
    labels = ["every rank"]
    if plan.pipeline > 1:
        labels = [f"pipeline {rank}" for rank in range(plan.pipeline)]
    axes.set_yticks(range(plan.pipeline), labels)
    axes.set_xlabel(unit, fontsize=10)
    axes.spines[["top", "left", "right"]].set_visible(False)
    axes.spines["bottom"].set_color("#bbbbbb")
    axes.tick_params(axis="y", length=0, labelsize=9)
    axes.tick_params(axis="x", labelsize=9, color="#bbbbbb")
