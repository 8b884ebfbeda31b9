"""What hooks keep in a checkpoint, and what becomes of it where the next start has other hooks."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import pytest

from megalite.config import HookConfig
from megalite.errors import CheckpointError
from megalite.registry import hooks
from megalite.train import train
from megalite.training.hooks import Hook, Step
from megalite.training.parts import RankModel
from megalite.training.run import Run
from small_runs import make_config

ASKED = Counter[tuple[str, int]]()


@hooks.register("adds")
class AddsConfig(HookConfig):
    """Adds up the losses, by `factor`."""

    name: Literal["adds"] = "adds"
    factor: float = 1.0

    def build(self, run: Run, parts: RankModel) -> Hook:
        return Adds(self.factor)


class Adds(Hook):
    def __init__(self, factor: float):
        self.factor, self.losses = factor, list[float]()

    def is_due(self, step: Step) -> bool:
        ASKED[str(self.factor), step.number] += 1
        return True

    def act(self, step: Step) -> None:
        assert self in step.due
        self.losses.append(float(step.record["loss"]) * self.factor)

    def state(self) -> dict[str, Any]:
        return {"losses": self.losses}

    def load_state(self, state: dict[str, Any]) -> None:
        self.losses = [float(loss) for loss in state["losses"]]


def kept(folder: Path, name: str, step: int) -> dict[str, Any]:
    path = folder / "runs" / name / "checkpoints" / f"step-{step:08}" / "train_state.json"
    found: dict[str, Any] = json.loads(path.read_text())["hooks"]
    return found


def test_hooks_go_on_from_their_states(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    two = "hooks=[{name: adds}, {name: adds, factor: 2}]"
    ASKED.clear()
    train(make_config(tmp_path, "llama", "run.name=whole", two, "train.steps=6"))
    assert {(factor, step): 1 for factor in ("1.0", "2.0") for step in range(1, 7)} == ASKED
    train(make_config(tmp_path, "llama", "run.name=parts", two, "train.steps=6", "train.stop_at=3"))
    train(make_config(tmp_path, "llama", "run.name=parts", two, "train.steps=6"))
    whole = kept(tmp_path, "whole", 6)
    assert whole.keys() == {"guard", "adds", "adds#2"}
    assert [2 * loss for loss in whole["adds"]["losses"]] == whole["adds#2"]["losses"]
    assert kept(tmp_path, "parts", 6) == whole
    said = capsys.readouterr().out
    assert "afresh" not in said
    assert "dropped" not in said


def test_other_hooks_than_before_are_said_and_what_none_can_read_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ("run.name=other", "train.steps=6")
    train(make_config(tmp_path, "llama", *run, "train.stop_at=2", "hooks=[{name: adds}]"))
    monkeypatch.setattr(Adds, "load_state", lambda self, state: state["sums"])
    with pytest.raises(
        CheckpointError, match=r"step 2: train_state\.json: hooks\.adds = .* KeyError: 'sums'"
    ):
        train(make_config(tmp_path, "llama", *run, "hooks=[{name: adds}]"))
    capsys.readouterr()
    train(make_config(tmp_path, "llama", *run, "train.stop_at=4", "hooks=[]"))
    assert (
        "warning: the run has no hook adds any more; its state at step 2 is dropped"
        in capsys.readouterr().out
    )
    train(make_config(tmp_path, "llama", *run, "hooks=[{name: adds}]"))
    assert (
        "the checkpoint of step 4 has no state of the hook adds, which begins afresh"
        in capsys.readouterr().out
    )
    assert len(kept(tmp_path, "other", 6)["adds"]["losses"]) == 2
