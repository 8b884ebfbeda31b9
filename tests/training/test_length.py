"""How long a run is: by steps, tokens or epochs; warned of, resumed, and told by plans."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml

from megalite.config_file import load_config
from megalite.data.indexed_writer import IndexedWriter
from megalite.errors import ConfigError
from megalite.models import weight_table
from megalite.plan import make_plan
from megalite.planner.run import run_plan
from megalite.runtime.exit_codes import Exit
from megalite.train import train
from small_runs import curve_of, make_config, metrics_of, write_corpus

BY_EPOCHS = ("train.steps=null", "train.epochs=1.9")


def test_tokens_and_epochs_are_the_steps_that_they_take(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An epoch of the corpus is 33 samples of 16 tokens, of which a step has 4."""
    by_steps = make_config(tmp_path, "llama", "run.name=steps")
    train(by_steps)
    by_tokens = make_config(
        tmp_path, "llama", "run.name=tokens", "train.steps=null", "train.tokens=1e3"
    )
    assert by_tokens.train.steps == 16, "15.6 of 64 tokens"
    assert make_plan(by_tokens, weight_table(by_tokens.model), 1).tokens == 1024
    train(by_tokens)
    by_epochs = make_config(tmp_path, "llama", "run.name=epochs", *BY_EPOCHS)
    train(make_config(tmp_path, "llama", "run.name=epochs", *BY_EPOCHS, "train.stop_at=11"))
    train(by_epochs)  # goes on
    assert curve_of(by_steps) == curve_of(by_tokens) == curve_of(by_epochs), (
        "1.9 epochs are 15.7 steps"
    )
    out = capsys.readouterr().out
    assert "16 steps of 64 tokens, 1.02k in all" in out
    assert out.count("epochs: corpus 1.94; a step is 0.121 of an epoch") == 4
    stored = load_config(by_epochs.run.folder / "config.yaml")
    assert (stored.train.steps, stored.train.epochs) == (16, 1.9)
    train(stored)
    assert "there is nothing to do" in capsys.readouterr().out


def test_an_epoch_of_a_mixture_is_as_many_samples_as_all_sources_have(tmp_path: Path) -> None:
    write_corpus(tmp_path / "small", 8 * 16 + 1)
    both = f"data.train=[{{path: {tmp_path}/corpus, weight: 1}}, {{path: {tmp_path}/small, weight: 1}}]"
    config = make_config(tmp_path, "llama", "train.steps=null", "train.epochs=0.5", both)
    train(config)
    # 33 + 8 samples
    assert len(curve_of(config)) == 6


def test_many_epochs_of_labelled_rows_are_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """18 rows of 6 tokens, two or three in a sample."""
    with IndexedWriter(tmp_path / "rows", np.uint16, np.uint8) as writer:
        for row in range(18):
            writer.add_documents(np.arange(6) + row, [6], np.ones(6, np.int64))
    rows = f"data.train=[{{path: {tmp_path}/rows}}]"
    train(
        make_config(
            tmp_path, "llama", "run.name=often", "train.steps=null", "train.epochs=10.5", rows
        )
    )
    train(
        make_config(tmp_path, "llama", "run.name=twice", "train.steps=null", "train.epochs=2", rows)
    )
    out = capsys.readouterr().out
    assert "24 steps of 64 tokens" in out
    assert "epochs: rows 10.67; a step is 8.0 of 18 rows, 0.444 of an epoch" in out
    assert out.count("warning: the run goes 10.7 times through the labelled rows of rows") == 1


def test_a_run_ends_when_its_validation_loss_no_longer_comes_down(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where it is stopped and goes on between, and once it has ended it stays so."""
    write_corpus(tmp_path / "other", seed=9)
    asked = (
        "train.patience=3", "train.steps=40", "observe.eval_every=3", "optimizer.lr=0.2",
        "optimizer.schedule.name=constant", f"data.valid=[{{path: {tmp_path}/other}}]",
        f"data.test=[{{path: {tmp_path}/other}}]", "checkpoint.every=0",
    )  # fmt: skip
    unbroken = make_config(tmp_path, "llama", "run.name=unbroken", *asked)
    assert train(unbroken) == Exit.DONE
    losses = {
        line["step"]: line["valid_loss"] for line in metrics_of(unbroken) if "valid_loss" in line
    }
    lowest = min(losses, key=lambda step: losses[step])
    last = lowest + 3 * 3
    assert max(losses) == last < 40
    assert metrics_of(unbroken)[-1].keys() >= {"test_loss"}
    why = f"3 validations have not been below the {losses[lowest]:.4f} of step {lowest} (train.patience)"
    assert f"the run ends early, after step {last}: {why}" in capsys.readouterr().out
    assert [path.name for path in (unbroken.run.folder / "checkpoints").iterdir()] == [
        f"step-{last:08}"
    ]

    broken = make_config(tmp_path, "llama", "run.name=broken", *asked)
    for stop_at in (lowest + 3, lowest + 6):
        train(make_config(tmp_path, "llama", "run.name=broken", *asked, f"train.stop_at={stop_at}"))
    train(broken)
    assert curve_of(broken) == curve_of(unbroken)
    capsys.readouterr()
    assert train(broken) == Exit.DONE
    assert (
        f"the run has ended early: {why}; a higher train.patience goes on with it"
        in capsys.readouterr().out
    )
    assert curve_of(broken) == curve_of(unbroken)
    train(make_config(tmp_path, "llama", "run.name=broken", *asked, "train.patience=4"))
    assert curve_of(broken)[-1][0] == last + 3
    with pytest.raises(
        ConfigError, match=r"train\.patience counts validations, which need data\.valid"
    ):
        make_config(tmp_path, "llama", *asked, "observe.eval_every=0")


def test_two_lengths_are_refused(tmp_path: Path) -> None:
    config = make_config(tmp_path, "llama", "train.epochs=3")  # and 16 steps
    with pytest.raises(
        ConfigError, match=r"train\.steps 16 and train\.epochs 3\.0 of this data, which is 25 steps"
    ):
        train(config)
    schedule = "optimizer.schedule={name: wsd, warmup_steps: 2, decay_steps: 30, min_lr: 1e-3}"
    with pytest.raises(
        ConfigError, match=r"decay_steps 30 is more than the 7 steps that follow the warmup"
    ):
        train(make_config(tmp_path, "llama", "train.steps=null", "train.epochs=1", schedule))
    with pytest.raises(
        ConfigError, match=r"megatron has as many samples as are asked for; give train\.steps or"
    ):
        make_config(tmp_path, "llama", *BY_EPOCHS, "data.order=megatron")
    assert not (config.run.folder / "config.yaml").exists(), "no run has begun"


def test_plans_say_what_epochs_need(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_config(tmp_path, "llama", *BY_EPOCHS, "train.precision=bf16")
    (tmp_path / "my.yaml").write_text(config.to_yaml())
    assert yaml.safe_load(config.to_yaml())["train"]["steps"] is None
    assert load_config(tmp_path / "my.yaml").train == config.train
    assert (
        "64 a step, in train.epochs of the data"
        in make_plan(config, weight_table(config.model), 1).describe()
    )
    for tokens in (None, "1M"):
        run_plan(
            config, num_gpus=1, gpu="h100", gpus_per_node=1, interconnect=None, tokens=tokens, with_search=False,
            output=None, picture=None,
        )  # fmt: skip
    out = capsys.readouterr().out
    assert out.count("--tokens says: train.epochs are known in steps once the data is open") == 1
    assert out.count("M tokens take") == 1
