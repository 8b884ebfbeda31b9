"""Runs a model layer by layer over rows of tokens: one layer is in memory at a time. Rows to
calibrate with go through what is quantised so far, as the model that comes out will see them;
held-out rows go through both models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from megalite.comm.mesh import Mesh
from megalite.config_file import parse_config
from megalite.data.indexed import IndexedDataset
from megalite.errors import ConfigError
from megalite.infer.ranks import load_stage
from megalite.models import weight_table
from megalite.models.layers import SequenceInfo
from megalite.models.weights import Weight
from megalite.parallel.stage import Inputs, Stage
from megalite.plan import StageSpan, make_plan
from megalite.quantization.scaling import InputStats, Scaling

ROWS_AT_A_TIME = 8


def read_rows(prefix: str, count: int, length: int) -> Tensor:
    """Return `count` rows of `length` + 1 tokens from all over a token file: [count, length + 1].
    Raises DataError, or ConfigError where there are too few."""
    dataset = IndexedDataset(prefix)
    if dataset.num_tokens < count * (length + 1):
        raise ConfigError(
            f"{prefix} has {dataset.num_tokens:,} tokens, too few for {count} rows of {length + 1:,}"
        )
    starts = torch.arange(count) * (dataset.num_tokens - length - 1) // max(1, count - 1)
    rows = [
        torch.from_numpy(dataset.tokens[start : start + length + 1].astype("int64"))
        for start in starts.tolist()
    ]
    return torch.stack(rows)


class LayerRuns:
    """The model in `folder`, run over rows of tokens [R, T + 1] one layer after another."""

    @classmethod
    def from_tokens(cls, folder: Path, prefix: str, count: int, length: int) -> LayerRuns:
        """Take `count` rows of a token file, of which every fourth measures, and is not calibrated
        with."""
        rows = read_rows(prefix, count, length)
        measures = torch.arange(count) % 4 == min(3, count - 1)
        return cls(folder, rows[~measures], rows[measures])

    def __init__(self, folder: Path, calibration: Tensor, held_out: Tensor):
        self.folder, self.held_out = folder, held_out
        config = {
            "run": {"name": "quantize"}, "model": {"hf": str(folder)},
            # What a plan of training needs and inference has not: any value does.
            "data": {"train": [{"path": "-"}], "seq_length": 1}, "train": {"steps": 1, "global_batch_size": 1},
            "optimizer": {"lr": 1.0},
        }  # fmt: skip
        parsed = parse_config(config)
        self.config = parsed.model_copy(update={"model": parsed.model.without_predictors()})
        self.table = weight_table(self.config.model)
        self.plan = make_plan(self.config, self.table, 1)
        largest = int(max(calibration.max(), held_out.max()))
        if largest >= self.config.model.vocab_size:
            raise ConfigError(
                f"the rows have token {largest}, the model has {self.config.model.vocab_size} of them"
            )
        batches = calibration[:, :-1].split(ROWS_AT_A_TIME)
        # Hidden states behind the last layer that was run, of each batch; tokens before the first.
        self._calibration: list[Tensor | None] = [None] * len(batches)
        self._tokens = batches
        self._held_out: list[Tensor | None] = [None, None]
        """Of the model as it was, and of the quantised one."""
        self.perplexities: tuple[float, float] | None = None
        """Of the held-out rows before and after, once the last layer has run."""

    @torch.no_grad()
    def run(
        self,
        layer: int,
        quantise: Callable[[Weight, Tensor, torch.dtype, Tensor], Tensor],
        scaling: Scaling | None = None,
    ) -> dict[str, Tensor]:
        """Run the next layer, scaled first where there is a `scaling`. For each of its matrices,
        `quantise` takes the row of the table, the weight and the dtype it is stored in, and the sum
        of x xᵀ, fp64 [K, K], over the tokens that went into it; it returns the weight to go on
        with.

        Returns the other weights that were scaled, by name."""
        num_layers = self.config.model.num_layers
        span = StageSpan(0, layer, layer + 1, first=layer == 0, last=layer == num_layers - 1)
        stage, _ = load_stage(
            self.folder, self.config.model, self.plan, span, Mesh.alone(), self.config.train
        )
        self._held_out[0] = self._pass(stage, self._held_out[0])
        weights = {
            weight.name: weight
            for weight in self.table
            if weight.is_matrix and weight.place == layer
        }
        inputs, exact = self._collect(stage, weights), dict[str, Tensor]()
        if scaling:
            some, x = self._tokens[0], self._calibration[0]
            exact = scaling.apply(stage.model, layer, inputs, lambda: _hidden(stage, x, some))
            inputs = self._collect(stage, weights)
        for name, weight in weights.items():
            parameter = stage.model.get_parameter(name)
            value = exact.pop(name, parameter)
            parameter.copy_(quantise(weight, value, parameter.dtype, inputs[name].products))
        self._held_out[1] = self._pass(stage, self._held_out[1])
        for number, (tokens, x) in enumerate(zip(self._tokens, self._calibration, strict=True)):
            self._calibration[number] = None if span.last else stage(x, _inputs(tokens))
        if span.last:
            before, after = (
                float(x.double().mean().exp()) for x in self._held_out if x is not None
            )
            self.perplexities = before, after
        return {name: stage.model.get_parameter(name).clone() for name in exact}

    def _collect(self, stage: Stage, weights: Mapping[str, Weight]) -> dict[str, InputStats]:
        """Return what goes into each matrix."""
        count = sum(tokens.numel() for tokens in self._tokens)
        found: dict[str, InputStats] = {}

        def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                x = inputs[0].flatten(0, -2).float()
                sizes, wide = x.abs(), x.double()
                new = InputStats(wide.T @ wide, sizes.sum(0) / count, sizes.amax(0))
                if old := found.get(name):
                    new = InputStats(
                        old.products + new.products,
                        old.mean + new.mean,
                        torch.maximum(old.largest, new.largest),
                    )
                found[name] = new

            return note

        handles = [
            stage.model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(
                watch(name)
            )
            for name in weights
        ]
        for tokens, x in zip(self._tokens, self._calibration, strict=True):
            stage(x, _inputs(tokens))
        for handle in handles:
            handle.remove()
        return found

    def _pass(self, stage: Stage, x: Tensor | None) -> Tensor:
        """Run held-out rows; the last stage returns losses."""
        tokens, labels = self.held_out[:, :-1], self.held_out[:, 1:]
        out = stage(x, _inputs(tokens, labels.contiguous()))
        assert isinstance(out, Tensor)
        return out


def _hidden(stage: Stage, x: Tensor | None, tokens: Tensor) -> Tensor:
    """Run a stage; return its hidden states."""
    out = stage(x, _inputs(tokens))
    return out if isinstance(out, Tensor) else out[0]


def _inputs(tokens: Tensor, labels: Tensor | None = None) -> Inputs:
    places = SequenceInfo.whole(tokens.shape[1], tokens.device)
    return Inputs(tokens, places, labels, output="hidden_states" if labels is None else "losses")
