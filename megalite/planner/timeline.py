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
NARROWEST_EDGED_IN = 0.04
"""Inches a pass needs for a white edge."""
NARROWEST_PASS_IN = 0.08
"""Inches of the shortest pass, below which the middle of a step is left out."""


def draw_timeline(estimate: Estimate, path: Path) -> None:
    """Draw the timeline of an `estimate` that was made with `record` to `path` (PNG).

    Raises ImportError without matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    assert estimate.timeline.events, "estimate(…, record=True) keeps the events a picture needs"
    scale, unit = _unit(estimate.step_time_s)
    parts = _parts(estimate)
    height_in = 1.9 + 0.42 * max(estimate.plan.pipeline, 2)
    figure = Figure(figsize=(WIDTH_IN, height_in), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(1, len(parts), sharey=True, squeeze=False)[0]
    inches_a_second = WIDTH_IN * 0.9 / sum(end - start for start, end in parts)
    for axes, (start, end) in zip(all_axes, parts, strict=True):
        axes.set_xlim(start * scale, end * scale)
        axes.set_ylim(estimate.plan.pipeline - 0.4, -0.5)
        _draw(axes, estimate, scale, inches_a_second)
    _dress(figure, all_axes, estimate, unit)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", facecolor="white")


def _parts(estimate: Estimate) -> list[tuple[float, float]]:
    """Return what is drawn of the step, from and to in seconds: all of it or, where passes would be
    too narrow to be told apart, its beginning and its end. What lies between goes on alike."""
    passes = [event for event in estimate.timeline.events if event.kind in ("F", "B", "I", "W")]
    shortest = min(event.end - event.start for event in passes)
    end = estimate.step_time_s
    legible = shortest * WIDTH_IN * 0.9 / NARROWEST_PASS_IN
    # What fills and drains a pipeline is drawn whole.
    firsts = [event for event in passes if event.micro_batch == 0 and event.kind == "F"]
    fill = max(event.start for event in firsts)
    shown = max(legible, 4 * fill)
    if shown * 1.5 >= end:
        return [(0.0, end)]
    return [(0.0, shown / 2), (end - shown / 2, end)]


def _draw(axes: Any, estimate: Estimate, scale: float, inches_a_second: float) -> None:
    """Draw the passes and collectives of all pipeline ranks; the axes show what lies in them."""
    events, plan = estimate.timeline.events, estimate.plan
    passes_end = estimate.timeline.passes_end * scale
    # What no pass covers later is waiting.
    for rank in range(plan.pipeline):
        axes.barh(rank, passes_end, height=HEIGHT, color=BUBBLE, zorder=1)
    passes = [event for event in events if event.kind in ("F", "B", "I", "W")]
    # Edges around narrower boxes would hide them, and look like waiting.
    shortest = min(event.end - event.start for event in passes)
    wide = shortest * inches_a_second >= NARROWEST_EDGED_IN
    for kind in ("F", "B", "I", "W"):
        for chunk in range(plan.virtual):
            # Stage number // pipeline ranks is its place among the virtual stages of its rank.
            of_kind = [event for event in events if event.kind == kind]
            chosen = [event for event in of_kind if event.stage // plan.pipeline == chunk]
            colour = _lighter(COLOURS[kind], 0.55 * chunk / plan.virtual)
            _boxes(axes, chosen, scale, HEIGHT, 0.0, colour, edge=wide)
    below = (HEIGHT + TRAFFIC_HEIGHT) / 2 + 0.02
    for kind in ("gather", "reduce"):
        chosen = [event for event in events if event.kind == kind]
        _boxes(axes, chosen, scale, TRAFFIC_HEIGHT, below, COLOURS[kind], edge=False)
    end, width = estimate.timeline.end * scale, estimate.optimizer_s * scale
    for rank in range(plan.pipeline):
        axes.barh(rank, width, left=end, height=HEIGHT, color=OPTIMIZER, zorder=3)
    _number(axes, events, scale, inches_a_second)


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


def _number(axes: Any, events: Iterable[Event], scale: float, inches_a_second: float) -> None:
    """Write the number of its micro-batch into each pass that is wide enough."""
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
                clip_on=True,  # there are some before and behind what the axes show
            )


def _dress(figure: Any, all_axes: Any, estimate: Estimate, unit: str) -> None:
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
    about = [
        f"{schedule}{plan.micro_batches} micro-batches",
        f"bubble {estimate.bubble:.1%}",
        f"MFU {estimate.mfu:.1%}",
    ]
    if len(all_axes) > 1:
        about.append("beginning and end: what lies between goes on alike")
    # Texts that the layout does not see, as they are wider than the first axes; a title keeps their room.
    all_axes[0].set_title(" ", fontsize=13, pad=30)
    title = f"{model} on {plan.world_size} × {hardware.chip.chip}: one step, predicted"
    above = {"xycoords": "axes fraction", "textcoords": "offset points", "annotation_clip": False}
    bold = all_axes[0].annotate(
        title, (0, 1), xytext=(0, 27), fontsize=13, fontweight="bold", color=INK, **above
    )
    plain = all_axes[0].annotate(
        "   ·   ".join(about), (0, 1), xytext=(0, 9), fontsize=10, color="#444444", **above
    )
    for text in (bold, plain):
        text.set_in_layout(False)
    labels = ["every rank"]
    if plan.pipeline > 1:
        labels = [f"pipeline {rank}" for rank in range(plan.pipeline)]
    all_axes[0].set_yticks(range(plan.pipeline), labels)
    for axes in all_axes:
        axes.set_xlabel(unit, fontsize=10)
        axes.spines[["top", "left", "right"]].set_visible(False)
        axes.spines["bottom"].set_color("#bbbbbb")
        axes.tick_params(axis="y", length=0, labelsize=9)
        axes.tick_params(axis="x", labelsize=9, color="#bbbbbb")
