"""Sweeps: what may be asked for, how the journal shares trials among workers, and a whole sweep
that is killed."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from megalite.config import Config
from megalite.config_file import load_config
from megalite.errors import ConfigError
from megalite.runtime.exit_codes import Exit
from megalite.sweep import report, study
from megalite.sweep.config import Dimension, SweepConfig, load_sweep_config
from megalite.sweep.report import write_report
from megalite.sweep.run import Workers
from megalite.sweep.study import FileLock, Journal, own_trials
from megalite.sweep.trial import TrialRun
from megalite.utils.resources import configs_dir
from small_runs import make_config

optuna = pytest.importorskip("optuna")

STEPS = 150
SPACE: dict[str, Any] = {
    "optimizer.lr": {"between": [1e-4, 1e-1], "log": True},
    "optimizer.weight_decay": {"between": [0.0, 0.2], "step": 0.1},
}


@pytest.fixture
def base(tmp_path: Path) -> Config:
    """A config on disk, of which sweeps are made."""
    config = make_config(tmp_path, "llama", "optimizer.schedule={name: constant}")
    (tmp_path / "base.yaml").write_text(config.to_yaml())
    return config


def sweep_of(folder: Path, **values: Any) -> SweepConfig:
    own = {
        "name": "sweep",
        "dir": str(folder / "runs"),
        "config": str(folder / "base.yaml"),
        "space": SPACE,
        "trials": 6,
    }
    (folder / "sweep.yaml").write_text(yaml.safe_dump(own | values, sort_keys=False))
    return load_sweep_config(folder / "sweep.yaml")


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "key": ({"sampler": "tpee"}, "sampler = 'tpee'.*did you mean 'tpe'"),
    "no trials": ({"trials": None}, "trials is required, unless for sampler: grid"),
    "empty": ({"space": {"optimizer.lr": []}}, "`values` must not be empty"),
    "turned": (
        {"space": {"optimizer.lr": {"between": [2.0, 1.0]}}},
        "between 2.0 and 1.0 there is nothing",
    ),
    "both": (
        {"space": {"optimizer.lr": {"between": [1.0, 2.0], "values": [1]}}},
        "either `between` or `values`",
    ),
    "log of 0": (
        {"space": {"optimizer.lr": {"between": [0, 1.0], "log": True}}},
        "log needs numbers above 0",
    ),
    "grid of what": (
        {"sampler": "grid"},
        r"space\.optimizer\.lr: a grid needs `values`, or a `step`",
    ),
    "own name": ({"space": {"run.name": ["a", "b"]}}, r"space\.run\.name: a trial has its own"),
    "later": (
        {"space": {"optimizer.lr": {"values": [1.0], "when": {"optimizer.name": "adamw"}}}},
        r"space\.optimizer\.lr: when names optimizer\.name, which must be in the space above it",
    ),
    "sqlite": ({"storage": "sqlite:///x.db"}, "storage.*SQLite loses writes on shared disks"),
    "which way": ({"objective": "attention_logit"}, "maximize: true.*attention_logit"),
    "pareto": (
        {"objective": ["valid_loss", "tokens_per_s"], "pruner": "median"},
        "compares by one metric",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told(name: str, tmp_path: Path) -> None:
    values, wanted = MISTAKES[name]
    with pytest.raises(ConfigError, match=wanted) as found:
        sweep_of(tmp_path, **values)
    assert str(tmp_path / "sweep.yaml") in str(found.value)


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({"space": {"optimizer.learning_rate": [0.1]}}, "unknown key optimizer.learning_rate"),
        # At the other end.
        (
            {"space": {"train.global_batch_size": [4, 0]}},
            "train.global_batch_size = 0",
        ),
        ({"objective": "tasks/arc_easy/acc,none"}, "needs observe.tasks.names in "),
        (
            {"settings": {"data.valid": []}},
            "objective valid_loss needs data.valid or data.split in ",
        ),
    ],
)
def test_what_no_trial_could_run_with_is_found_before_the_first(
    values: dict[str, Any], wanted: str, tmp_path: Path, base: Config
) -> None:
    with pytest.raises(ConfigError, match=wanted):
        sweep_of(tmp_path, **values).check()


def test_a_grid_has_each_point_once(tmp_path: Path) -> None:
    space = {
        "optimizer.name": ["adamw", "sgd"],
        "optimizer.betas": {
            "values": [[0.9, 0.95], [0.9, 0.99]],
            "when": {"optimizer.name": "adamw"},
        },
        "train.global_batch_size": {"between": [4, 8], "step": 4},
    }
    sweep = sweep_of(tmp_path, space=space, sampler="grid", trials=None)
    points = list(sweep.grid())
    assert sweep.budget == len(points) == 6
    assert sweep.grid_points is sweep.grid_points, "made once, not for every trial"
    assert Dimension(between=(0.0, 0.3), step=0.1).points[-1] == 0.3, "no further than its end"
    assert {json.dumps(point) for point in points if point["optimizer.name"] == "sgd"} == {
        '{"optimizer.name": "sgd", "train.global_batch_size": 4}',
        '{"optimizer.name": "sgd", "train.global_batch_size": 8}',
    }
    assert sum(point.get("optimizer.betas") == [0.9, 0.99] for point in points) == 2


def bowl(chosen: dict[str, Any]) -> float:
    """A surface with one hole, off the middle of the space."""
    return (math.log10(chosen["optimizer.lr"]) + 1.6) ** 2 + (
        chosen["optimizer.weight_decay"] - 0.1
    ) ** 2


WORKER = """
import json, os, sys, threading
from pathlib import Path
from megalite.sweep.config import load_sweep_config
from megalite.sweep.study import Journal

sweep = load_sweep_config(Path(sys.argv[1]))
journal = Journal(sweep, sweep.check())

def work():
    while found := journal.next_trial():
        trial, chosen = found
        print(json.dumps(chosen), flush=True)
        if sys.argv[2:] == ["dies"]:
            os.kill(os.getpid(), 9)
        journal.tell(trial, "complete", [1.0])

threads = [threading.Thread(target=work) for _ in range(1 if sys.argv[2:] else 2)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
journal.close()
"""


def asked(journal: Journal) -> tuple[Any, dict[str, Any]]:
    found = journal.next_trial()
    assert found is not None
    return found


def worker(folder: Path, *how: str) -> subprocess.Popen[str]:
    """A process with two workers that do nothing for their trials. A lock is what shows that a
    process lives."""
    command = [sys.executable, "-c", WORKER, str(folder / "sweep.yaml"), *how]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_workers_share_the_budget_to_the_trial(tmp_path: Path, base: Config) -> None:
    space = {
        "optimizer.lr": [1e-3, 1e-2, 1e-1],
        "optimizer.weight_decay": {"between": [0.0, 0.2], "step": 0.1},
    }
    sweep = sweep_of(tmp_path, sampler="grid", space=space, trials=None)
    told = [
        process.communicate(timeout=120)[0].splitlines()
        for process in [worker(tmp_path) for _ in range(2)]
    ]
    assert sorted(told[0] + told[1]) == sorted(map(json.dumps, sweep.grid()))


def test_the_trial_of_a_dead_worker_goes_on_with_its_run(tmp_path: Path, base: Config) -> None:
    sweep = sweep_of(tmp_path, trials=2, sampler="random")
    process = worker(tmp_path, "dies")
    begun = process.communicate(timeout=120)[0].splitlines()
    assert process.returncode == -signal.SIGKILL
    journal = Journal(sweep, base)
    first, chosen = asked(journal)
    second, others = asked(journal)
    assert first.user_attrs["run"] == "trial-0000"
    assert json.dumps(chosen) == begun[0], "with the same settings"
    assert second.user_attrs["run"] != "trial-0000"
    assert others != chosen
    assert journal.next_trial() is None, "the dead worker's trial and its other start are one"
    journal.tell(first, "complete", [1.0])
    for _ in range(4):  # as often as a time limit comes
        journal.give_back([second])
        second, again = asked(journal)
        assert again == others
    for _ in range(2):
        journal.give_back([second], died=True)
        second, again = asked(journal)
        assert again == others
    journal.give_back([second], died=True)
    assert journal.next_trial() is None, "three workers have died of it"
    assert [trial.state.name for trial in own_trials(journal.study.trials)] == ["COMPLETE", "FAIL"]
    journal.close()


def test_another_objective_is_refused(tmp_path: Path, base: Config) -> None:
    Journal(sweep_of(tmp_path), base).close()
    with pytest.raises(
        ConfigError, match=r"objective: tokens_per_s, but .*sweep is a sweep for valid_loss"
    ):
        Journal(sweep_of(tmp_path, objective="tokens_per_s"), base)
    left = {path.name for path in (sweep_of(tmp_path).folder / "workers").iterdir()}
    assert left == {"asking", "journal"}, "no worker is left behind"


def test_a_disk_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    lock = FileLock(tmp_path / "lock")
    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(study, "PAUSE_S", 1e9)  # who asks again never comes to an end
    for _ in range(2):  # the first leaves nothing for the second to wait for
        with pytest.raises(ConfigError, match=r"lock cannot be locked .*mounted with -o flock"):
            lock.acquire()


def test_tpe_is_better_than_chance(
    tmp_path: Path, base: Config, request: pytest.FixtureRequest
) -> None:
    """Each ask has a sampler of its own seed: what TPE has learned must be in the journal."""
    lowest: dict[str, list[float]] = {"tpe": [], "random": []}
    for seed in range(5 if request.config.getoption("--whole") else 2):
        for sampler, found in lowest.items():
            sweep = sweep_of(
                tmp_path, name=f"{sampler}-{seed}", sampler=sampler, trials=25, seed=100 * seed
            )
            journal = Journal(sweep, base)
            while given := journal.next_trial():
                journal.tell(given[0], "complete", [bowl(given[1])])
            found.append(journal.study.best_value)
            journal.close()
    assert statistics.mean(lowest["tpe"]) < statistics.mean(lowest["random"])


@pytest.mark.parametrize(
    ("status", "console", "wanted"),
    [
        (Exit.BAD_NUMBERS, "", ("diverged", True)),
        (Exit.FAILED, "torch.OutOfMemoryError: CUDA out of memory. Tried", ("out of memory", True)),
        (137, "", ("killed, as for want of memory", True)),
        (Exit.MISTAKE, "error: data.seq_length = 7: no", ("a mistake in the command", False)),
        (Exit.FAILED, "RuntimeError: something", ("RuntimeError: something", False)),
    ],
)
def test_why_a_run_failed_is_told(
    status: int, console: str, wanted: tuple[str, bool], tmp_path: Path
) -> None:
    run = TrialRun(tmp_path / "trial", {}, 1, {})
    (tmp_path / "trial" / "console.log").write_text(f"before\n{console}\nafter")
    run._began = 0
    why, by_settings = run.why(status)
    assert wanted[0] in why
    assert by_settings == wanted[1]


def test_a_trial_behind_others_is_ended(tmp_path: Path, base: Config) -> None:
    sweep = sweep_of(tmp_path, pruner="median", trials=9, sampler="random")
    journal = Journal(sweep, base)
    for value in (1.0, 2.0, 3.0, 4.0, 5.0):
        trial, _ = asked(journal)
        trial.report(value, 8)
        journal.tell(trial, "complete", [value])
    workers = Workers(sweep, journal, 1, [])
    behind = []
    for value in (2.9, 3.1):
        trial, _ = asked(journal)
        run = TrialRun(tmp_path / str(trial.number), {}, 1, {})
        lines = [{"step": 8, "loss": 0.0}, {"step": 8, "valid_loss": value}]
        (run.folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
        behind.append(workers._is_behind(run, trial))
    assert behind == [False, True]
    journal.close()


def test_a_trial_s_files_and_its_end(tmp_path: Path) -> None:
    TrialRun(tmp_path / "trial", {"seed": 1}, 1, {})
    os.link(tmp_path / "trial" / "trial.yaml", tmp_path / "before.yaml")
    run = TrialRun(tmp_path / "trial", {"seed": 2}, 1, {})
    assert yaml.safe_load((tmp_path / "before.yaml").read_text()) == {"seed": 1}, "not torn"
    run._command = [sys.executable, "-c", ""]
    run.start()
    assert run.wait(None) == 0
    run.kill()  # as a second signal does that comes just then


def test_values_of_a_run(tmp_path: Path) -> None:
    run = TrialRun(tmp_path / "trial", {}, 1, {})
    steps = [{"step": n, "loss": 1.0, "tokens_per_s": [1, 9, 10, 11][n]} for n in range(4)]
    lines = [
        *steps,
        {"step": 2, "valid_loss": 3.0},
        {"step": 4, "valid_loss": 2.0, "valid_perplexity": None},
    ]
    (tmp_path / "trial" / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    sweep = sweep_of(tmp_path, objective=["valid_loss", "tokens_per_s", "valid_perplexity", "mfu"])
    last, median, none, lacking = map(run.value, sweep.objective)
    assert (last, median) == (2.0, 10.5)
    assert none == "the last valid_perplexity is not finite"
    assert lacking == "the run has no mfu; it has loss, tokens_per_s, valid_loss, valid_perplexity"
    assert list(run.reports("valid_loss")) == [(2, 3.0), (4, 2.0)]
    assert list(run.reports("valid_loss")) == []


def test_a_trial_that_is_asked_to_stop_is_given_to_the_next_start(
    tmp_path: Path, base: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = sweep_of(tmp_path, trials=1)
    journal = Journal(sweep, base)
    workers = Workers(sweep, journal, 1, [])
    run = (
        "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(75)); "
        "print('on', flush=True); time.sleep(60)"
    )
    start = TrialRun.start

    def start_another(self: TrialRun) -> None:
        self._command = [sys.executable, "-c", run]
        start(self)
        while "on" not in (self.folder / "console.log").read_text():
            time.sleep(0.01)
        workers._leave(signal.SIGTERM, None)

    monkeypatch.setattr(TrialRun, "start", start_another)
    assert workers.run(), "stopped"
    assert [trial.state.name for trial in journal.study.trials] == ["FAIL", "WAITING"]
    trial, chosen = asked(journal)
    assert trial.user_attrs["run"] == "trial-0000"
    assert (sweep.folder / "trial-0000" / "trial.yaml").read_text() == yaml.safe_dump(
        sweep.trial_values(chosen, sweep.folder / "trial-0000"), sort_keys=False
    )
    journal.close()


def test_the_sweep_that_comes_with_megalite_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(configs_dir().parent)
    (path,) = (configs_dir() / "sweep").glob("*.yaml")
    assert load_sweep_config(path).check().model.preset == "llama-1m"


def test_a_report_shows_all_trials(tmp_path: Path, base: Config) -> None:
    sweep = sweep_of(tmp_path, sampler="random", trials=6)
    journal = Journal(sweep, base)
    values = yaml.safe_load(sweep.config.read_text())
    sweep.config.write_text(yaml.safe_dump(values | {"run": None}))  # each trial has its own
    for number in range(5):
        trial, chosen = asked(journal)
        folder = sweep.folder / trial.user_attrs["run"]
        TrialRun(folder, sweep.trial_values(chosen, folder), 1, {})
        trial.report(bowl(chosen), 8)
        if number < 4:
            journal.tell(trial, "complete", [bowl(chosen)])
        else:
            journal.tell(trial, "out of memory", None, pruned=True)
    asked(journal)
    lines = write_report(sweep, journal.study)
    rows = [line.split() for line in lines[1:7]]
    values = [float(row[1]) for row in rows[:4]]
    assert values == sorted(values)
    assert [row[-1] for row in rows] == ["complete"] * 4 + ["memory", "runs"]
    best = load_config(sweep.folder / "best.yaml")
    assert best.optimizer.lr == pytest.approx(float(rows[0][3]), rel=1e-4)
    assert len((sweep.folder / "best.yaml").read_text().splitlines()) < 50, "defaults are left out"
    assert f"the best is {rows[0][0]}" in "\n".join(lines)
    page = (sweep.folder / "report.html").read_text()
    assert all(row[0] in page for row in rows)
    for name in ("history", "importance", "slice", "parallel", "progress"):
        assert (sweep.folder / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
        assert f'alt="{name}"' in page
    journal.close()


def test_the_names_of_settings_do_not_lie_on_each_other(tmp_path: Path, base: Config) -> None:
    from matplotlib import pyplot

    space = SPACE | {"optimizer.schedule.warmup_steps": {"between": [0, 8]}}
    sweep = sweep_of(tmp_path, sampler="random", space=space)
    journal = Journal(sweep, base)
    for _ in range(3):
        trial, chosen = asked(journal)
        journal.tell(trial, "complete", [bowl(chosen)])
    report._plots(sweep, journal.study)["slice"]()
    figure = pyplot.gcf()
    figure.canvas.draw()
    names = [axes.xaxis.label.get_window_extent() for axes in figure.axes if axes.get_xlabel()]
    assert len(names) == 3
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(names))
    pyplot.close("all")
    journal.close()


def test_a_sweep_that_is_killed_goes_on_to_the_same_end(tmp_path: Path, base: Config) -> None:
    """Killed while its first trial trains; the second diverges. Both are runs as any other."""
    settings = {
        "train.steps": STEPS,
        "checkpoint.every": 20,
        "checkpoint.keep": 9,
        "observe.eval_every": 50,
    }
    sweep = sweep_of(
        tmp_path, space={"optimizer.lr": [1e-2, 1e30]}, sampler="grid", trials=None, settings=settings
    )  # fmt: skip
    command = [sys.executable, "-m", "megalite", "sweep", str(tmp_path / "sweep.yaml")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = sweep.folder / "trial-0000"
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(run.glob("checkpoints/step-*/manifest.json")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resum" in (run / "console.log").read_text(), "the run goes on from its checkpoint"
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics if "loss" in line] == list(range(1, STEPS + 1))
    rows = [
        line.split()
        for line in done.stdout.splitlines()
        if line.startswith("trial-") and "  " in line
    ]
    assert [(row[0], row[-1]) for row in rows] == [
        ("trial-0000", "complete"),
        ("trial-0002", "diverged"),
    ]
    # As a table shows it.
    assert float(rows[0][1]) == pytest.approx(metrics[-1]["valid_loss"], rel=1e-4)
    assert load_config(sweep.folder / "best.yaml").optimizer.lr == 1e-2
