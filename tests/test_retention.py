"""What is kept of checkpoints: the newest, the best, and while steps with bad numbers last, one
that is good."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tampered_ranks import started

import megalite.training.loop
from megalite.checkpoint import folder as folder_module
from megalite.checkpoint import writing
from megalite.checkpoint.folder import Worth, complete_steps, discard, prune, step_folder
from megalite.config import Config
from megalite.errors import ConfigError
from megalite.infer.generate import find_model
from megalite.runtime.exit_codes import Exit
from megalite.train import train
from small_runs import curve_of, make_config

LAYOUTS = {
    "one": (1, ()),
    "pipeline-2": (2, ("parallel.pipeline=2",)),
    "data-2-zero-1": (2, ("parallel.zero_stage=1",)),
}
KILLS = ("step", "before the name", "after the name", "half deleted")
SAMPLE = [("one", "after the name"), ("pipeline-2", "step"), ("data-2-zero-1", "half deleted")]
"""All of both are tried by `pytest --whole`."""
RUN = (
    "train.steps=9",
    "checkpoint.every=1",
    "checkpoint.keep=1",
    "observe.eval_every=0",
    "health.bad_steps_limit=3",
)


def killed_at(when: str, folder: Path) -> None:
    """Rank 0 kills itself in the second step that is refused, or in its save."""

    def kill_before(owner: Any, name: str, is_it: Callable[..., bool]) -> None:
        original = getattr(owner, name)

        def killing(*arguments: Any, **more: Any) -> Any:
            if is_it(*arguments):
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **more)

        setattr(owner, name, killing)

    def is_saved() -> bool:
        return step_folder(folder, 7).is_dir()

    if when == "step":
        calls = itertools.count(1)
        kill_before(megalite.training.loop, "forward_backward", lambda *_: next(calls) == 7)
    elif when == "before the name":
        kill_before(writing.Writing, "_give_name", lambda it: it.folder.name.endswith("7"))
    elif when == "after the name":
        kill_before(writing.Target, "prune", lambda *_: is_saved())
    else:
        kill_before(
            folder_module,
            "remove",
            lambda path: is_saved() and path.name.endswith(".old.tmp") and path.exists(),
        )


def train_with(
    rank: int, world_size: int, folder: Path, config: Config, blown: bool, kill: str
) -> int:
    """`blown`: the rate of step 5 makes weights of which no loss is finite."""
    import torch.distributed as dist

    if world_size > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world_size
        )
    rate = megalite.training.loop.learning_rate
    if blown:
        megalite.training.loop.learning_rate = lambda step, *more: (
            1e38 if step == 5 else rate(step, *more)
        )
    if kill and rank == 0:
        killed_at(kill, config.run.folder / "checkpoints")
    return int(train(config))


@pytest.mark.parametrize(("layout", "kill"), itertools.product(LAYOUTS, KILLS))
def test_a_run_whose_weights_blew_up_goes_on_from_before(
    tmp_path: Path, layout: str, kill: str, request: pytest.FixtureRequest
) -> None:
    """Killed amid the steps that are refused, started again as it was until it gives up, then with
    the rate mended: with keep: 1, and a checkpoint of every step, the blown one included."""
    if (layout, kill) not in SAMPLE and not request.config.getoption("--whole"):
        pytest.skip("one of the cases of --whole")
    ranks, overrides = LAYOUTS[layout]
    config = make_config(tmp_path, "llama", *RUN, *overrides)
    root = config.run.folder / "checkpoints"

    def start(
        name: str, of: Config, blown: bool = False, kill: str = ""
    ) -> tuple[set[int | None], str]:
        folder = tmp_path / name
        folder.mkdir()
        with started(ranks, folder, train_with, of, blown, kill) as processes:
            if kill:
                codes = processes.exit_codes([0])
                for process in processes.processes:
                    process.kill()
            else:
                codes = processes.exit_codes()
            return set(codes), processes.said(0)

    codes, said = start("killed", config, True, kill)
    assert -signal.SIGKILL in codes, said
    assert 4 in complete_steps(root), said
    codes, said = start("given-up", config, True)
    assert codes == {Exit.BAD_NUMBERS}, said
    assert complete_steps(root) == [4, 5, 8], said
    assert f"{step_folder(root, 4)}" in said.rpartition("error: ")[2]
    codes, said = start("mended", config)
    assert codes == {Exit.DONE}, said
    assert f"going back to {step_folder(root, 4)}, the newest that is known to be good" in said
    assert [path.name for path in root.glob("*.refused")] == ["step-00000008.refused"]
    assert complete_steps(root) == [8, 9], (
        "of which no step has followed the last, as the loss of step 6 is finite too"
    )
    never = make_config(tmp_path, "llama", *RUN, *overrides, "run.name=never")
    assert start("never", never)[0] == {Exit.DONE}
    assert curve_of(config) == curve_of(never)


def test_a_model_is_not_taken_from_just_before_the_step_that_stopped_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(tmp_path, "llama", *RUN, "health.not_finite=stop")
    rate = megalite.training.loop.learning_rate
    monkeypatch.setattr(
        megalite.training.loop, "learning_rate", lambda n, *more: 1e38 if n == 5 else rate(n, *more)
    )
    assert train(config) == Exit.BAD_NUMBERS
    root = config.run.folder / "checkpoints"
    assert complete_steps(root)[-1] == 5, "which step 6 finds blown"
    assert find_model(config.run.folder) == step_folder(root, 4)
    said = capsys.readouterr().err
    assert (
        f"{step_folder(root, 5)} was saved before a step with bad numbers, which ended the run"
        in said
    )
    assert f"{step_folder(root, 4)}, the newest that is known to be good, is taken" in said


def write(root: Path, step: int, refused: int, valid_loss: float | None) -> None:
    folder = step_folder(root, step)
    folder.mkdir(parents=True)
    # Every other one as version 0.1 wrote it.
    noted = {"refused": refused} if step % 2 else {"numbers": {"in_a_row": refused}}
    state = json.dumps({"step": step, "valid_loss": valid_loss} | noted)
    (folder / "train_state.json").write_text(state)
    (folder / "manifest.json").write_text(
        json.dumps({"files": {"train_state.json": {"size": len(state)}}})
    )


@pytest.mark.parametrize("seed", range(20))
def test_nothing_displaces_what_is_worth_more(tmp_path: Path, seed: int) -> None:
    """Any history of good and refused steps, of saves, validations, restarts without a prune."""
    rng = random.Random(seed)
    keep, keep_best, every = rng.randint(1, 3), rng.randint(0, 2), rng.randint(1, 4)
    refused, is_refused, losses, saved = 0, False, dict[int, float](), list[int]()
    for step in range(1, 60):
        is_refused = rng.random() < (0.8 if is_refused else 0.1)
        refused = refused + 1 if is_refused else 0
        if step % every:
            continue
        valid = rng.random() if rng.random() < 0.5 and not refused else None
        worth = Worth(step, refused)
        prune(tmp_path, keep, keep_best, worth)
        write(tmp_path, step, refused, valid)
        saved.append(step)
        losses |= {} if valid is None else {step: valid}
        if rng.random() < 0.3:  # killed before
            continue
        before = set(complete_steps(tmp_path))
        prune(tmp_path, keep, keep_best, worth)
        kept = set(complete_steps(tmp_path))
        assert kept >= set(saved[-keep:])
        assert kept >= set(sorted(losses, key=lambda step: (losses[step], -step))[:keep_best])
        known = [one for one in saved if one < step - refused]
        assert kept >= set(known[-1:]), "known by a good step after it"
        assert kept >= set([one for one in saved if one <= step - refused][-1:]), (
            "from before the refused steps"
        )
        assert len(kept) <= keep + keep_best + (2 if refused else 1)
        assert kept <= before


def test_a_run_is_asked_by_the_newest_that_is_good(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Step 5 made weights that are beyond repair: what is saved of it and later is no model to talk
    to."""
    root = tmp_path / "checkpoints"
    for step, refused in ((4, 0), (5, 0), (8, 3)):
        write(root, step, refused, None)
    assert find_model(tmp_path) == step_folder(root, 4)
    said = capsys.readouterr().err
    assert (
        f"{step_folder(root, 8)} was saved after 3 steps in a row with bad numbers; {step_folder(root, 4)}"
        in said
    )
    discard(step_folder(root, 4))
    assert find_model(tmp_path) == step_folder(root, 8)
    assert capsys.readouterr().err.endswith("with bad numbers; there is none from before them\n")
    write(root, 9, 0, None)
    assert (find_model(tmp_path), capsys.readouterr().err) == (step_folder(root, 9), "")


def test_the_best_is_kept_and_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    best = (
        "checkpoint.keep_best=1",
        "checkpoint.keep=1",
        "checkpoint.every=2",
        "observe.eval_every=2",
    )
    config = make_config(tmp_path, "llama", *best, "train.steps=8")
    losses = {2: 4.5, 4: 3.25, 6: 3.5, 8: 4.0}
    found = iter(losses.values())
    monkeypatch.setattr(
        "megalite.training.run_hooks.validate", lambda *arguments: {"loss": next(found)}
    )
    assert train(config) == Exit.DONE
    step = 4
    root = config.run.folder / "checkpoints"
    assert complete_steps(root) == sorted({step, 6, 8})
    said = capfd.readouterr().out
    assert f"best by validation loss so far: {step_folder(root, step)} ({losses[step]:.4f})" in said


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("data.valid=[]",), "needs data.valid or data.split"),
        (("checkpoint.every=12",), "checkpoint.every 12 is no multiple of observe.eval_every 8"),
        (("observe.eval_every=0",), "checkpoint.every 8 is no multiple of observe.eval_every 0"),
    ],
)
def test_the_best_by_no_validation_is_refused(
    tmp_path: Path, overrides: tuple[str, ...], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        make_config(tmp_path, "llama", "checkpoint.keep_best=1", *overrides)
