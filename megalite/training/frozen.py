"""A second, frozen model beside the trained one: the teacher of a distillation, or a reference that
is asked anew in every step. It is built by the same code, on the same ranks and layout, and has no
gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn
from torch import Tensor

from megalite.checkpoint.load import OpenModel, from_hf
from megalite.comm.mesh import Mesh
from megalite.config import Config
from megalite.errors import ConfigError
from megalite.infer.ranks import load_stage
from megalite.models import model_config, weight_table
from megalite.parallel.outputs import HiddenStates, LastStage
from megalite.parallel.rules import vocab_size_of
from megalite.parallel.stage import Inputs, Stage
from megalite.plan import make_plan

if TYPE_CHECKING:
    from megalite.parallel.pipeline import Pipeline


class Asked:
    """What the frozen model makes of a micro-batch, computed when it is first asked for."""

    def __init__(self, run: Callable[[], HiddenStates], layers: dict[int, Tensor]):
        """`run` computes it, and leaves outputs of layers in `layers`."""
        self._run, self._left = run, layers
        self._found: HiddenStates | None = None
        self._layers: dict[int, Tensor] = {}

    def __call__(self) -> HiddenStates:
        """Return the hidden states that the head takes. They are not kept for another call."""
        found, self._found = self._found or self._run(), None
        return found

    def layer(self, number: int) -> Tensor:
        """Return the output of a layer that is tapped, [B,T,D], once."""
        if number not in self._layers:
            self._found = self._run()
            self._layers |= self._left
            self._left.clear()
        return self._layers.pop(number)


class FrozenModel:
    """This rank's stages of a frozen model, which computes hidden states of the trained model's
    inputs."""

    def __init__(self, stages: Sequence[Stage], last_stage: LastStage, pipeline: Pipeline | None):
        self._stages, self._last_stage, self._pipeline = stages, last_stage, pipeline
        self._tapped: dict[int, Tensor] = {}

    def tap(self, layers: Iterable[int]) -> None:
        """Keep the outputs of some layers, by their numbers, for `Asked.layer`."""
        (stage,) = self._stages
        for number in layers:

            def keep(module: nn.Module, inputs: Any, out: Tensor, number: int = number) -> None:
                self._tapped[number] = out

            stage.model.layers[str(number)].register_forward_hook(keep)

    def beside(self, inputs: Sequence[Inputs]) -> list[Inputs]:
        """Return micro-batches with what the frozen model makes of each, which `Inputs.frozen`
        gives. With a pipeline it is computed here, and kept as hidden states; otherwise when it is
        asked for. A collective."""
        # Without dropout keys nothing is dropped: the frozen model answers as it would after
        # training.
        asked = [
            replace(micro, output="hidden_states", places=replace(micro.places, key_B=None))
            for micro in inputs
        ]
        if self._pipeline is None:
            return [
                replace(micro, frozen=Asked(partial(self._run, each), self._tapped))
                for micro, each in zip(inputs, asked, strict=True)
            ]
        # All micro-batches before the first trained one: two pipelines cannot take turns within a
        # schedule. What is kept is hidden states [B, T, D], much smaller than logits.
        found = self._pipeline.forward(asked)
        if not found:  # before the last stage
            return list(inputs)
        return [
            replace(micro, frozen=partial(self._read, out))
            for micro, out in zip(inputs, found, strict=True)
        ]

    @torch.no_grad()
    def _run(self, inputs: Inputs) -> HiddenStates:
        return self._read(self._stages[0](None, inputs))

    @torch.no_grad()
    def _read(self, out: torch.Tensor) -> HiddenStates:
        found = self._last_stage.read(out, "hidden_states")
        assert isinstance(found, HiddenStates)
        return found


def load_frozen(
    folder: Path,
    config: Config,
    mesh: Mesh,
    dtype: torch.dtype,
    open_model: OpenModel = from_hf,
) -> FrozenModel:
    """Load the Hugging Face model in `folder`, in the precision `dtype`, on the layout of `config`
    over `mesh`; `open_model` opens it.

    Raises ConfigError where it does not fit the layout, and CheckpointError where it cannot be
    read."""
    model = model_config({"hf": folder}).without_predictors()
    if config.data.seq_length > model.max_positions:
        raise ConfigError(
            f"data.seq_length = {config.data.seq_length} is longer than the {model.max_positions} positions of the "
            f"model in {folder}"
        )
    # There is no backward pass to save memory for, and hidden states are asked for instead of
    # losses.
    # Nor is it what is to be trained in fewer bits.
    train = config.train.model_copy(
        update={"recompute": "none", "compile": False, "fp8": None, "fake_quantize": None}
    )
    config = config.model_copy(update={"model": model, "lora": None, "train": train})
    table = weight_table(model)
    try:
        plan = make_plan(config, table, mesh.world.size)
    except ConfigError as error:
        raise ConfigError(f"the model in {folder}: {error}") from None
    stages = [
        load_stage(folder, model, plan, span, mesh, train, dtype, open_model)[0]
        for span in plan.stages_of(mesh.pipeline.rank)
    ]
    pipeline = None
    if plan.pipeline > 1:
        from megalite.parallel.pipeline import Pipeline  # torch's schedules import its compiler

        # Shapes of forward passes follow from their inputs; only the hidden size and the dtype
        # matter.
        hidden = torch.empty((1, 1, model.hidden_size), dtype=dtype, device="meta")
        pipeline = Pipeline(stages, plan, mesh, hidden, [None] * len(stages))
    return FrozenModel(
        stages,
        LastStage(stages[-1].model, mesh.tensor, plan.sequence, vocab_size_of(table)),
        pipeline,
    )
