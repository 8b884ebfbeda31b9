"""An objective that brings its own batches: what the model says itself to the texts that are
read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest

from megalite.comm.mesh import Mesh
from megalite.config import Config, ObjectiveConfig
from megalite.data.loader import Batches, MadeBatches, MicroBatch
from megalite.registry import objectives
from megalite.train import train
from megalite.training.objectives import NextToken, Objective
from megalite.training.parts import RankModel, forward
from megalite.training.run import Run
from ranks import run_ranks
from small_runs import curve_of, make_config, train_on_rank


@objectives.register("own_words")
class OwnWordsConfig(ObjectiveConfig):
    """Learns the tokens that the model itself finds the likeliest."""

    name: Literal["own_words"] = "own_words"

    def batches(self, source: Batches, run: Run, parts: RankModel) -> Batches:
        def make(batch: list[MicroBatch]) -> list[MicroBatch]:
            parts.train(False)
            found = forward(parts, batch, run.mesh, "logits")
            return [replace(micro, labels=out.whole().argmax(-1)) for out, _, micro in found]

        return MadeBatches(source, make)

    def build(self, config: Config, mesh: Mesh) -> Objective:
        return NextToken()


def own_words_on_rank(rank: int, world_size: int, configs: list[Config]) -> None:
    train_on_rank(rank, world_size, configs)


def test_an_objective_brings_its_own_batches(tmp_path: Path) -> None:
    steps = ("train.steps=4", "checkpoint.every=2", "observe.eval_every=0")
    plain = make_config(tmp_path, "llama", *steps, "run.name=plain", "train.stop_at=1")
    whole, parts, two = (
        make_config(
            tmp_path, "llama", *steps, "objective.name=own_words", f"run.name={name}", *more
        )
        for name, more in (("whole", []), ("parts", []), ("two", ["parallel.tensor=2"]))
    )
    train(plain)
    train(whole)
    train(parts.model_copy(update={"train": parts.train.model_copy(update={"stop_at": 2})}))
    train(parts)
    run_ranks(2, own_words_on_rank, [two])
    # The likeliest tokens have the lowest loss there is; tokens are counted as they are read.
    assert curve_of(whole)[0][1] < curve_of(plain)[0][1]
    assert [line[-1] for line in curve_of(whole)] == [64, 128, 192, 256]
    assert curve_of(parts) == curve_of(whole)
    for one, other in zip(curve_of(whole), curve_of(two), strict=True):
        assert other == pytest.approx(one, rel=1e-4)  # over 4 steps, fp32 sums in another order
