"""A rank that computes more slowly than its peers is named, on the console and in the metrics, and
only that one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tampered_ranks import Clock, training

import megalite.health.stragglers
from megalite.comm.mesh import ALONE, Axis, Mesh, node_name
from megalite.config import HealthConfig
from megalite.health.stragglers import StepTimer, Stragglers
from megalite.parallel.stage import Stage
from megalite.runtime.activity import NOW
from megalite.runtime.exit_codes import Exit
from small_runs import make_config, metrics_of

EVERY, SLOW_UNTIL = 2, 12


def slow_down(rank: int) -> None:
    """By a clock on which nothing but a forward pass takes time, however busy the machine is."""
    forward = Stage.forward

    def timed(self: Stage, *arguments: Any) -> torch.Tensor:
        Clock.now += 0.1 if rank == 1 and NOW.step <= SLOW_UNTIL else 0.01
        return forward(self, *arguments)

    Stage.forward = timed  # type: ignore[method-assign]
    megalite.health.stragglers.host_or_device_event = lambda device: Clock


def test_a_rank_that_is_slow_for_long_is_named_and_later_cleared(tmp_path: Path) -> None:
    often = (f"health.straggler_every={EVERY}", "health.straggler_factor=3", "train.steps=20")
    config = make_config(tmp_path, "llama", *often, "observe.eval_every=0", "checkpoint.every=0")
    with training(2, tmp_path, config, slow_down) as ranks:
        assert ranks.exit_codes() == [Exit.DONE] * 2, ranks.said(0)
        said = ranks.said(0)
    steps = {line["step"]: line for line in metrics_of(config) if "loss" in line}
    named = [step for step, line in steps.items() if "straggler" in line]
    # The third sample is compared when the fourth is taken, and so is the first that is in time
    # again.
    assert named == list(range(4 * EVERY, SLOW_UNTIL + 2 * EVERY))
    assert {steps[step]["straggler"] for step in named} == {1}
    assert all(steps[step]["straggler_slowness"] == pytest.approx(10.0) for step in named)
    assert said.count(f"warning: rank 1 on {node_name()} is slow: it computes") == 1
    assert said.count(f"rank 1 on {node_name()} is as fast as its peers again") == 1
    assert "rank 0 on" not in said


def test_waiting_for_other_ranks_does_not_count() -> None:
    timer, marks = (
        StepTimer(Clock),
        [(1.0, "stop"), (5.0, "go"), (7.0, "go"), (8.0, "stop"), (9.0, "stop")],
    )
    for Clock.now, method in marks:
        getattr(timer, method)()
    assert timer.seconds() == pytest.approx(1.0 + 3.0)


def stragglers_of(pipeline: int, data: int) -> Stragglers:
    stages, replicas = Axis(pipeline, 0, None, "pipeline"), Axis(data, 0, None, "data")
    mesh = Mesh(stages, replicas, ALONE, ALONE, replicas, replicas, ALONE, torch.device("cpu"))
    stragglers = Stragglers(HealthConfig(), mesh)
    ranks = range(pipeline * data)
    stragglers._hosts, stragglers._times_slow = [f"n{rank}" for rank in ranks], [0 for _ in ranks]
    return stragglers


def test_ranks_are_compared_with_those_of_the_same_stage() -> None:
    """Pipeline 2 × data 3: the second stage has more to do, and rank 4 in it is slow."""
    stragglers = stragglers_of(2, 3)
    for _ in range(3):
        assert stragglers.record() == {}
        stragglers._compare([0.1, 0.11, 0.1, 0.2, 0.3, 0.21])
    assert stragglers.record() == {"straggler": 4, "straggler_slowness": pytest.approx(0.3 / 0.21)}
    assert len(stragglers.news()) == 1
    assert not dist.is_initialized()


def test_slow_now_and_then_or_by_little_is_not_named() -> None:
    stragglers = stragglers_of(1, 3)
    for seconds in (0.3, 0.3, 0.1, 0.3, 0.3, 0.1):
        stragglers._compare([0.1, seconds, 0.1])
    for _ in range(3):
        # Five times as long, but by less than a process waits for its turn.
        stragglers._compare([0.001, 0.005, 0.001])
    assert stragglers.record() == {}
    assert stragglers.news() == []
