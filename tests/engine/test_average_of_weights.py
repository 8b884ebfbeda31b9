"""optimizer.ema: an average that every layout keeps alike, resumes, validates and exports."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megalite.checkpoint.convert import open_source, write_model
from megalite.checkpoint.folder import step_folder
from megalite.config import Config
from ranks import run_ranks
from small_runs import curve_of, make_config, metrics_of, train_on_rank

DECAY = 0.8


def kind_of(config: Config, step: int, kind: str) -> dict[str, torch.Tensor]:
    folder = step_folder(config.run.folder / "checkpoints", step)
    return {
        name: x
        for path in folder.glob(f"{kind}*.safetensors")
        for name, x in load_file(path).items()
    }


@pytest.mark.parametrize(
    ("ranks", "precision", "layout"),
    [
        (1, "fp32", ()),
        (2, "bf16", ("parallel.tensor=2",)),
        (2, "fp32", ("parallel.zero_stage=2",)),
        (2, "bf16", ("parallel.zero_stage=0",)),
    ],
)
def test_the_average_is_that_of_the_weights(
    tmp_path: Path, ranks: int, precision: str, layout: tuple[str, ...]
) -> None:
    given = (
        f"optimizer.ema={DECAY}",
        f"train.precision={precision}",
        "checkpoint.every=1",
        "checkpoint.keep=99",
        *layout,
    )
    config = make_config(tmp_path, "llama", *given, "train.steps=6", "observe.eval_every=3")
    broken = make_config(
        tmp_path, "llama", *given, "train.steps=6", "observe.eval_every=3", "run.name=broken"
    )
    first = make_config(
        tmp_path,
        "llama",
        *given,
        "train.steps=6",
        "observe.eval_every=3",
        "run.name=broken",
        "train.stop_at=4",
    )
    run_ranks(ranks, train_on_rank, [config, first, broken])
    exact = "model" if precision == "fp32" else "optimizer/master"
    average = kind_of(config, 1, "optimizer/ema")
    for step in range(2, 7):
        decay = min(DECAY, (1 + step) / (10 + step))
        for name, value in kind_of(config, step, exact).items():
            average[name] = average[name].double() * decay + value.double() * (1 - decay)
    found = kind_of(config, 6, "optimizer/ema")
    assert found.keys() == average.keys()
    for name, value in found.items():
        # Fp32 against float64.
        torch.testing.assert_close(value.double(), average[name], rtol=1e-5, atol=1e-7)
    resumed = kind_of(broken, 6, "optimizer/ema")
    assert all(torch.equal(resumed[name], found[name]) for name in found)
    assert curve_of(broken) == curve_of(config), (
        "validating the average leaves the weights as they were"
    )
    evaluations = [line for line in metrics_of(config) if "valid_loss" in line]
    assert all(line["valid_loss_ema"] != line["valid_loss"] for line in evaluations)
    folder = step_folder(config.run.folder / "checkpoints", 6)
    write_model(open_source(folder, ema=True), tmp_path / "out", "fp32")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(written[name], found[name]) for name in found)
    # A run without an average starts from the exported weights with the loss that was validated.
    again = make_config(
        tmp_path,
        "llama",
        "run.name=again",
        f"train.precision={precision}",
        "train.steps=1",
        "optimizer.lr=1e-30",
        "optimizer.schedule.min_lr=0",
        "observe.eval_every=1",
        f"model.hf={tmp_path / 'out'}",
        *layout,
    )
    run_ranks(ranks, train_on_rank, [again])
    last = next(line for line in metrics_of(again) if "valid_loss" in line)
    assert last["valid_loss"] == pytest.approx(evaluations[-1]["valid_loss_ema"], rel=1e-6)
