"""Ranks that hang are found, named and ended; ranks that only take long are left alone."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from tampered_ranks import Ranks, training

import megalite.training.parts
from megalite.checkpoint.folder import complete_steps
from megalite.comm.mesh import ALONE, Axis, Fold, Mesh, node_name
from megalite.engine.native import NativeEngine
from megalite.health.flight import Flight, describe_flights
from megalite.health.heartbeat import Heartbeat, read_all, write
from megalite.health.report import describe_hang, state_of
from megalite.health.watchdog import Watchdog
from megalite.parallel.stage import Stage
from megalite.runtime.activity import NOW
from megalite.runtime.exit_codes import Exit
from small_runs import make_config, metrics_of

TIMEOUT_S = 1.5
QUIET = ("observe.eval_every=0", "checkpoint.every=0")


def hanging(
    tmp_path: Path, tamper: Callable[[int], None], *overrides: str
) -> AbstractContextManager[Ranks]:
    overrides = (f"health.hang_timeout_s={TIMEOUT_S}", "train.steps=100000", *QUIET, *overrides)
    return training(2, tmp_path, make_config(tmp_path, "llama", *overrides), tamper)


def stacks_of(folder: Path, rank: int) -> str:
    (found,) = (folder / "runs" / "test" / "health").glob(f"hang-of-*/rank-{rank:05d}.txt")
    return found.read_text()


def leave_alone(rank: int) -> None:
    pass


def test_a_rank_that_is_stopped_is_named_by_the_others(tmp_path: Path) -> None:
    with hanging(tmp_path, leave_alone) as ranks:
        metrics = tmp_path / "runs" / "test" / "metrics.jsonl"
        while not metrics.exists() or metrics.read_text().count("\n") < 3:
            assert all(process.is_alive() for process in ranks.processes), ranks.said(0)
            time.sleep(0.05)
        pid = ranks.processes[1].pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        assert ranks.exit_codes(of=[0]) == [Exit.HUNG, None]
        said = ranks.said(0)
        behind, waiting = said.split("behind:")[1].split("waiting for others:")
        assert (
            f"rank 1 on {node_name()} (process {pid}): cannot speak, stopped by a signal" in behind
        )
        assert "rank 0" not in behind
        assert re.search(
            r"rank 0: step \d+.*; in (all_reduce|reduce_scatter|all_gather) \d+ over \w+", waiting
        )
        assert "exit status 76" in said
        assert "in all_reduce" in stacks_of(tmp_path, 0) or "_wait_for" in stacks_of(tmp_path, 0)
        report = next((tmp_path / "runs" / "test" / "health").glob("hang-of-*/report.txt"))
        assert report.read_text() in said


def wait_for_the_others_words() -> None:
    """All ranks can speak, so that the one that reports waits for all however busy the machine
    is."""
    init = Watchdog.__init__

    def patient(self: Watchdog, *arguments: Any) -> None:
        init(self, *arguments)
        self._grace_s = 60.0

    Watchdog.__init__ = patient  # type: ignore[method-assign]


def sleep_before_a_collective(rank: int) -> None:
    wait_for_the_others_words()
    all_reduce = megalite.training.parts.all_reduce

    def sleepy(*given: Any) -> torch.Tensor:
        if NOW.step == 3:
            time.sleep(3600)
        return all_reduce(*given)

    if rank == 0:
        megalite.training.parts.all_reduce = sleepy


def test_a_rank_that_does_not_come_to_a_collective_is_named_with_its_line(tmp_path: Path) -> None:
    with hanging(tmp_path, sleep_before_a_collective) as ranks:
        assert ranks.exit_codes() == [Exit.HUNG, Exit.HUNG]
        line = 1 + Path(__file__).read_text().split("\n").index("            time.sleep(3600)")
        behind, waiting = ranks.said(0).split("behind:")[1].split("waiting for others:")
        assert re.search(
            rf"rank 0 on .*: step 3; no progress for [1-9]\d* s; at .*test_watchdog.py:{line} in sleepy",
            behind,
        )
        assert "rank 1: step 3" in waiting
        # The number of the collective is that of torch's own recorder.
        assert re.search(
            r"world: rank 0 after gloo:\w+ \d+, with none under way; rank 1 in gloo:all_reduce \d+ of 1? ?\(",
            waiting,
        ), waiting
        assert f'File "{__file__}", line {line} in sleepy' in stacks_of(tmp_path, 0)
        assert "hang:" not in ranks.said(1)  # one rank speaks for all


def get_stuck_in_a_pass(rank: int) -> None:
    wait_for_the_others_words()
    forward = Stage.forward

    def stuck(self: Stage, *arguments: Any) -> torch.Tensor:
        while NOW.step == 2 and NOW.micro_batch == 1:
            time.sleep(0.01)
        return forward(self, *arguments)

    if rank == 1:
        Stage.forward = stuck  # type: ignore[method-assign]


def test_a_rank_stuck_in_a_pipeline_pass_is_named_with_the_pass(tmp_path: Path) -> None:
    with hanging(tmp_path, get_stuck_in_a_pass, "parallel.pipeline=2") as ranks:
        assert ranks.exit_codes() == [Exit.HUNG, Exit.HUNG]
        behind, waiting = ranks.said(0).split("behind:")[1].split("waiting for others:")
        assert re.search(
            r"rank 1 on .*: step 2, forward of stage 1, micro-batch 1; .* in stuck", behind
        )
        assert re.search(
            r"rank 0: step 2, (for|back)ward of stage 0, micro-batch \d; in message over pipeline",
            waiting,
        )


def take_long(rank: int) -> None:
    forward, assemble = Stage.forward, NativeEngine._assemble
    late = TIMEOUT_S * 1.4

    def slow_once(self: Stage, *arguments: Any) -> torch.Tensor:
        if NOW.phase in {"first step", "validating"} and not slow_in.issuperset({NOW.phase}):
            slow_in.add(NOW.phase)
            time.sleep(late)
        return forward(self, *arguments)

    def slow_save(self: NativeEngine, *arguments: Any) -> Any:
        time.sleep(late / len(self.states))
        return assemble(self, *arguments)

    slow_in: set[str] = set()
    if rank == 1:
        Stage.forward, NativeEngine._assemble = slow_once, slow_save  # type: ignore[method-assign]


def test_a_slow_first_step_validation_and_save_are_no_hang(tmp_path: Path) -> None:
    """Although rank 0 waits in one collective for longer than the timeout."""
    overrides = (
        "train.steps=4",
        "checkpoint.every=0",
        "observe.eval_every=2",
        "observe.eval_batches=1",
    )
    with hanging(tmp_path, take_long, *overrides) as ranks:
        assert ranks.exit_codes() == [Exit.DONE, Exit.DONE], ranks.said(0)
        folder = tmp_path / "runs" / "test"
        assert complete_steps(folder / "checkpoints") == [4]
        assert len([line for line in metrics_of(make_config(tmp_path)) if "loss" in line]) == 4
        assert not list((folder / "health").glob("hang-of-*"))
        beats = read_all(folder / "health", 2, beat_of(folder, 0).run)
        assert [beat.phase for beat in beats.values()] == ["ended", "ended"]


def beat_of(folder: Path, rank: int) -> Heartbeat:
    return Heartbeat(**json.loads((folder / "health" / f"rank-{rank:05d}.json").read_text()))


def beat(rank: int, **changes: Any) -> Heartbeat:
    values = {
        "host": f"n{rank}", "pid": 40 + rank, "run": 1, "beat": 9, "time": time.time(), "phase": "training", "step": 7,
        "micro_batch": -1, "action": "", "waits_in": "", "over": "", "number": 0, "stalled_s": 301.0,
        "patience_s": 300.0,
    }  # fmt: skip
    return Heartbeat(rank, **(values | changes))


def watchdog_of(tmp_path: Path) -> Watchdog:
    config = make_config(tmp_path, "llama", "health.hang_timeout_s=10")
    config.run.folder.mkdir(parents=True)
    (config.run.folder / "health").mkdir()
    return Watchdog(config, Mesh.alone())


def test_a_process_that_was_suspended_has_not_been_idle(tmp_path: Path) -> None:
    watchdog = watchdog_of(tmp_path)
    watchdog._looked -= 3600
    watchdog._look()
    assert 0 < watchdog._stalled_s <= 2 * watchdog._interval


def test_others_are_not_called_silent_while_the_own_disk_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watchdog = watchdog_of(tmp_path)

    def silent(stalled_s: float) -> bool:
        watchdog._stalled_s = stalled_s
        watchdog._write(watchdog._take())
        return watchdog._is_silent(1, beat(1))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", lambda *_: fail_with(errno.EIO))
        assert [silent(stalled_s) for stalled_s in (1, 100)] == [False, False]
    assert [silent(stalled_s) for stalled_s in (101, 104, 106)] == [False, False, True]


def fail_with(number: int) -> None:
    raise OSError(number, os.strerror(number))


def test_heartbeats_of_an_earlier_start_are_nobodys(tmp_path: Path) -> None:
    for rank, start in enumerate((1, 2)):
        write(tmp_path, beat(rank, run=start))
    assert read_all(tmp_path, 2, 2).keys() == {1}


def test_of_ranks_that_all_wait_those_with_fewer_collectives_are_behind() -> None:
    """Four ranks, data 2 × tensor 2: rank 3 has skipped a collective of its tensor group."""
    data, tensor = Axis(2, 0, None, "data"), Axis(2, 0, None, "tensor")
    mesh = Mesh(
        ALONE, data, ALONE, tensor, data, ALONE, Axis(4, 0, None, "world"), torch.device("cpu")
    )
    counts = {"tensor": 50, "world": 7}
    beats = {
        rank: beat(rank, waits_in="all_reduce", over="world", number=7, collectives=counts)
        for rank in (0, 1)
    }
    beats[2] = beat(
        2, waits_in="all_gather", over="tensor", number=51, collectives={"tensor": 51, "world": 6}
    )
    beats[3] = beat(3, waits_in="all_reduce", over="world", number=7, collectives=counts)
    text = describe_hang(beats, [0, 1, 2, 3], beats[0], mesh, Path("hang"))
    behind, waiting = text.split("behind:")[1].split("waiting for others:")
    assert re.findall(r"rank \d", behind) == [
        "rank 2",
        "rank 3",
    ]  # of the world's, and of the tensor group's
    assert "ranks 0-1, 3: step 7; in all_reduce 7 over world for 301 s" in waiting


def test_of_devices_that_hang_the_report_says_which_rank_is_in_which_collective() -> None:
    """Data 2 × tensor 2: the hosts are far ahead, and rank 3's device has not come to what rank 2's
    is in."""
    data, tensor = Axis(2, 0, None, "data"), Axis(2, 0, None, "tensor")
    mesh = Mesh(
        ALONE, data, ALONE, tensor, data, ALONE, Axis(4, 0, None, "world"), torch.device("cpu")
    )

    def launched(*states: str) -> list[Flight]:
        return [
            Flight("tensor", 50 + i, "nccl:all_reduce", "2×64", state)
            for i, state in enumerate(states)
        ]

    flights = {
        0: launched("ended", "ended"),
        1: launched("ended", "ended"),
        2: launched("ended", "started"),
    }
    flights[3] = launched("scheduled", "scheduled")
    assert describe_flights(flights, mesh) == [
        "tensor: rank 2 in nccl:all_reduce 51 of 2×64 (started); rank 3 in nccl:all_reduce 50 of 2×64 (scheduled)"
    ]


def test_groups_of_experts_are_those_of_their_fold() -> None:
    """Of data 4 × tensor 2, experts 2 × 2 on two replicas: rank 6 waits for the rank of the other
    expert, 4."""
    data, tensor, world = (
        Axis(size, 0, None, name) for size, name in ((4, "data"), (2, "tensor"), (8, "world"))
    )
    fold = Fold(Axis(4), Axis(2), Axis(2), Axis(2))
    mesh = Mesh(ALONE, data, ALONE, tensor, data, ALONE, world, torch.device("cpu"), fold)
    counts = {"world": 7, "expert": 8}
    beats = {
        rank: beat(rank, waits_in="all_reduce", over="world", number=7, collectives=counts)
        for rank in range(8)
    }
    beats[6] = beat(
        6, waits_in="all_to_all", over="expert", number=9, collectives={"world": 6, "expert": 9}
    )
    text = describe_hang(beats, range(8), beats[0], mesh, Path("hang"))
    behind, _ = text.split("behind:")[1].split("waiting for others:")
    assert re.findall(r"rank \d", behind) == [
        "rank 4",
        "rank 6",
    ]  # of the experts', and of the world's


def test_a_report_of_many_ranks_stays_short() -> None:
    world = Axis(512, 0, None, "world")
    mesh = Mesh(ALONE, world, ALONE, ALONE, world, world, world, torch.device("cpu"))
    beats = {rank: beat(rank, waits_in="all_reduce", over="world", number=7) for rank in range(500)}
    text = describe_hang(beats, range(500), beats[0], mesh, Path("hang"))
    assert "rank 500: was never heard of" in text
    assert "and 4 more" in text
    assert "ranks 0-499: step 7" in text
    assert len(text.splitlines()) < 20


def test_state_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert state_of(2**22 + 1) == "its process is gone"
    assert state_of(os.getpid()) == ""

    def goes(path: Path) -> str:
        raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))

    monkeypatch.setattr(Path, "read_text", goes)
    assert state_of(os.getpid()) == "its process is gone", "between opening the file and reading it"


def test_a_disk_that_is_gone_for_a_while_does_not_end_the_watch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, exists, asked = (
        make_config(tmp_path, "llama", "health.hang_timeout_s=4"),
        Path.exists,
        threading.Event(),
    )

    def gone(path: Path) -> bool:
        if path.name.startswith("hang-of-"):
            asked.set()
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return exists(path)

    monkeypatch.setattr(Path, "exists", gone)
    with Watchdog(config, Mesh.alone()):
        assert asked.wait(60)
    assert beat_of(config.run.folder, 0).phase == "ended"
