"""Hidden states that are to be like those of a frozen model: a loss between the outputs of pairs of
layers (Romero et al. 2015; Sanh et al. 2019), beside the objective."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch.nn as nn
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from megalite.comm.mesh import Mesh
from megalite.config.section import Section
from megalite.models.layer_loss import LayerLoss
from megalite.models.layers import IGNORE
from megalite.models.projections import NAME
from megalite.parallel.apply import wrap
from megalite.parallel.stage import Inputs, Stage
from megalite.plan import Plan
from megalite.training.frozen import Asked

METRIC = "hidden"


class HiddenPair(Section):
    """A layer of the trained model whose output is to be like that of a layer of the teacher."""

    student: int = Field(ge=0, description="Layer of the trained model, from 0.")
    teacher: int = Field(ge=0, description="Layer of the teacher, from 0.")
    loss: Literal["mse", "cosine"] = Field(
        "mse",
        description="mse: mean of the squared differences of the features; cosine: 1 - cosine of the angle.",
    )
    weight: float = Field(
        1.0, gt=0, description="Weight of it, beside all else that training minimises."
    )


class HiddenMatch:
    """Attaches the loss of a pair to the output of the trained model's layer, as its mean over the
    tokens of the global batch that have a label."""

    micro: Inputs | None = None
    """The micro-batch that runs, with the frozen model's part of it."""
    count: Tensor | None = None
    """Number of labels of the global batch, []."""

    def __init__(self, pair: HiddenPair, layer: nn.Module, plan: Plan, mesh: Mesh):
        self.pair, self._tensor, self._is_cut = pair, mesh.tensor, plan.sequence
        self._loss = LayerLoss(METRIC, pair.weight)
        # As the rule of parallelism says it: one of the ranks that see the same tokens reports.
        self._loss.counts = plan.sequence or mesh.tensor.rank == 0
        projection = getattr(layer, NAME, None)
        self._projection: Callable[[Tensor], Tensor] = projection or (lambda x: x)
        layer.add_module(f"{METRIC}_loss", self._loss)
        # Outside of what is recomputed: the frozen model's states are needed once.
        wrap(layer, "forward", lambda forward: self._behind(forward))

    def _behind(self, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def matched(*arguments: Any) -> Tensor:
            x_BTD = forward(*arguments)
            return self._attach(x_BTD) if self._loss.is_on and self.micro else x_BTD

        return matched

    def _attach(self, x_BTD: Tensor) -> Tensor:
        """Return a layer's output with the loss attached."""
        micro, count = self.micro, self.count
        assert micro is not None
        assert isinstance(micro.frozen, Asked)
        assert micro.labels_BT is not None
        assert count is not None
        target_BTE = micro.frozen.layer(self.pair.teacher).float()
        found_BTE = self._projection(x_BTD).float()
        if self.pair.loss == "mse":
            losses_BT = (found_BTE - target_BTE).square().mean(2)
        else:
            losses_BT = 1 - F.cosine_similarity(found_BTE, target_BTE, dim=2)
        labels_BT = micro.labels_BT
        if self._is_cut and self._tensor.size > 1:  # hidden states are slices of the sequence
            labels_BT = labels_BT.chunk(self._tensor.size, 1)[self._tensor.rank]
        # A layer's own loss is divided by all tokens; this one is of those with a label.
        losses_BT = losses_BT.masked_fill(labels_BT == IGNORE, 0.0)
        return self._loss(x_BTD, losses_BT * (self._loss.num_tokens / count))


def match_layers(
    pairs: Sequence[HiddenPair], stages: Sequence[Stage], plan: Plan, mesh: Mesh
) -> tuple[HiddenMatch, ...]:
    """Attach the losses of `pairs` to the layers of this rank's only stage."""
    (stage,) = stages
    layers = stage.model.layers
    return tuple(HiddenMatch(pair, layers[str(pair.student)], plan, mesh) for pair in pairs)
