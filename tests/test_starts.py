"""What a start does before its first step: one that is refused leaves the run as it was; one that
goes on keeps what it replaces, and says which of its settings lose to something else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import megalite.train
from megalite.checkpoint.folder import complete_steps, step_folder
from megalite.checkpoint.tensors import CheckpointError
from megalite.config import Config
from megalite.config.no_effect import no_effect
from megalite.errors import ConfigError, DataError
from megalite.runtime.exit_codes import Exit
from megalite.train import train
from ranks import run_ranks
from small_runs import make_config, metrics_of

LAYOUTS = ("parallel.pipeline=2", "parallel.zero_stage=1")
SHORT = ("train.steps=6", "checkpoint.every=2", "checkpoint.keep=9", "observe.eval_every=0")


def contents(folder: Path) -> dict[str, bytes]:
    """Of all files but those by which processes find each other."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "lock" and "health" not in path.parts
    }


def refused(rank: int, world_size: int, cases: list[tuple[Config, type[Exception], str]]) -> None:
    opened: list[Any] = []
    megalite.train.Recorder = lambda *arguments, **more: opened.append(arguments)  # type: ignore[assignment, misc]
    for config, error, words in cases:
        with pytest.raises(error, match=words):
            train(config)
    assert opened == [], "no sink was opened, W&B's among them"


REFUSED = {
    "model": (
        ("model.rope_theta=5e5",),
        CheckpointError,
        r"model\.rope_theta = 500000\.0, there 10000\.0",
    ),
    "shape": (("model.hidden_size=64",), CheckpointError, r"model\.hidden_size = 64, there 32"),
    "data": (("train.seed=9",), DataError, r"train\.seed 3 → 9"),
    "steps": (
        ("train.steps=3",),
        ConfigError,
        r"train\.steps = 3, but \S+step-00000004 has 4 steps done already",
    ),
    "foreign": (
        ("checkpoint.resume={other}",),
        CheckpointError,
        r"up to step-00000004, which did not begin there",
    ),
}


def test_a_refused_start_leaves_the_run_as_it_was(tmp_path: Path) -> None:
    run = make_config(tmp_path, "llama", *SHORT, "train.stop_at=4")
    train(run)
    train(make_config(tmp_path, "llama", *SHORT, "train.stop_at=2", "run.name=other"))
    before = contents(run.run.folder)
    assert "config.yaml" in before
    other = step_folder(tmp_path / "runs" / "other" / "checkpoints", 2)
    cases = [
        (
            make_config(
                tmp_path, "llama", *SHORT, *(text.format(other=other) for text in overrides)
            ),
            error,
            words,
        )
        for overrides, error, words in REFUSED.values()
    ]
    run_ranks(1, refused, cases)
    assert contents(run.run.folder) == before
    layouts = [
        make_config(tmp_path, "llama", *SHORT, "model.norm_eps=1e-3", layout) for layout in LAYOUTS
    ]
    run_ranks(
        2,
        refused,
        [(config, CheckpointError, r"model\.norm_eps = 0\.001, there 1e-05") for config in layouts],
    )
    assert contents(run.run.folder) == before


def test_what_a_start_replaces_is_kept(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    first = make_config(tmp_path, "llama", *SHORT, "train.stop_at=4")
    train(first)
    folder, lines = first.run.folder, metrics_of(first)
    for step in (2, 4):
        step_folder(folder / "checkpoints", step).rename(tmp_path / f"gone-{step}")
    (tmp_path / "gone-2").rename(step_folder(folder / "checkpoints", 2))
    second = make_config(tmp_path, "llama", *SHORT, "optimizer.lr=0.02")
    train(second)
    said = capfd.readouterr().out
    assert "changed since step 2: train.stop_at 4 → null; optimizer.lr 0.01 → 0.02" in said
    assert "warning: the learning rate jumps: 0.0" in said
    kept = folder / "config.until-step-00000002.yaml"
    assert f"the config before is kept as {kept}" in said
    assert kept.read_text() == first.to_yaml()
    assert (folder / "config.yaml").read_text() == second.to_yaml()
    assert (
        f"{folder / 'metrics.jsonl'}: lines of steps 3 to 4, done again, go to metrics.replaced.jsonl"
        in said
    )

    def replaced() -> list[dict[str, Any]]:
        return [
            json.loads(line)
            for line in (folder / "metrics.replaced.jsonl").read_text().splitlines()
        ]

    assert replaced() == [line for line in lines if line["step"] > 2]
    lines = metrics_of(second)
    for step in complete_steps(folder / "checkpoints"):
        step_folder(folder / "checkpoints", step).rename(tmp_path / f"gone-again-{step}")
    train(make_config(tmp_path, "llama", *SHORT, "train.stop_at=1"))  # begins at step 1
    assert replaced()[-len(lines) :] == lines
    assert "lines of steps 1 to 6, done again" in capfd.readouterr().out


def test_a_checkpoint_that_is_asked_for_is_taken_and_a_requeued_job_goes_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = make_config(tmp_path, "llama", *SHORT)
    train(config)
    root, lines = config.run.folder / "checkpoints", metrics_of(config)
    back = make_config(
        tmp_path, "llama", *SHORT, f"checkpoint.resume={step_folder(root, 2)}", "train.stop_at=4"
    )
    capfd.readouterr()
    assert train(back) == Exit.DONE
    said = capfd.readouterr().out
    assert f"checkpoint.resume: going back to {step_folder(root, 2)} from step-00000006" in said
    assert "resumed after step 2" in said
    assert "changed since step 2: train.stop_at null → 4; checkpoint.resume auto → " in said
    assert complete_steps(root) == [2, 4]
    assert sorted(path.name[:18] for path in root.glob("*.left-*")) == [
        "step-00000004.left",
        "step-00000006.left",
    ]
    again = make_config(tmp_path, "llama", *SHORT, f"checkpoint.resume={step_folder(root, 2)}")
    assert train(again) == Exit.DONE
    said = capfd.readouterr().out
    assert f"checkpoint.resume: the run has begun at {step_folder(root, 2)}" in said
    assert "resumed after step 4" in said, "not from step 2 again"
    keys = ("step", "loss", "grad_norm")
    assert [[line.get(key) for key in keys] for line in metrics_of(again) if "loss" in line] == [
        [line.get(key) for key in keys] for line in lines if "loss" in line
    ]


NO_EFFECT = {
    "profile.steps=[20, 22]": "profile.steps = [20, 22] has no effect: this start trains steps 5 to 16",
    "profile.steps=[2, 4]": "profile.steps = [2, 4] has no effect: this start trains steps 5 to 16",
    "profile.steps=[2, 6]": "profile.steps = [2, 6] is cut: this start trains steps 5 to 16",
    "profile={steps: [6, 7], ranks: [0, 2]}": "profile.ranks = [0, 2]: there is no rank 2 among 2",
    "profile.memory=true": "profile.memory = True has no effect; it needs profile.steps",
    "train.stop_at=20": "train.stop_at = 20 has no effect: the last step is train.steps = 16",
    "train.stop_at=4": "train.stop_at = 4, and 4 steps are done already: there is nothing to do",
    "train.steps=4": "train.steps = 4, and 4 steps are done already: there is nothing to do",
    "data.phases=[{after_step: 16, weights: {corpus: 1}}]": "data.phases: the phase after step 16 never begins",
    "observe.wandb.project=mine": "observe.wandb.project = mine has no effect; it needs observe.wandb.mode",
    "observe.tasks.limit=5": "observe.tasks.limit = 5 has no effect; it needs observe.tasks.names",
    "data.valid=[]": "observe.eval_every = 8 has no effect; it needs data.valid or data.split",
    "optimizer.schedule.name=constant": "optimizer.schedule.min_lr = 0.001 has no effect; it needs",
    "data.temperature=2": "data.temperature = 2.0 has no effect; it needs several sources",
}


@pytest.mark.parametrize("override", NO_EFFECT)
def test_a_setting_that_loses_is_named(tmp_path: Path, override: str) -> None:
    found = no_effect(make_config(tmp_path, "llama", override), start_step=4, world_size=2)
    assert any(line.startswith(f"warning: {NO_EFFECT[override]}") for line in found), found


def test_settings_that_work_are_not_named(tmp_path: Path) -> None:
    working = (
        "profile={steps: [5, 16], ranks: [1]}",
        "train.stop_at=16",
        "observe.wandb={mode: offline, project: x}",
    )
    assert no_effect(make_config(tmp_path, "llama", *working), start_step=4, world_size=2) == []
