"""The law of a ladder against losses that are known to follow one, and a ladder's runs: those that are
missing are trained, those of other settings are not taken."""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from megalite.cli import main
from megalite.config import Config
from megalite.ladder import fit
from megalite.ladder.config import MEASURED, LadderConfig, load_ladder_config, multiplied
from megalite.ladder.curve import SHARES, read_curve
from megalite.ladder.fit import Fit, Law, Runs
from megalite.ladder.run import run_ladder
from megalite.runtime.exit_codes import Exit
from megalite.sweep.trial import TrialRun
from small_runs import make_config

pytest.importorskip("scipy")
pytest.importorskip("matplotlib")

TRUE = Law(1.7, 400.0, 410.0, 0.34, 0.28)
"""About that of Hoffmann et al. 2022."""


def measured(noise: float, seed: int = 0) -> Runs:
    n = np.repeat([1e6, 3e6, 1e7, 3e7, 1e8], 3)
    d = n * np.tile([10.0, 20.0, 40.0], 5)
    return Runs(n, d, TRUE.loss(n, d) * np.exp(np.random.default_rng(seed).normal(0, noise, 15)))


def test_a_law_is_found_again() -> None:
    law = Fit(measured(noise=0.0)).law
    for name in ("E", "A", "B", "alpha", "beta"):
        assert getattr(law, name) == pytest.approx(getattr(TRUE, name), rel=1e-4), name


def test_intervals_hold_the_truth() -> None:
    """Of a run with a hundred times the FLOPs of the largest, at losses that are off by 0.3%."""
    truth, held = float(TRUE.loss(1e9, 2e10)), 0
    for seed in range(4):
        loss, low, high = Fit(measured(0.003, seed)).predict(1e9, 2e10)
        assert loss == pytest.approx(truth, rel=0.02)
        assert low < loss < high
        held += low <= truth <= high
    assert held >= 3, "90% of them, but for so few draws"


def test_one_bad_run_moves_little() -> None:
    runs = measured(noise=0.001)
    runs.losses[4] *= 1.2
    assert float(Fit(runs).law.loss(1e9, 2e10)) == pytest.approx(
        float(TRUE.loss(1e9, 2e10)), rel=0.02
    )


def test_the_best_size_is_the_lowest_of_all() -> None:
    sizes = np.geomspace(1e6, 1e12, 100_001)
    for flops in (1e18, 1e22):
        losses = TRUE.loss(sizes, flops / 6 / sizes)
        assert float(TRUE.best_parameters(flops)) == pytest.approx(sizes[losses.argmin()], rel=1e-3)


def make_ladder(folder: Path, **more: object) -> Path:
    config = make_config(folder, "llama", "checkpoint.every=0", "observe.eval_every=0")
    values = config.model_dump(mode="json", exclude_unset=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    ladder = {
        "name": "ladder", "dir": str(folder / "runs"), "config": str(folder / "config.yaml"),
        "sizes": [{"model.hidden_size": 16, "model.intermediate_size": 24}, {"model.num_layers": 1}],
        "tokens_per_parameter": [0.05, 0.1, 0.2], "predict": [{"parameters": "1M", "tokens": "20M"}],
    }  # fmt: skip
    (folder / "ladder.yaml").write_text(yaml.safe_dump(ladder | more))
    return folder / "ladder.yaml"


def pretend(ladder: LadderConfig, law: Law, but: int) -> None:
    """Leave behind what runs would that have ended with the losses of a law: all `but` so many."""
    for rung in list(ladder.rungs())[but:]:
        folder = ladder.folder / rung.name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "trial.yaml").write_text(yaml.safe_dump(rung.values))
        (folder / "valid_loss.json").write_text(str(float(law.loss(rung.parameters, rung.tokens))))


def test_what_is_missing_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "DRAWN", 3)  # few: no law fits losses that follow none
    path = make_ladder(tmp_path)
    ladder = load_ladder_config(path)
    rungs = list(ladder.rungs())
    assert len(rungs) == 6
    for rung in rungs:
        # The head and the layers' weights; what is looked up multiplies nothing.
        hidden, inner = (
            rung.config.model.hidden_size,
            24 if rung.config.model.hidden_size == 16 else 48,
        )
        each = hidden * hidden * 3 + 3 * hidden * inner + 2 * hidden
        assert rung.parameters == each * rung.config.model.num_layers + hidden * 97 + hidden
        ratio = float(rung.name.partition("-x")[2])
        assert 0 <= rung.tokens - ratio * rung.parameters < 4 * 16, "whole steps"
    pretend(ladder, Law(1.0, 5.0, 9.0, 0.3, 0.4), but=1)
    assert main(["ladder", str(path)]) == 0
    said = capsys.readouterr().out
    assert said.count(f"{rungs[0].name}: ") == 1
    found = json.loads((ladder.folder / "ladder.json").read_text())
    lines = (ladder.folder / rungs[0].name / "metrics.jsonl").read_text().splitlines()
    last = [x["valid_loss"] for x in map(json.loads, lines) if "valid_loss" in x][-1]
    assert found["runs"][0]["loss"] == last
    assert main(["ladder", str(path)]) == 0, "nothing is trained again"
    assert "parameters, " in capsys.readouterr().out
    # Another setting: the runs that are there are not of this ladder.
    assert main(["ladder", str(path), "settings={optimizer.lr: 0.5}"]) == 2
    assert "has a run of other settings" in capsys.readouterr().err


def test_ctrl_c_ends_what_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import pathlib, signal, sys, time; stopped = pathlib.Path(sys.argv[1]).touch; "
        "signal.signal(15, lambda *_: (stopped(), sys.exit(75))); print('on', flush=True); time.sleep(5)"
    )
    start, main_thread = TrialRun.start, threading.main_thread()
    interrupt = [0.1]  # once: a second Ctrl-C would come when the test is over

    def start_another(self: TrialRun) -> None:
        self._command = [sys.executable, "-c", code, str(tmp_path / "stopped")]
        start(self)
        while "on" not in (self.folder / "console.log").read_text():
            time.sleep(0.01)
        assert main_thread.ident is not None
        if interrupt:
            kill = signal.pthread_kill, (main_thread.ident, signal.SIGINT)
            threading.Timer(interrupt.pop(), *kill).start()

    monkeypatch.setattr(TrialRun, "start", start_another)
    with pytest.raises(KeyboardInterrupt):
        run_ladder(make_ladder(tmp_path))
    assert (tmp_path / "stopped").exists()


def test_runs_beside_each_other_have_gpus_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given: list[str] = []
    two_run = threading.Barrier(2)

    class Pretended(TrialRun):
        def start(self) -> None:
            given.append(self._environment["CUDA_VISIBLE_DEVICES"])

        def wait(self, seconds: float | None) -> int:
            two_run.wait(20)
            return Exit.DONE

        def value(self, metric: object) -> float:
            return 2.0

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    monkeypatch.setattr("megalite.sweep.side_by_side.TrialRun", Pretended)
    monkeypatch.setattr("megalite.ladder.run.write_report", lambda *_: [])
    path = make_ladder(tmp_path, parallel=2)
    assert run_ladder(path) == Exit.DONE
    assert sorted(given) == ["4"] * 3 + ["6"] * 3
    assert main(["ladder", str(path), "parallel=3", "name=another"]) == 2
    assert "need 3 GPUs, and this machine has 2; lower parallel" in capsys.readouterr().err


def test_a_ladder_tells_its_law(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make_ladder(tmp_path, tokens_per_parameter=[5, 10, 20, 40, 80])
    ladder, law = load_ladder_config(path), Law(1.0, 5.0, 9.0, 0.3, 0.4)
    pretend(ladder, law, but=0)
    assert main(["ladder", str(path)]) == 0
    assert "for it; it has" in capsys.readouterr().out
    found = json.loads((ladder.folder / "ladder.json").read_text())
    assert found["law"]["beta"] == pytest.approx(0.4, rel=1e-3)
    assert found["held_out"]["predicted"] == pytest.approx(found["held_out"]["measured"], rel=1e-3)
    assert (ladder.folder / "ladder.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"tokens_per_parameter": [1, 2]}, "five numbers, and 4 runs"),
        ({"tokens_per_parameter": [1, 2, 0]}, "must be above 0"),
        ({"tokens_per_parameter": [1, 20, 20.000001]}, "has x20 twice"),
        ({"sizes": [{"model.hidden": 3}, {}]}, "model.hidden"),
        ({"predict": [{"parameters": "many", "tokens": 1}]}, "a number such as"),
        ({"settings": {"data.valid": []}}, "data.valid or data.split"),
        ({"rates": "kaplan"}, "deepseek"),
        ({"rates": "step_law", "settings": {"optimizer.name": "sgd"}}, "of AdamW"),
    ],
)
def test_mistakes_are_told_before_the_first_run(
    more: dict[str, object], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ladder", str(make_ladder(tmp_path, **more))]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "runs" / "ladder").exists()


def test_measured_laws_set_rates_and_batches(tmp_path: Path) -> None:
    """The numbers are worked out from the papers' formulas by hand."""
    lr, batch = MEASURED["deepseek"](1e9 / 6, 1e9)  # 1e18 FLOPs
    assert lr == pytest.approx(0.3118 / 10 ** (18 / 8), rel=1e-12)
    assert batch == pytest.approx(0.2920 * 10**5.8878, rel=1e-9)
    lr, batch = MEASURED["step_law"](1e9, 1e11)  # the paper's largest: 1B on 100B tokens
    assert lr == pytest.approx(1.79 * 10 ** (-9 * 0.713 + 11 * 0.307), rel=1e-9)
    assert batch == pytest.approx(0.58 * 10**6.281, rel=1e-9)
    more = {"rates": "deepseek", "settings": {"train.micro_batch_size": 3}}
    ladder = load_ladder_config(
        make_ladder(tmp_path, tokens_per_parameter=[500, 5000, 500000], **more)
    )
    for rung in ladder.rungs():
        lr, batch = MEASURED["deepseek"](
            rung.parameters, float(rung.name.split("-x")[1]) * rung.parameters
        )
        assert rung.config.optimizer.lr == pytest.approx(lr, rel=5e-3)
        samples = rung.config.train.global_batch_size
        assert samples % 3 == 0, "whole micro-batches"
        assert abs(samples * 16 - batch) <= 1.5 * 16


WAY = 1 + 0.3 * (1 - SHARES)
"""How far a run is above the law before its learning rate has come down."""


def leave_curves(ladder: LadderConfig, law: Law) -> None:
    """Leave behind metrics whose training losses are a tenth above those of validation."""
    for rung in ladder.rungs():
        at = np.arange(1, 401) / 400
        losses = 1.1 * law.loss(rung.parameters, at * rung.tokens) * np.interp(at, SHARES, WAY)
        lines = [json.dumps({"step": n + 1, "loss": x}) for n, x in enumerate(losses.tolist())]
        (ladder.folder / rung.name / "metrics.jsonl").write_text("\n".join(lines) + "\n")


@pytest.mark.usefixtures("drawn")
def test_a_run_is_watched_beside_its_curve(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_ladder(tmp_path, tokens_per_parameter=[5, 10, 20, 40, 80])
    ladder, law = load_ladder_config(path), Law(1.0, 5.0, 9.0, 0.3, 0.4)
    pretend(ladder, law, but=0)
    leave_curves(ladder, law)
    assert main(["ladder", str(path)]) == 0
    report = ladder.folder / "ladder.json"
    config = make_config(tmp_path, "llama", "observe.eval_every=4", f"observe.ladder={report}")
    tokens = np.linspace(0.1, 1, 10) * config.num_tokens
    curve = read_curve(report, config)
    low, middle, high = curve.band(tokens)
    true = law.loss(multiplied(config), tokens) * np.interp(tokens / config.num_tokens, SHARES, WAY)
    # The mean over 20 steps of a curve that bends is a little above it.
    assert middle == pytest.approx(true, rel=0.01)
    assert (low <= middle).all()
    assert (middle <= high).all()
    assert np.isnan(curve.band(np.array([0.01 * config.num_tokens]))).all(), "in the warmup"
    # Of random tokens nothing is learned: the loss is no lower than log(97) = 4.57, and the law says 1.9 or so.
    assert main(["train", *as_arguments(tmp_path, config)]) == 0
    said = capsys.readouterr().out
    assert said.count("is above what the ladder predicts") == 1, "once, not at each validation"
    assert (config.run.folder / "loss.png").stat().st_size > 10_000


def as_arguments(folder: Path, config: Config) -> list[str]:
    (folder / "run.yaml").write_text(config.to_yaml())
    return [str(folder / "run.yaml")]


@pytest.mark.parametrize(
    ("report", "words"),
    [
        ({"law": {}}, "has no curve"),
        ({"law": {"E": 1}, "curve": {"shares": [0.5, 1]}}, "law"),
        (
            {
                "law": {"E": 1, "A": 1, "B": 1, "alpha": 1, "beta": 1},
                "curve": {"shares": [1, 0.5], "over_law": [[1, 1]], "laws": []},
            },
            "curve",
        ),
        ([], "JSON object"),
    ],
)
def test_a_report_that_predicts_nothing_is_refused(
    report: object, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ladder.json").write_text(json.dumps(report))
    config = make_config(tmp_path, "llama", f"observe.ladder={tmp_path / 'ladder.json'}")
    assert main(["train", *as_arguments(tmp_path, config)]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert "ladder.json" in error
    assert not (config.run.folder / "metrics.jsonl").exists()
