"""Runs in fp8 are resumed bitwise, saved as any model, and tell what vanishes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
from safetensors.torch import load_file

from megalite.checkpoint.folder import step_folder
from megalite.comm.mesh import Axis, Mesh
from megalite.config import Config
from megalite.kernels.recipes import RECIPES
from megalite.observe.underflow import Underflow
from megalite.parallel.tensor import ColumnParallelLinear
from megalite.train import train
from ranks import run_ranks
from small_runs import VOCAB, curve_of, make_config, metrics_of, train_on_rank, write_corpus

MODEL: dict[str, Any] = {
    "family": "llama", "vocab_size": VOCAB, "hidden_size": 128, "intermediate_size": 128, "num_layers": 3,
    "num_attention_heads": 2, "max_positions": 128, "init_std": 0.1,
}  # fmt: skip


def config_of(folder: Path, *overrides: str) -> Config:
    if not (folder / "corpus.idx").exists():
        write_corpus(folder / "corpus", 129 * 20)
    return make_config(
        folder, MODEL, "data.seq_length=128", "train.steps=6", "checkpoint.every=3", "observe.eval_every=0",
        "optimizer.schedule.warmup_steps=1", *overrides,
    )  # fmt: skip


def test_a_resumed_run_is_bitwise_the_unbroken_one(tmp_path: Path) -> None:
    fp8 = "train.fp8.recipe=blockwise"
    whole, broken, plain = (
        config_of(tmp_path, fp8, "run.name=whole"),
        config_of(tmp_path, fp8, "run.name=broken"),
        config_of(tmp_path, "run.name=plain"),
    )
    train(whole)
    train(broken.model_copy(update={"train": broken.train.model_copy(update={"stop_at": 3})}))
    train(broken)
    train(plain)
    assert curve_of(whole) == curve_of(broken) != curve_of(plain)
    files = [
        load_file(step_folder(config.run.folder / "checkpoints", 6) / "model.safetensors")
        for config in (whole, broken, plain)
    ]
    assert {name: (x.shape, x.dtype) for name, x in files[0].items()} == {
        name: (x.shape, x.dtype) for name, x in files[2].items()
    }
    assert all(torch.equal(x, files[1][name]) for name, x in files[0].items())
    losses = [[line["loss"] for line in metrics_of(c) if "loss" in line] for c in (whole, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_a_run_that_gathers_codes_resumes_bitwise_and_is_the_run_without(tmp_path: Path) -> None:
    """A checkpoint is the model itself, and not what codes stand for."""
    settings = ("train.fp8.recipe=blockwise", "parallel.zero_stage=1", "train.precision=bf16")
    codes = "train.fp8.param_gather=true"
    whole, broken, plain = (
        config_of(tmp_path, *settings, codes, "run.name=whole"),
        config_of(tmp_path, *settings, codes, "run.name=broken"),
        config_of(tmp_path, *settings, "run.name=plain"),
    )
    stopped = broken.model_copy(update={"train": broken.train.model_copy(update={"stop_at": 3})})
    run_ranks(2, train_on_rank, [whole, stopped, broken, plain])
    assert curve_of(whole) == curve_of(broken) == curve_of(plain)
    files: list[dict[str, torch.Tensor]] = []
    for config in (whole, broken, plain):
        found = step_folder(config.run.folder / "checkpoints", 6).glob("model*.safetensors")
        # Each rank writes a file of its own.
        files.append({name: x for file in found for name, x in load_file(file).items()})
    assert files[2]
    for each in files[:2]:
        assert each.keys() == files[2].keys()
        assert all(torch.equal(x, files[2][name]) for name, x in each.items())


def test_what_vanishes_is_measured_by_layer(tmp_path: Path) -> None:
    """The same on two tensor ranks; none where blocks hold the numbers of one magnitude."""
    settings = (
        "train.steps=1",
        "observe.layers_every=1",
        "checkpoint.every=0",
        "train.fp8.recipe=mxfp8",
    )
    alone = config_of(tmp_path, *settings, "run.name=alone")
    split = config_of(tmp_path, *settings, "run.name=split", "parallel.tensor=2")
    train(alone)
    run_ranks(2, train_on_rank, [split])
    ours, theirs = (metrics_of(config)[0] for config in (alone, split))
    names = {name for name in ours if name.startswith("fp8_")}
    assert names == {"fp8_underflow/1", "fp8_grad_underflow/1"}
    for name in names:
        assert 0 < ours[name] < 0.1
        assert theirs[name] == pytest.approx(ours[name], rel=0.05)


def test_the_share_is_of_the_numbers_that_are_not_zero() -> None:
    module = ColumnParallelLinear(nn.Parameter(torch.ones(128, 256)), None, Axis(), False)
    module.recipe = RECIPES["blockwise"]
    underflow = Underflow({7: nn.Sequential(module)}, [7, 8], Mesh.alone())
    underflow.begin()
    x = torch.zeros(2, 256)
    x[0, :4] = torch.tensor([1.0, 2.0**-20, 2.0**-30, 2.0**-5])  # and nothing in three blocks
    grad = torch.full((2, 128), 2.0**-40)
    grad[1, 5] = -1.0
    module(x.requires_grad_()).backward(grad)
    found = underflow.end()
    assert found["fp8_underflow/7"].item() == pytest.approx(2 / 4)
    assert found["fp8_grad_underflow/7"].item() == pytest.approx(127 / 256)
    assert found["fp8_underflow/8"].isnan()
