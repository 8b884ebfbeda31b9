"""Signals: one rank is asked, all save after the same step and leave; a second signal ends a
process at once."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import megalite.train
import megalite.training.loop
from megalite.checkpoint import writing
from megalite.checkpoint.folder import complete_steps
from megalite.comm.mesh import Mesh
from megalite.config import Config
from megalite.errors import NotSaved
from megalite.health.signals import SIGNALS, StopRequests
from megalite.runtime.exit_codes import Exit, describe
from megalite.train import train
from small_runs import curve_of, make_config, metrics_of, write_corpus

SIGNALLED = 5


@pytest.fixture(autouse=True)
def handlers() -> Iterator[dict[int, Any]]:
    """Those of before, and after."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


def train_with_a_signal(config: Config, number: signal.Signals) -> tuple[Exit, list[int]]:
    """Sent in the middle of a step. Returns how training ended, and the steps that were saved."""
    rate, signals = megalite.training.loop.learning_rate, megalite.train.StopRequests
    opened: list[StopRequests] = []

    def and_signal(step: int, *rest: object) -> float:
        if step == SIGNALLED:
            os.kill(os.getpid(), number)
            while not opened[0]._asked:  # the note is another thread's
                time.sleep(0.001)
        return rate(step, *rest)  # type: ignore[arg-type]

    def and_keep(mesh: Mesh) -> StopRequests:
        opened.append(signals(mesh))
        return opened[0]

    megalite.training.loop.learning_rate = and_signal  # type: ignore[assignment]
    megalite.train.StopRequests = and_keep  # type: ignore[assignment, misc]
    try:
        return train(config), complete_steps(config.run.folder / "checkpoints")
    finally:
        megalite.training.loop.learning_rate, megalite.train.StopRequests = rate, signals  # type: ignore[misc]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_and_the_rest_is_bitwise_the_same(
    tmp_path: Path, number: signal.Signals, handlers: dict[int, Any]
) -> None:
    unbroken, broken = (
        make_config(tmp_path, "gpt2", f"run.name={name}", "checkpoint.every=0") for name in "ab"
    )
    train(unbroken)
    assert signal.getsignal(number) is handlers[number]
    status, saved = train_with_a_signal(broken, number)
    assert status == Exit.STOPPED
    assert saved == [SIGNALLED + 1], (
        "the ranks compare notes at the beginning of a step, and stop at its end"
    )
    assert not any("valid_loss" in line for line in metrics_of(broken))  # there is no time for it
    # What comes twice to one node, or later than to others, changes nothing any more.
    for late in SIGNALS:
        if late == signal.SIGINT:
            assert signal.getsignal(late) is handlers[late], "a person's"
        else:
            os.kill(os.getpid(), late)
    assert signal.set_wakeup_fd(-1) == -1
    assert train(broken) == Exit.DONE
    assert curve_of(broken) == curve_of(unbroken)


def test_a_signal_in_the_last_step_changes_nothing(tmp_path: Path) -> None:
    config = make_config(tmp_path, "llama", f"train.steps={SIGNALLED}")
    assert train_with_a_signal(config, signal.SIGTERM) == (Exit.DONE, [SIGNALLED])
    assert metrics_of(config)[-1]["valid_loss"]


def test_a_signal_ends_the_attempts_of_a_last_save_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, handlers: dict[int, Any]
) -> None:
    """It comes when no step compares signals any more."""
    attempts: list[writing.Writing] = []

    def full(self: writing.Writing) -> None:
        attempts.append(self)
        if len(attempts) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writing.Writing, "_make_folder", full)
    monkeypatch.setattr(writing, "PAUSES_S", (5.0,))
    config = make_config(tmp_path, "llama", "train.steps=2", "checkpoint.every=0")
    with pytest.raises(NotSaved, match="No space left"):
        train(config)
    assert len(attempts) == 1


# The main thread hangs as if it waited for a rank which is gone: in C, where no handler of Python's
# ever runs.
HANGING = """
import ctypes, types, megalite.health.signals
from megalite.comm.mesh import ALONE, Mesh
from megalite.health.signals import ONE_REQUEST_S

seconds = iter([7.0, 7.0 + ONE_REQUEST_S, 7.1 + ONE_REQUEST_S])

def look():
    print("looked", flush=True)
    return next(seconds)

megalite.health.signals.time = types.SimpleNamespace(monotonic=look)
with megalite.health.signals.StopRequests(Mesh.alone()):
    print("ready", flush=True)
    mutex = ctypes.create_string_buffer(64)
    while True:
        ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""


def test_a_second_signal_ends_a_hanging_process_at_once() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HANGING], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            for _ in range(3):  # the second still belongs to the first request
                process.send_signal(signal.SIGTERM)
                assert process.stdout.readline() == "looked\n"
            assert process.wait(60) == 128 + signal.SIGTERM
        finally:
            process.kill()


def rank_process(agent: int, rank: int) -> int | None:
    """Its id, once it has one."""
    for pid in Path(f"/proc/{agent}/task/{agent}/children").read_text().split():
        if f"RANK={rank}" in Path(f"/proc/{pid}/environ").read_text().split("\0"):
            return int(pid)
    return None


def test_torchrun_hands_on_what_became_of_its_ranks(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus")
    config = make_config(
        tmp_path, "llama", "train.steps=3000", "checkpoint.every=0", "observe.eval_every=0"
    )
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    command = [
        sys.executable,
        "-m",
        "megalite.launch",
        "--standalone",
        "--local-addr=127.0.0.1",
        "--nproc-per-node=2",
    ]
    command += ["-m", "megalite", "train", str(tmp_path / "config.yaml")]
    metrics = config.run.folder / "metrics.jsonl"
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as agent:
        try:
            deadline = time.monotonic() + 120
            while not metrics.exists() or len(metrics.read_text().splitlines()) < 20:
                assert agent.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.05)
            pid = rank_process(agent.pid, 1)
            assert pid is not None
            os.kill(pid, signal.SIGTERM)
            said, _ = agent.communicate(timeout=60)
        finally:
            agent.kill()
    assert agent.returncode == Exit.STOPPED, said
    assert complete_steps(config.run.folder / "checkpoints") == [metrics_of(config)[-1]["step"]]
    assert describe(Exit.STOPPED) in said.splitlines()[-1]


@pytest.mark.parametrize(
    ("status", "words"),
    [(0, "done"), (2, "mistake"), (137, "killed by SIGKILL"), (143, "killed by SIGTERM"), (9, "9")],
)
def test_every_status_has_words(status: int, words: str) -> None:
    assert words in describe(status)
