"""What recipes of fp8 cost in loss: the kin of a model, the gaps between curves, and the whole command
on a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from megalite.cli import main
from megalite.config import Config
from megalite.config_file import parse_config
from megalite.precision.curves import BF16, Curve, gaps, last_gap, spread
from megalite.precision.kin import kin_values, layer_parameters, narrowed
from small_runs import make_config

pytest.importorskip("matplotlib")

TINY = {
    "family": "llama", "vocab_size": 97, "hidden_size": 256, "intermediate_size": 256, "num_layers": 3,
    "num_attention_heads": 2, "num_kv_heads": 1, "max_positions": 128,
}  # fmt: skip


def of_preset(preset: str, **more: Any) -> Config:
    return parse_config(
        {
            "run": {"name": "x"}, "model": {"preset": preset}, "optimizer": {"lr": 1e-3},
            "data": {"train": [{"path": "x"}], "split": [9, 1, 0], "seq_length": 1024},
            "train": {"tokens": "20B", "global_batch_size": 512, "micro_batch_size": 4}, **more,
        }
    )  # fmt: skip


@pytest.mark.parametrize("preset", ["llama-8b", "qwen3-0.6b", "olmoe-1b-7b", "deepseek-v3"])
def test_a_kin_is_small_and_takes_every_recipe(preset: str) -> None:
    values = kin_values(of_preset(preset), 30e6, 300, ["train.fp8.recipe=blockwise"])
    kin = parse_config(values)
    assert kin.model.family == of_preset(preset).model.family
    # Of a mixture of many experts the smallest there is.
    assert 15e6 < layer_parameters(values["model"]) < 45e6 or kin.model.hidden_size == 128
    assert kin.train.steps == 300
    assert kin.train.global_batch_size == 16
    assert kin.train.micro_batch_size == 4


def test_a_kin_keeps_heads_and_proportions() -> None:
    model = of_preset("llama-8b").model
    kin = narrowed(model.model_dump(mode="json"), 30e6)
    assert kin["hidden_size"] / kin["num_attention_heads"] == 128
    assert kin["intermediate_size"] / kin["hidden_size"] == pytest.approx(3.5, rel=0.05)
    assert kin["vocab_size"] == model.vocab_size
    same = narrowed(of_preset("llama-8m").model.model_dump(mode="json"), 30e6)
    assert same["hidden_size"] == of_preset("llama-8m").model.hidden_size


def test_gaps_are_told_beside_the_noise() -> None:
    curves = {
        (BF16, 1): Curve([1, 2], [4.0, 2.0]), (BF16, 2): Curve([1, 2], [4.0, 2.02]),
        ("current", 1): Curve([1, 2], [4.4, 2.01]),
    }  # fmt: skip
    assert gaps(curves, "current") == [[pytest.approx(0.1), pytest.approx(0.005)]]
    assert last_gap(curves, "current") == pytest.approx(0.005)
    # |2 − 2.02| / √2, of a mean of 2.01.
    assert spread(curves) == [0.0, pytest.approx(0.02 / 2**0.5 / 2.01)]


def test_what_a_recipe_costs_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # Sequences of 32 tokens: too short for blocks of 128, not for those of 32.
    config = make_config(
        tmp_path, TINY, "data.seq_length=32", "train.steps=1000", "observe.eval_every=0",
        "checkpoint.every=0", "train.precision=bf16",
    )  # fmt: skip
    Path("config.yaml").write_text(
        yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True))
    )
    arguments = ["plan", "config.yaml", "--gpus", "1", "--gpu", "b200", "--precision"]
    arguments += ["--steps", "10", "--output", "found", "--parallel", "3"]
    arguments += ["--recipes", "mxfp8", "blockwise"]  # a run of each takes seconds to start
    assert main(arguments) == 0
    said = capsys.readouterr()
    for part in ("bf16", "mxfp8"):
        assert f"| {part} | " in said.out
    assert "blockwise is refused" in said.out
    assert "multiples of 128 tokens" in said.out
    assert "33% of its layers' weights" in said.out, "the last of the three lines counted in"
    assert Path("found/gap.png").stat().st_size > 10_000
    assert Path("found/report.md").read_text() in said.out
    assert said.err.count("seed3: ") == 2
    # What is there is not trained again, and not taken for runs of other settings.
    trained = Path("found/bf16-seed3/metrics.jsonl").stat().st_mtime_ns
    assert main(arguments) == 0
    assert Path("found/bf16-seed3/metrics.jsonl").stat().st_mtime_ns == trained
    assert main([*arguments, "--kin-set", "optimizer.lr=0.1"]) == 2
    assert "has a run of other settings" in capsys.readouterr().err
    assert main([*arguments, "--search"]) == 2
    assert "--search and --precision are two questions" in capsys.readouterr().err
