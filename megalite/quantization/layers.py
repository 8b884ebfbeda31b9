"""Runs a model layer by layer over rows of tokens: one layer is in memory at a time. Where its
matrices are changed (quantised, pruned), rows to calibrate with go through what is changed so far,
as the model that comes out will see them; held-out rows go through both models."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megalite.comm.mesh import Mesh
from megalite.config_file import parse_config
from megalite.data.indexed import IndexedDataset
from megalite.errors import ConfigError, NotFinite
from megalite.infer.ranks import load_stage
from megalite.kernels.experts import Groups
from megalite.models import weight_table
from megalite.models.layers import SequenceInfo
from megalite.models.weights import Weight
from megalite.parallel.stage import Inputs, Output, Stage
from megalite.plan import StageSpan, make_plan
from megalite.quantization.scaling import InputStats, Scaling

ROWS_AT_A_TIME = 8


def read_rows(prefix: str, count: int, length: int) -> Tensor:
    """Return `count` rows of `length` + 1 tokens from all over a token file: [count, length + 1].
    Raises DataError, or ConfigError where there are too few."""
    dataset = IndexedDataset(prefix)
    if dataset.num_tokens < count * (length + 1):
        raise ConfigError(
            f"{prefix} has {dataset.num_tokens:,} tokens, too few for {count} rows of {length + 1:,}: "
            "lower --rows or --length, or give more data"
        )
    # Evenly from the first token to the last: a file may be sorted by its sources.
    starts = torch.arange(count) * (dataset.num_tokens - length - 1) // max(1, count - 1)
    rows = []
    for start in starts.tolist():
        # By `read`, which fetches from an object store: what is not fetched reads as zeros.
        tokens = dataset.read(start, start + length + 1)
        rows.append(torch.from_numpy(tokens.astype("int64")))
    return torch.stack(rows)


class LayerRuns:
    """The model in `folder`, run over rows of tokens [R, T + 1] one layer after another."""

    @classmethod
    def from_tokens(cls, folder: Path, prefix: str, count: int, length: int) -> LayerRuns:
        """Take `count` rows of a token file, of which every fourth measures, and is not calibrated
        with."""
        rows = read_rows(prefix, count, length)
        # Of fewer than four rows the last one.
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
        self._calibration = Travellers(calibration, "hidden_states")
        self._held_out = Travellers(held_out, "losses"), Travellers(held_out, "losses")
        """Of the model as it was, and as it becomes."""
        self.perplexities: tuple[float, float] | None = None
        """Of the held-out rows before and after, once the last layer has run."""
        self.rank, self.ranks = 0, 1
        """Of the processes that share a layer's matrices."""

    @torch.no_grad()
    def run(
        self,
        layer: int,
        change: Callable[[Weight, Tensor, torch.dtype, Tensor], Tensor],
        scaling: Scaling | None = None,
        exchange: Callable[[Weight, int, Tensor], None] = lambda *_: None,
    ) -> dict[str, Tensor]:
        """Run the next layer, scaled first where there is a `scaling`. For each of its matrices,
        `change` takes the row of the table, the weight and the dtype it is stored in, and the sum
        of x xᵀ, fp64 [K, K], over the tokens that went into it ([E, K, K] of experts, each with its
        own tokens); it returns the weight to go on with. Ranks that share the matrices each change
        those they own; `exchange` then brings a weight, in place, from its owner to all.

        Returns the other weights that were scaled, by name."""
        stage = self._load(layer)
        # Before anything is changed: these rows go through the model as it was.
        self._held_out[0].through(stage)
        weights = {
            weight.name: weight
            for weight in self.table
            if weight.is_matrix and weight.place == layer
        }
        exact, owners = dict[str, Tensor](), owners_of(weights.values(), self.ranks)
        if scaling:
            # By every rank: what is divided by the factors of one matrix, another one makes.
            inputs, calibration = self._collect(stage, weights), self._calibration
            exact = scaling.apply(stage.model, layer, inputs, lambda: calibration.some(stage))
        own = {name: weight for name, weight in weights.items() if owners[name] == self.rank}
        inputs = self._collect(stage, own)  # scaling has changed what goes in
        for name, weight in weights.items():
            parameter = stage.model.get_parameter(name)
            # What was scaled, in fp32 and not rounded to the parameter's dtype in between.
            value = exact.pop(name, parameter)
            if name in own:
                parameter.copy_(change(weight, value, parameter.dtype, inputs[name].products))
        for name, weight in weights.items():
            exchange(weight, owners[name], stage.model.get_parameter(name))
        self._held_out[1].through(stage)
        if stage.span.last:
            self.perplexities = self._held_out[0].perplexity, self._held_out[1].perplexity
        else:
            self._calibration.through(stage)
        return {name: stage.model.get_parameter(name).clone() for name in exact}

    @torch.no_grad()
    def watch(self, watching: Callable[[int, nn.Module], AbstractContextManager[None]]) -> float:
        """Run all layers as they are, and return the perplexity of the held-out rows. While the
        calibration rows go through a layer, one [1,T,…] at a time, the context that `watching`
        gives for its number and the part of the model that has it is entered."""
        for layer in range(self.config.model.num_layers):
            stage = self._load(layer)
            self._held_out[0].through(stage)
            with watching(layer, stage.model):
                self._calibration.through(stage, at_a_time=1)
        return self._held_out[0].perplexity

    def _load(self, layer: int) -> Stage:
        num_layers = self.config.model.num_layers
        span = StageSpan(0, layer, layer + 1, first=layer == 0, last=layer == num_layers - 1)
        return load_stage(
            self.folder, self.config.model, self.plan, span, Mesh.alone(), self.config.train
        )[0]

    def _collect(self, stage: Stage, weights: Mapping[str, Weight]) -> dict[str, InputStats]:
        """Return what goes into each matrix."""
        count = self._calibration.tokens.numel()
        found: dict[str, InputStats] = {}

        def note(
            name: str, module: nn.Module, inputs: tuple[Any, ...], how: dict[str, Any]
        ) -> None:
            x = inputs[0].flatten(0, -2).float()
            sizes = x.abs()
            if weights[name].stack:
                by_expert = _by_matrix(*inputs, **how)
                products = torch.stack([_products(rows) for rows in by_expert])
            else:
                products = _products(x)
            new = InputStats(products, sizes.sum(0) / count, sizes.amax(0))
            if old := found.get(name):
                new = InputStats(
                    old.products + new.products,
                    old.mean + new.mean,
                    torch.maximum(old.largest, new.largest),
                )
            found[name] = new

        handles = [
            stage.model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(
                partial(note, name), with_kwargs=True
            )
            for name in weights
        ]
        for _ in self._calibration.visit(stage):
            pass
        for handle in handles:
            handle.remove()
        for name, stats in found.items():
            # A factorization of these would fail without saying why.
            if not stats.products.isfinite().all():
                raise NotFinite(
                    f"{self.folder}: what goes into {name} is not finite (NaN or infinite): the weights are damaged, "
                    "or too large for their precision; take an earlier checkpoint"
                )
        return found


def owners_of(weights: Iterable[Weight], ranks: int) -> dict[str, int]:
    """Return which of so many ranks changes each weight, so that all have about as much to do."""
    load, owners = [0] * ranks, {}
    # Largest first, each to the rank with the least so far; what it costs is x xᵀ and its inverse.
    for weight in sorted(weights, key=lambda weight: -weight.numel * weight.shape[-1]):
        rank = min(range(ranks), key=load.__getitem__)
        owners[weight.name] = rank
        load[rank] += weight.numel * weight.shape[-1]
    return owners


def _products(rows: Tensor) -> Tensor:
    """Return the sum of x xᵀ over rows [R, K], fp64 [K, K]."""
    wide = rows.double()
    return wide.T @ wide


def _by_matrix(x: Tensor, groups: Groups, gather: bool = False) -> tuple[Tensor, ...]:
    """Return the rows that go into each of a stack of experts; see `GroupedLinear`."""
    rows = x.flatten(0, -2)[groups.token_N] if gather else x
    return rows.split(groups.counts.on_host)


class Travellers:
    """Rows of tokens [R, T + 1] on their way through the layers of a model."""

    def __init__(self, rows: Tensor, output: Output):
        """`output` is what the last stage returns."""
        self.tokens, self.labels, self.output = rows[:, :-1], rows[:, 1:], output
        self._states: Tensor | None = None
        """Hidden states [R,T,D] behind the last layer that was run; behind all, the output."""

    def visit(
        self, stage: Stage, at_a_time: int = ROWS_AT_A_TIME
    ) -> Iterator[tuple[slice, Tensor]]:
        """Yield which rows they are and what `stage` makes of them, `at_a_time` of them at once;
        they stay where they are."""
        places = SequenceInfo.whole(self.tokens.shape[1], self.tokens.device)
        for start in range(0, len(self.tokens), at_a_time):
            here = slice(start, start + at_a_time)
            x = None if self._states is None else self._states[here]
            labels = self.labels[here].contiguous()
            out = stage(x, Inputs(self.tokens[here], places, labels, output=self.output))
            assert isinstance(out, Tensor)
            yield here, out

    def some(self, stage: Stage) -> Tensor:
        """Return what `stage` makes of the first rows."""
        return next(self.visit(stage))[1]

    def through(self, stage: Stage, at_a_time: int = ROWS_AT_A_TIME) -> None:
        """Go through `stage`."""
        states = self._states
        for here, out in self.visit(stage, at_a_time):
            # In place, so that there are hidden states of one layer only.
            if states is None or states.shape[1:] != out.shape[1:]:
                states = out.new_empty(len(self.tokens), *out.shape[1:])
            states[here] = out
        self._states = states

    @property
    def perplexity(self) -> float:
        """Return the perplexity of the rows, which have gone through all layers."""
        assert self._states is not None
        return float(self._states.double().mean().exp())


def perplexity_of(folder: Path, rows: Tensor) -> float:
    """Return the perplexity of the model in `folder` on rows [R, T + 1], one layer in memory at a
    time."""
    return LayerRuns(folder, rows[:1], rows).watch(lambda layer, model: nullcontext())
