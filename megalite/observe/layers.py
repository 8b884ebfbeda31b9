"""Measures of each layer in one step, over the whole global batch and so the same on every layout:
the norm of its gradients, the root mean square of its output, its largest attention logit, and what
fp8 loses of its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from megalite.comm.collectives import all_reduce
from megalite.comm.mesh import Mesh
from megalite.config import Config
from megalite.engine.native import NativeEngine
from megalite.kernels.optimizer import sum_of_squares
from megalite.models import weight_table
from megalite.models.core_attention import CoreAttention
from megalite.models.fp8 import fp8_weights
from megalite.models.weights import Weight
from megalite.observe.steps import Record
from megalite.observe.underflow import Underflow
from megalite.parallel.stage import Stage

ENDS = {"first": "embeddings", "both": "embeddings", "last": "head"}
"""Names of the places of weights outside of layers."""


def largest_logit(stages: Sequence[Stage], mesh: Mesh) -> Tensor:
    """Return the largest attention logit of the step, over all layers, heads and ranks, fp32 [].
    All ranks call it, where QK-clip has the models note them."""
    largest = torch.full((), -torch.inf, device=mesh.device)
    for stage in stages:
        for module in stage.modules():
            if isinstance(module, CoreAttention) and module.largest_logits is not None:
                largest = torch.maximum(largest, module.largest_logits.max())
    return all_reduce(largest, mesh.world, dist.ReduceOp.MAX)


class LayerMeasures:
    """Measures the layers of this rank's stages from `begin` on, in training, until `end`."""

    def __init__(
        self,
        stages: Sequence[Stage],
        engine: NativeEngine,
        mesh: Mesh,
        config: Config,
        sequence: bool,
    ):
        """`config` gives the whole model. `sequence`: sequence parallelism is on."""
        self._engine, self._mesh, architecture = engine, mesh, config.model.architecture
        self._num_layers = len(architecture.layers) + len(architecture.predictors)
        trained = [
            weight for weight in weight_table(config.model, config.lora) if not weight.frozen
        ]
        self._places = [*dict.fromkeys(_name_of(weight) for weight in trained)]
        self._layers = {
            int(name): layer for stage in stages for name, layer in stage.model.layers.items()
        }
        self._cores = {
            number: [module for module in layer.modules() if isinstance(module, CoreAttention)]
            for number, layer in self._layers.items()
        }
        numbers: list[int] = []
        if config.train.fp8:
            chosen = fp8_weights(trained, config.train.fp8, config.model.num_layers)
            numbers = sorted({int(w.place) for w in chosen if not w.is_expert})
        self._underflow = Underflow(self._layers, numbers, mesh) if numbers else None
        # Without sequence parallelism all tensor ranks have the same output: one of them counts.
        self._counts = sequence or mesh.tensor.rank == 0
        self._handles: list[RemovableHandle] = []
        self._lent: list[CoreAttention] = []

    def begin(self) -> None:
        """Begin to measure a step. It costs each layer a pass over its output, and one of
        attention's products."""
        # For each layer of the whole model the sum of squares, and how many numbers it is of; this
        # rank fills in those of its own layers and tokens, and one all-reduce makes it the whole.
        self._outputs = torch.zeros(
            2, self._num_layers, dtype=torch.float64, device=self._mesh.device
        )
        if self._underflow:
            self._underflow.begin()
        for number, layer in self._layers.items():
            self._handles.append(layer.register_forward_hook(self._note(number)))
            for core in self._cores[number]:
                if core.largest_logits is None:  # else QK-clip finds them in any case
                    core.largest_logits = torch.full((1,), -torch.inf, device=self._mesh.device)
                    self._lent.append(core)

    def _note(self, number: int) -> Any:
        def note(layer: nn.Module, arguments: Any, out: Tensor) -> None:
            if layer.training and self._counts:
                found = out.detach()
                self._outputs[0, number] += sum_of_squares(found.float().flatten())
                self._outputs[1, number] += found.numel()

        return note

    def end(self) -> Record:
        """Return the measures by name, when the gradients are reduced and not yet forgotten. All
        ranks call it."""
        for handle in self._handles:
            handle.remove()
        logits = torch.full((self._num_layers,), -torch.inf, device=self._mesh.device)
        for number, cores in self._cores.items():
            for core in cores:
                assert core.largest_logits is not None
                # -inf for layers of other ranks, which MAX leaves alone.
                logits[number] = torch.maximum(logits[number], core.largest_logits.max())
        for core in self._lent:
            core.largest_logits = None
        self._handles, self._lent = [], []
        all_reduce(logits, self._mesh.world, dist.ReduceOp.MAX)
        squares, numbers = all_reduce(self._outputs, self._mesh.world)
        gradients = self._gradients()
        record: Record = {f"grad_norm/{name}": norm for name, norm in gradients.items()}
        for number in range(self._num_layers):
            record[f"activation_rms/{number}"] = (squares[number] / numbers[number]).sqrt()
            record[f"attention_logit/{number}"] = logits[number]
        if self._underflow:
            record |= self._underflow.end()
        return {
            name: value.float() if isinstance(value, Tensor) else value
            for name, value in record.items()
        }

    def _gradients(self) -> dict[str, Tensor]:
        """Return the gradient norm of each layer, of embeddings and of the head, as far as they are
        trained."""
        sums = torch.zeros(len(self._places), dtype=torch.float64, device=self._mesh.device)
        # Of this rank's shards of gradients, each of which one rank has: their sum is the whole.
        for weight, square in self._engine.gradients.squares():
            sums[self._places.index(_name_of(weight))] += square
        return dict(
            zip(self._places, all_reduce(sums, self._mesh.world).sqrt().unbind(), strict=True)
        )


def _name_of(weight: Weight) -> str:
    """Return the name of the place that a weight is at."""
    return ENDS.get(str(weight.place), str(weight.place))
