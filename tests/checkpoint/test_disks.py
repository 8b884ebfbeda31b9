"""A disk that is full, read-only, gone or slow costs a checkpoint, never the run, an older
checkpoint, or more room."""

from __future__ import annotations

import errno
import json
import os
import re
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from megalite.checkpoint import writing
from megalite.checkpoint.folder import complete_steps, step_folder
from megalite.checkpoint.load import from_seed
from megalite.checkpoint.save import Saver
from megalite.comm.mesh import make_mesh
from megalite.config import Config
from megalite.engine.layout import bucket_elements, choose_owners
from megalite.errors import NotSaved
from megalite.models import weight_table
from megalite.plan import make_plan
from megalite.train import train
from megalite.training.parts import build
from ranks import run_ranks
from small_runs import curve_of, make_config

HERE = Path(__file__).parent


def no_mounts() -> str:
    done = subprocess.run(
        ["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stderr


def checkpoints(config: Config) -> Path:
    return config.run.folder / "checkpoints"


@pytest.mark.skipif(bool(no_mounts()), reason="needs user namespaces, to mount disks of its own")
def test_training_goes_on_on_a_full_disk(tmp_path: Path) -> None:
    """Checkpoints, metrics, heartbeats and the log are all on it."""
    values = make_config(
        tmp_path, "llama", "train.steps=6", "checkpoint.every=1", "observe.eval_every=0", "observe.log_every=1",
        "health.hang_timeout_s=2",
    ).model_dump(mode="json", exclude={"run"})  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(values))
    folders = [tmp_path / name for name in ("full", "full-to-the-end", "read-only")]
    done = subprocess.run(
        ["unshare", "-rm", sys.executable, HERE / "on_a_small_disk.py", tmp_path / "config.json", *folders],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    full, to_the_end, read_only = json.loads(done.stdout)
    saved = ["step-00000001", "step-00000002"]
    for found in (full, read_only):
        assert found["status"] == 0, found["log"]
        assert found["checkpoints"] == ["step-00000002", "step-00000005", "step-00000006"]
    assert to_the_end["status"] == 74
    assert to_the_end["checkpoints"] == saved, "older ones stand, and nothing half-written stays"
    assert to_the_end["kept"]
    assert full["steps"] == read_only["steps"] == [1, 2, 3, 4, 5, 6], (
        "lines of the metrics waited for room"
    )
    assert full["heartbeat"] == to_the_end["heartbeat"] == "ended", (
        "they go on in the place of those before"
    )
    assert "No space left on device" in full["log"]
    assert "Read-only file system" in read_only["log"]
    for step in (3, 4):
        lines = [
            line
            for line in read_only["log"].splitlines()
            if f"step-0000000{step} was not saved" in line
        ]
        assert lines
        assert len(lines) <= 2


def test_a_file_in_the_way_costs_one_checkpoint(tmp_path: Path) -> None:
    config = make_config(tmp_path, "llama", "train.steps=4", "checkpoint.every=1")
    blocker = checkpoints(config) / "step-00000003"  # a file where the folder should appear
    blocker.parent.mkdir(parents=True)
    blocker.write_text("in the way")
    train(config)
    assert complete_steps(checkpoints(config)) == [1, 2, 4]
    assert blocker.read_text() == "in the way"
    assert len(curve_of(config)) == 4


def test_a_run_whose_last_save_failed_has_not_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "PAUSES_S", (0.05,))
    config = make_config(tmp_path, "llama", "train.steps=2", "checkpoint.every=1")
    checkpoints(config).mkdir(parents=True)
    (checkpoints(config) / "step-00000002").write_text("in the way")
    with pytest.raises(NotSaved, match="step-00000002 was not saved: Not a directory"):
        train(config)
    assert complete_steps(checkpoints(config)) == [1]
    assert [path.name for path in checkpoints(config).glob("*.tmp")] == []


class Faults:
    """Calls of one function that a disk answers with an error: the first `count` of them whose
    argument `path` is found in."""

    def __init__(self, function: str, path: str, error: int, count: int = 1 << 30):
        self.function, self.path, self.error, self.count = function, path, error, count

    @contextmanager
    def happening(self) -> Iterator[None]:
        owner: Any = Path if hasattr(Path, self.function) else writing
        real, left = getattr(owner, self.function), self.count

        def faulty(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            paths = [argument for argument in arguments if isinstance(argument, Path)]
            if left and any(re.search(self.path, str(path)) for path in paths):
                left -= 1
                if self.function == "save_file":
                    paths[0].write_bytes(bytes(5000))  # a torn file
                raise OSError(self.error, os.strerror(self.error), str(paths[0]))
            return real(*arguments, **options)

        setattr(owner, self.function, faulty)
        try:
            yield
        finally:
            setattr(owner, self.function, real)


FAULTS = {
    "making the folder": Faults("mkdir", ".tmp", errno.EACCES),
    "in the middle of the weights": Faults("save_file", "model", errno.ENOSPC),
    "in the middle of the optimizer state": Faults("save_file", "exp_avg", errno.EDQUOT),
    "fsync": Faults("fsync", "model", errno.EIO),
    "reading it back": Faults("digest", "model", errno.ESTALE),
    "the state of the run": Faults("write_json", "train_state.json", errno.EROFS),
    "the manifest": Faults("write_json", "manifest.json", errno.ENOSPC),
    "fsync of the folder": Faults("fsync", "optimizer", errno.EIO),
    "giving it its name": Faults("rename", ".tmp", errno.EIO),
    "after it has its name": Faults("fsync", "checkpoints$", errno.EIO),
}
ON_ANY_RANK = (
    "in the middle of the weights",
    "in the middle of the optimizer state",
    "fsync",
    "reading it back",
)


def make_saver(
    config: Config, rank: int, world_size: int, write_extras: Callable[[Path], None]
) -> Saver:
    weights = weight_table(config.model)
    plan = make_plan(config, weights, world_size)
    mesh = make_mesh(plan, torch.device("cpu"))
    engine = build(config, plan, mesh).engine
    engine.load(from_seed(1, mesh))
    owners = choose_owners(plan, weights, config.optimizer, bucket_elements(config, plan))
    return Saver(checkpoints(config), 1, weights, mesh, engine, owners, write_extras)


def save(saver: Saver, step: int) -> tuple[str | None, list[str]]:
    saver.save(step, {"step": step})
    saver.wait()
    return saver.error, saver.news()


def go_through(rank: int, world_size: int, config: Config, broken: int, faults: list[str]) -> None:
    """Each fault comes once, then for good, then not at all."""
    writing.PAUSES_S = (0.01, 0.01)  # type: ignore[misc, assignment]
    root = checkpoints(config)
    saver = make_saver(config, rank, world_size, lambda folder: None)
    step = 1
    assert save(saver, step)[0] is None
    for name in faults:
        fault = FAULTS[name]
        step += 1
        with (
            Faults(fault.function, fault.path, fault.error, 1).happening()
            if rank == broken
            else nothing()
        ):
            error, news = save(saver, step)
        assert error is None, f"once {name}: {error}"
        if rank == 0:
            assert len(news) == 2
            assert os.strerror(fault.error) in news[0]
            assert news[0].endswith("; trying again")
            assert news[1].startswith(f"saved {step_folder(root, step)}")
            assert [path.name for path in root.iterdir()] == [step_folder(root, step).name], name
        step += 1
        with fault.happening() if rank == broken else nothing():
            error, news = save(saver, step)
        assert error is not None, f"for good {name}: {step} was saved"
        assert os.strerror(fault.error) in error
        assert world_size == 1 or name not in ON_ANY_RANK or f"rank {broken}: " in error
        if rank == 0:
            assert len(news) == 2, news
            # With keep: 1, deleting the old one too early would show.
            assert [path.name for path in root.iterdir()] == [step_folder(root, step - 1).name], (
                name
            )
    assert save(saver, step + 1)[0] is None
    if world_size > 1:
        torch.distributed.barrier()
    assert complete_steps(root) == [step + 1]


@contextmanager
def nothing() -> Iterator[None]:
    yield


def test_a_fault_anywhere_is_tried_again_and_leaves_nothing(tmp_path: Path) -> None:
    pauses = writing.PAUSES_S
    try:
        go_through(0, 1, make_config(tmp_path), 0, list(FAULTS))
    finally:
        writing.PAUSES_S = pauses  # type: ignore[misc]


def test_a_disk_that_knows_no_fsync_of_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As SMB, and buckets that are mounted."""
    files: list[int] = []

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        files.append(descriptor)

    monkeypatch.setattr(writing, "PAUSES_S", ())
    monkeypatch.setattr(os, "fsync", fsync)
    config = make_config(tmp_path)
    assert save(make_saver(config, 0, 1, lambda folder: None), 1)[0] is None
    assert complete_steps(checkpoints(config)) == [1]
    assert files


def test_a_step_that_cannot_be_saved_again_stays_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a resume from an older checkpoint."""
    monkeypatch.setattr(writing, "PAUSES_S", ())
    config = make_config(tmp_path)
    saver = make_saver(config, 0, 1, lambda folder: None)
    assert save(saver, 1)[0] is None
    with Faults("rename", r"step-00000001\.tmp", errno.EIO).happening():
        saver.save(1, {"step": 1, "again": True})
        saver.wait()
    assert saver.error is not None
    assert complete_steps(checkpoints(config)) == [1]
    assert json.loads((step_folder(checkpoints(config), 1) / "train_state.json").read_text()) == {
        "step": 1
    }


def test_what_failed_is_told_although_the_loop_has_asked_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it does after every step, while the thread is still at the first attempt."""
    monkeypatch.setattr(writing, "PAUSES_S", (0.01,))
    writes, asked = threading.Event(), threading.Event()

    def fail_once(folder: Path) -> None:
        if not writes.is_set():
            writes.set()
            assert asked.wait(60)
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    saver = make_saver(make_config(tmp_path), 0, 1, fail_once)
    saver.save(1, {"step": 1})
    assert writes.wait(60)
    assert saver.news() == []
    asked.set()
    saver.wait()
    failed, saved = saver.news()
    assert failed.endswith("step-00000001 was not saved: rank 0: Input/output error; trying again")
    assert saved.startswith("saved ")


def on_two_ranks(rank: int, world_size: int, folder: Path) -> None:
    """One start of the ranks for all of it."""
    config = make_config(folder, "llama", "parallel.tensor=2", "run.name=broken-0")
    go_through(rank, world_size, config, 0, ["making the folder", "fsync", "giving it its name"])
    go_through(
        rank,
        world_size,
        config.model_copy(update={"run": run_named(config, "broken-1")}),
        1,
        [*ON_ANY_RANK],
    )
    hang(rank, world_size, config.model_copy(update={"run": run_named(config, "hangs")}))


def run_named(config: Config, name: str) -> Any:
    return config.run.model_copy(update={"name": name})


def hang(rank: int, world_size: int, config: Config) -> None:
    """Rank 1's disk does not answer: none waits for it."""
    writing.PAUSES_S = ()  # type: ignore[misc]
    saver = make_saver(config, rank, world_size, lambda folder: None)
    assert save(saver, 1)[0] is None
    real, patience, answers = writing.save_file, writing.PATIENCE_S, threading.Event()

    def late(*arguments: Any, **options: Any) -> None:
        assert rank == 0 or answers.wait(60)
        real(*arguments, **options)

    from megalite.checkpoint import save as save_module

    writing.save_file = late
    writing.PATIENCE_S = save_module.PATIENCE_S = 0.5
    saver.save(2, {"step": 2})
    if rank == 0:
        saver.wait()
        assert saver.error is not None
        assert "nothing came of rank 1 within" in saver.error
    # The next one does not wait for the disk either, and says who is late.
    saver.save(3, {"step": 3})
    assert saver.error is not None
    assert "step-00000003 was not saved: the one before is still being written after" in saver.error
    assert saver.error.endswith("by rank 1")
    answers.set()
    writing.save_file = real
    writing.PATIENCE_S = save_module.PATIENCE_S = patience
    saver.wait()
    assert save(saver, 4)[0] is None
    torch.distributed.barrier()
    assert complete_steps(checkpoints(config)) == [4]
    assert not list(checkpoints(config).glob("*.tmp"))


def test_a_fault_of_one_rank_is_known_to_all(tmp_path: Path) -> None:
    make_config(tmp_path)
    run_ranks(2, on_two_ranks, tmp_path)
