"""loss.png: the loss curves, learning rate and gradient norm of a run, drawn from its
metrics.jsonl."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megalite.observe.band import Band
from megalite.observe.jsonl import read_metrics
from megalite.utils.files import replacing
from megalite.utils.notebook import NotebookPicture, in_notebook

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, INK, GREY = "#2a6fbb", "#d9661f", "#3a8f5c", "#222222", "#8a8a8a"
SHARE_OF_TIME = 0.02  # drawing reads the whole file again, and must not weigh on a long run
DRAWN_POINTS = 20_000  # more raw points than this are thinned out; the picture is 1,600 pixels wide

Records = list[dict[str, float | None]]
"""Records of a metrics.jsonl, as `read_metrics` yields them."""


class PlotSink:
    """Sink that redraws loss.png at evaluations, as often as SHARE_OF_TIME allows, and at the
    end. A notebook shows it."""

    name = "loss.png"

    def __init__(self, metrics_path: Path, out_path: Path, band: Band | None = None):
        self._metrics_path = metrics_path
        self._out_path = out_path
        self._band = band
        self._not_before = 0.0
        self._shown = NotebookPicture() if in_notebook() else None

    def step(self, record: dict[str, float]) -> None:
        pass

    def evaluation(self, record: dict[str, float]) -> None:
        if time.perf_counter() >= self._not_before:
            self._draw()

    def tasks(self, record: dict[str, float]) -> None:
        pass

    def samples(self, step: int, prompts: Sequence[str], answers: Sequence[str]) -> None:
        pass

    def close(self, status: str) -> None:
        self._draw()

    def _draw(self) -> None:
        began = time.perf_counter()
        plot_loss(self._metrics_path, self._out_path, band=self._band)
        # A run that is stopped in its first step has none.
        if self._shown and self._out_path.exists():
            self._shown.show(self._out_path)
        now = time.perf_counter()
        self._not_before = now + (now - began) / SHARE_OF_TIME


def plot_loss(
    metrics_path: Path,
    out_path: Path,
    reference: Mapping[str, float] | None = None,
    band: Band | None = None,
) -> None:
    """Draw the losses in `metrics_path` over the steps to `out_path` (PNG), which appears only when
    complete.

    `reference` adds named losses as horizontal lines, such as the entropy of a unigram model, and
    `band` what the validation losses are expected between. Draws nothing before the first step.
    Raises ImportError without matplotlib."""
    records = list(read_metrics(metrics_path))
    train = [record for record in records if "loss" in record]
    valid = [record for record in records if "valid_loss" in record]
    if not train:
        return

    figure = new_figure(10, 6.5)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3.2, 1])
    norm = lower.twinx()  # rates are about 1e-4 and norms about 1: no scale fits both
    shown = _draw_losses(upper, train, valid, reference or {})
    if band:
        shown.append(_draw_band(upper, band, column(train, "step")))
    limit_to(upper, shown)
    upper.legend(frameon=False, fontsize=11, loc="upper right")
    title = metrics_path.resolve().parent.name
    upper.set_title(title, loc="left", fontsize=15, fontweight="bold", color=INK, pad=10)
    _draw_rate_and_norm(lower, norm, train)

    for axes in (upper, lower, norm):
        style(axes)
    # None below, where the lines of one scale would cross the curve of the other.
    upper.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    upper.set_axisbelow(True)

    with replacing(out_path) as temporary:
        figure.savefig(temporary, format="png", facecolor="white")


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure, in inches. Raises ImportError without matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Figure and canvas by hand: pyplot would keep global state and might look for a display.
    figure = Figure(figsize=(width, height), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def style(axes: Axes) -> None:
    """Give axes the look of all pictures: no frame, no ticks."""
    axes.spines[["top", "left", "right", "bottom"]].set_visible(False)
    axes.tick_params(length=0, labelsize=10, labelcolor="#444444")
    axes.margins(x=0.01)


def count_along(axes: Axes) -> None:
    """Let the x axis count: whole numbers alone, in thousands and millions where they are large."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def _draw_losses(
    axes: Axes,
    train: Records,
    valid: Records,
    reference: Mapping[str, float],
) -> list[np.ndarray]:
    """Draw the training loss, raw and smoothed, the validation loss and the reference lines. Return
    what must be in sight."""
    step = column(train, "step")
    loss = column(train, "loss")
    valid_loss = column(valid, "valid_loss")
    reach = window(train)
    some = thin(train)
    line = smooth(smooth(loss, reach), reach)  # twice: a spike becomes a hill, not a box
    axes.plot(step[some], loss[some], color=BLUE, alpha=0.35, linewidth=0.9)
    label = f"training  {_last(line):.3f}"
    axes.plot(step[some], line[some], color=BLUE, linewidth=2, label=label)
    if valid:
        label = f"validation  {_last(valid_loss):.3f}"
        axes.plot(
            column(valid, "step"),
            valid_loss,
            "o-",
            color=ORANGE,
            linewidth=1.2,
            markersize=5,
            label=label,
        )
    for name, value in reference.items():
        label = f"{name}  {value:.3f}"
        axes.axhline(value, color=GREY, linewidth=1.2, linestyle=(0, (5, 4)), label=label, zorder=1)
    axes.set_ylabel("loss (nats per token)", fontsize=11)
    # Low losses are seen; a spike may leave the picture at its top.
    return [line, _percentile(loss, 1), valid_loss, np.array(list(reference.values()))]


def _draw_band(axes: Axes, band: Band, steps: np.ndarray) -> np.ndarray:
    """Draw what the validation losses are expected between, up to the last of `steps`. Return what is
    expected there: low, middle and high."""
    at = np.unique(np.linspace(1, steps.max(), 400).astype(int))
    low, middle, high = band(at)
    axes.fill_between(at, low, high, color=ORANGE, alpha=0.18, linewidth=0, zorder=0)
    label = "predicted"
    if np.isfinite(middle[-1]):
        label += f"  {middle[-1]:.3f}  ({low[-1]:.3f} to {high[-1]:.3f})"
    axes.plot(at, middle, color=ORANGE, linewidth=1.2, linestyle=(0, (3, 2)), label=label)
    return np.array([low[-1], middle[-1], high[-1]])


def _draw_rate_and_norm(rate: Axes, norm: Axes, train: Records) -> None:
    """Draw the learning rate and the gradient norm, which share the steps but not the scale."""
    step = column(train, "step")
    lr = column(train, "lr")
    grad_norm = column(train, "grad_norm")
    some = thin(train)
    norm.plot(step[some], grad_norm[some], color=GREY, alpha=0.6, linewidth=0.8)
    limit_to(norm, [smooth(grad_norm, window(train)), _percentile(grad_norm, 98), np.zeros(1)])
    rate.plot(step[some], lr[some], color=GREEN, linewidth=1.8)
    rate.set_ylim(bottom=0)
    rate.set_ylabel("learning rate", fontsize=11, color=GREEN)
    norm.set_ylabel("gradient norm", fontsize=11, color=GREY)
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)
    rate.set_xlabel("step", fontsize=11)
    count_along(rate)
    rate.set_zorder(norm.get_zorder() + 1)  # the learning rate in front of the noisy norm
    rate.patch.set_visible(False)  # or its background would hide the norm


def window(records: Records) -> int:
    """Return the reach to either side over which the losses of a run are smoothed."""
    return max(1, len(records) // 60)


def thin(records: Records) -> slice:
    """Return which of the records are drawn."""
    return slice(None, None, 1 + len(records) // DRAWN_POINTS)


def column(records: Records, key: str) -> np.ndarray:
    """Return a value of each record; NaN where it has none."""
    return np.array([record.get(key) for record in records], dtype=float)  # None becomes nan


def _last(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite[-1]) if len(finite) else float("nan")


def _percentile(values: np.ndarray, percent: float) -> np.ndarray:
    """Return a percentile of the finite `values` as an array of one, empty where none is finite."""
    finite = values[np.isfinite(values)]
    return np.percentile(finite, [percent]) if len(finite) else finite


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Return the moving mean of the finite `values` over up to `window` points to either side.

    The first points take fewer, as many to the left as to the right: otherwise the steep beginning
    of a loss would be bent."""
    finite = np.isfinite(values)
    # Differences of running sums give every mean in one pass.
    known = np.where(finite, values, 0.0)
    total = np.concatenate([[0.0], np.cumsum(known)])
    count = np.concatenate([[0], np.cumsum(finite)])
    index = np.arange(len(values))
    # Symmetric at the beginning; at the end the window is cut on the right alone.
    reach = np.minimum(window, index)
    low = index - reach
    high = np.minimum(index + reach + 1, len(values))
    # A window without a finite value is 0 / 0, a gap in the curve.
    with np.errstate(invalid="ignore"):
        return (total[high] - total[low]) / (count[high] - count[low])


def limit_to(axes: Axes, curves: Iterable[np.ndarray]) -> None:
    """Set the y axis to the range of `curves`, so that one spike of the raw values does not flatten
    the rest."""
    values = np.concatenate(list(curves))
    values = values[np.isfinite(values)]
    if len(values):
        margin = 0.05 * (values.max() - values.min()) or 0.05
        axes.set_ylim(values.min() - margin, values.max() + margin)
