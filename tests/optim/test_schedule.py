"""Learning rates at the corners, worked out by hand. Steps are counted from 1; step `num_steps` is the last."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from megalite.config import OptimizerConfig, ScheduleConfig
from megalite.optim.schedule import learning_rate

PEAK, LOW, WARMUP, STEPS = 0.5, 0.1, 10, 110
HALF = (PEAK + LOW) / 2
SCHEDULES = ("constant", "linear", "cosine", "wsd")


def rates(name: str, warmup: int = WARMUP, num_steps: int = STEPS, decay_steps: int | None = None) -> list[float]:
    """rates[step] for steps 0 (unused) to `num_steps`."""
    schedule = ScheduleConfig(name=name, warmup_steps=warmup, min_lr=LOW, decay_steps=decay_steps)
    config = OptimizerConfig(lr=PEAK, schedule=schedule)
    return [math.nan, *(learning_rate(step, num_steps, config) for step in range(1, num_steps + 1))]


@pytest.mark.parametrize("name", SCHEDULES)
def test_warmup_is_linear_to_the_peak(name: str) -> None:
    # The same floating-point operations: equal, not merely close.
    assert rates(name)[1 : WARMUP + 1] == [PEAK * step / WARMUP for step in range(1, WARMUP + 1)]


# 100 steps after the warmup. A few roundings of 1e-16 each stay far below 1e-14.
@pytest.mark.parametrize(
    ("name", "corners"),
    [
        ("constant", {11: PEAK, 60: PEAK, 110: PEAK}),
        ("linear", {11: PEAK - 0.004, 35: 0.4, 60: HALF, 110: LOW}),
        (
            "cosine",
            {
                11: LOW + 0.2 * (1 + math.cos(math.pi / 100)),
                35: LOW + 0.2 * (1 + math.sqrt(0.5)),
                60: HALF,
                85: LOW + 0.2 * (1 - math.sqrt(0.5)),
                110: LOW,
            },
        ),
        # No decay_steps: a tenth of all 110 steps, 11.
        ("wsd", {11: PEAK, 99: PEAK, 100: PEAK - 0.4 / 11, 110: LOW}),
    ],
)
def test_corners(name: str, corners: dict[int, float]) -> None:
    found = rates(name)
    assert {step: found[step] for step in corners} == pytest.approx(corners, rel=1e-14)


def test_wsd_with_its_own_decay() -> None:
    found = rates("wsd", decay_steps=50)
    assert {step: found[step] for step in (11, 60, 61, 85, 110)} == pytest.approx(
        {11: PEAK, 60: PEAK, 61: PEAK - 0.008, 85: HALF, 110: LOW}, rel=1e-14
    )


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 1, WARMUP, STEPS])
def test_rises_then_never_rises_again(name: str, warmup: int) -> None:
    found = rates(name, warmup)[1:]
    assert all(a < b for a, b in pairwise(found[:warmup]))
    peak = max(0, warmup - 1)
    assert all(a >= b for a, b in pairwise(found[peak:]))
    assert all(0 < rate <= PEAK for rate in found)
    assert all(rate >= LOW for rate in found[peak:])


@pytest.mark.parametrize("name", SCHEDULES)
def test_without_warmup_the_first_step_is_not_lost(name: str) -> None:
    found = rates(name, warmup=0)
    first = {"linear": PEAK - 0.4 / STEPS, "cosine": LOW + 0.2 * (1 + math.cos(math.pi / STEPS))}
    assert found[1] == pytest.approx(first.get(name, PEAK), rel=1e-14)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_run_of_one_step(name: str) -> None:
    assert rates(name, warmup=1, num_steps=1)[1] == PEAK
    assert rates(name, warmup=0, num_steps=1)[1] == pytest.approx(PEAK if name == "constant" else LOW, rel=1e-14)


@pytest.mark.parametrize("name", ["linear", "cosine", "wsd"])
def test_past_the_end_it_stays_at_the_lowest(name: str) -> None:
    config = OptimizerConfig(lr=PEAK, schedule=ScheduleConfig(name=name, min_lr=LOW))
    assert learning_rate(STEPS + 50, STEPS, config) == pytest.approx(LOW, rel=1e-14)


def test_wsd_decay_longer_than_what_is_left_does_not_jump() -> None:
    found = rates("wsd", decay_steps=STEPS)
    assert found[WARMUP] - found[WARMUP + 1] < 2 * (found[STEPS - 1] - found[STEPS])
