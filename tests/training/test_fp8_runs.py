"""Runs in fp8 are resumed bitwise, and saved as any model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megalite.checkpoint.folder import step_folder
from megalite.config import Config
from megalite.train import train
from small_runs import VOCAB, curve_of, make_config, metrics_of, write_corpus

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
