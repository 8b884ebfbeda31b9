"""The range test of the learning rate, on losses that are known and in a run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megalite.cli import main
from megalite.errors import ConfigError
from megalite.sweep.learning_rate import read
from small_runs import make_config

RATES = np.geomspace(1e-5, 1.0, 101)


def leave(folder: Path, losses: np.ndarray) -> Path:
    lines = [
        json.dumps({"step": n, "lr": lr, "loss": loss if np.isfinite(loss) else None})
        for n, (lr, loss) in enumerate(zip(RATES.tolist(), losses.tolist(), strict=True), 1)
    ]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_the_rate_is_where_the_loss_falls_the_fastest(tmp_path: Path) -> None:
    # A fall whose middle is at 1e-3, up again from 0.1 on, and then no number.
    log = np.log10(RATES)
    losses = 5 - 2 / (1 + np.exp(-4 * (log + 3))) + np.where(log > -1, 8 * (log + 1) ** 2, 0)
    losses[log > -0.4] = np.nan
    found = read(leave(tmp_path, losses))
    assert np.log10(found.steepest) == pytest.approx(-3, abs=0.06), "a step is 0.05"
    assert np.log10(found.lowest) == pytest.approx(-1, abs=0.16), "to within the average's reach"
    # The fall of a run that recovers does not count.
    assert found.rates[-1] < 10**-0.3


def test_a_run_that_diverges_at_once_says_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="begin lower"):
        read(leave(tmp_path, np.where(RATES > 3e-5, 100.0, 4.0)))


def test_a_range_test_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megalite.sweep.learning_rate.STEPS", 24)
    config = make_config(tmp_path, "llama", "checkpoint.keep_best=1")
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    given = ["sweep", str(tmp_path / "run.yaml"), "--find-lr"]
    assert main([*given, "1e-5", "1e-2"]) == 0
    said = capsys.readouterr().out
    assert "the loss falls the fastest at lr" in said
    folder = tmp_path / "runs" / "test-lr"
    assert (folder / "lr.png").stat().st_size > 10_000
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    rates = [line["lr"] for line in lines if "lr" in line]
    assert rates[0] == pytest.approx(1e-5)
    assert rates[23] == pytest.approx(1e-2)
    assert main([*given, "1e-5", "1e-2"]) == 2
    assert "exists; remove it" in capsys.readouterr().err
    assert main([*given, "1e-2", "1e-5"]) == 2
    assert "must be above 0 and rise" in capsys.readouterr().err
