"""How the tokens of one step are spread over experts, over the whole global batch and so the same
on every layout; and its picture, experts.png."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from megalite.comm.collectives import all_reduce
from megalite.comm.mesh import Mesh
from megalite.kernels.experts import count_rows
from megalite.models.architecture import Architecture, ExpertsSpec
from megalite.models.experts import Router
from megalite.observe.jsonl import read_metrics
from megalite.observe.plot import new_figure
from megalite.observe.steps import Record
from megalite.parallel.stage import Stage
from megalite.utils.files import replacing


class ExpertLoads:
    """Counts the tokens of each expert from `begin` on, in training, until `end`."""

    def __init__(
        self, stages: Sequence[Stage], mesh: Mesh, architecture: Architecture, sequence: bool
    ):
        """`architecture` is that of the whole model. `sequence`: sequence parallelism is on."""
        self._mesh = mesh
        parts = [layer.feed_forward for layer in (*architecture.layers, *architecture.predictors)]
        self.num_experts = {
            number: x.num_experts for number, x in enumerate(parts) if isinstance(x, ExpertsSpec)
        }
        """Of the layers that have any."""
        self._routers = [
            (int(number), module)
            for stage in stages
            for number, layer in stage.model.layers.items()
            for module in layer.modules()
            if isinstance(module, Router)
        ]
        # Without sequence parallelism all tensor ranks route the same tokens.
        self._counts = sequence or mesh.tensor.rank == 0
        self._handles: list[RemovableHandle] = []
        self.loads = torch.zeros(0, 0)
        """Of the last measured step: tokens of each expert over the layer's mean, [layers with
        experts, experts]; not a number where another layer has more experts."""

    def begin(self) -> None:
        """Begin to count a step."""
        shape = (len(self.num_experts), max(self.num_experts.values(), default=0))
        self._visits = torch.zeros(shape, dtype=torch.int64, device=self._mesh.device)
        rows = {number: row for row, number in enumerate(self.num_experts)}
        for number, router in self._routers:
            self._handles.append(router.register_forward_hook(self._note(rows[number])))

    def _note(self, row: int) -> Any:
        def note(router: nn.Module, arguments: Any, out: tuple[Tensor, Tensor, Tensor]) -> None:
            # What is computed again counts again, for all experts of a layer alike: shares do not
            # change.
            if router.training and self._counts:
                # out[2]: the experts of each token, [B, T, K]. A layer with fewer experts leaves
                # the last columns 0.
                self._visits[row] += count_rows(out[2], self._visits.shape[1])

        return note

    def end(self) -> Record:
        """Return measures of each layer by name, and keep `loads`, all on the device. All ranks
        call it."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        visits = all_reduce(self._visits, self._mesh.world).double()
        record: Record = {}
        self.loads = torch.full_like(visits, torch.nan)
        for row, (number, count) in enumerate(self.num_experts.items()):
            # In balance each expert has 1/E of the visits, a load of 1, and the entropy is 1, its
            # largest.
            share = visits[row, :count] / visits[row].sum().clamp(min=1.0)
            self.loads[row, :count] = share * count
            record[f"expert_load/{number}"] = (share.max() * count).float()
            # `xlogy` is 0 at 0, where a share times its logarithm would be NaN.
            entropy = -torch.xlogy(share, share).sum()
            record[f"expert_entropy/{number}"] = (entropy / math.log(count)).float()
            record[f"dead_experts/{number}"] = (share == 0).sum().float()
        return record


def plot_loads(
    loads: Tensor, layers: Sequence[int], step: int, metrics_path: Path, out_path: Path
) -> None:
    """Draw the loads of a step, and the largest of each layer over the steps in `metrics_path`, to
    `out_path` (PNG), which appears only when complete.

    `loads` are those of `ExpertLoads`, `layers` the numbers of their layers. Raises ImportError
    without matplotlib."""
    from matplotlib import colormaps
    from matplotlib.colors import TwoSlopeNorm

    values = loads.cpu().numpy()
    figure = new_figure(10, 7)
    now, over_steps = figure.subplots(2, 1, height_ratios=[1.4, 1])
    image = now.imshow(
        values, aspect="auto", cmap="RdBu_r", norm=TwoSlopeNorm(1.0, 0.0, max(2.0, float(np.nanmax(values)))),
        interpolation="nearest",
    )  # fmt: skip
    now.set_title(
        f"tokens of each expert over the mean, step {step:,}",
        loc="left",
        fontsize=13,
        fontweight="bold",
    )
    now.set_xlabel("expert", fontsize=11)
    now.set_ylabel("layer", fontsize=11)
    ticks = range(0, len(layers), max(1, len(layers) // 12))
    now.set_yticks([*ticks], [str(layers[tick]) for tick in ticks])
    figure.colorbar(image, ax=now, shrink=0.9)
    records = [
        record for record in read_metrics(metrics_path) if f"expert_load/{layers[0]}" in record
    ]
    steps = [record["step"] for record in records]
    for place, number in enumerate(layers):
        # The yellow end of the map is too light for lines on white.
        color = colormaps["viridis"](place / max(1, len(layers) - 1) * 0.85)
        label = f"layer {number}" if place in (0, len(layers) - 1) else None
        largest = [record.get(f"expert_load/{number}") for record in records]
        over_steps.plot(
            steps, np.array(largest, dtype=float), color=color, linewidth=1.4, label=label
        )
    over_steps.axhline(1.0, color="#8a8a8a", linewidth=1, linestyle=(0, (5, 4)))
    over_steps.set_ylim(bottom=0.9)
    over_steps.set_xlabel("step", fontsize=11)
    over_steps.set_ylabel("largest load over the mean", fontsize=11)
    over_steps.legend(frameon=False, fontsize=11)
    for axes in (now, over_steps):
        axes.spines[["top", "left", "right", "bottom"]].set_visible(False)
        axes.tick_params(length=0, labelsize=10, labelcolor="#444444")
    over_steps.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    with replacing(out_path) as temporary:
        figure.savefig(temporary, format="png", facecolor="white")
