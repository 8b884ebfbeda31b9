"""Learning rates at the corners, worked out by hand. Steps are counted from 1; step `num_steps` is
the last."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import pytest
from pydantic import ValidationError

from megalite.config import ScheduleConfig
from megalite.engine.optimizers.adamw import AdamWConfig
from megalite.training.schedules import learning_rate

PEAK, LOW, WARMUP, STEPS = 0.5, 0.1, 10, 110
HALF = (PEAK + LOW) / 2
SCHEDULES = ("constant", "linear", "cosine", "wsd", "polynomial", "exponential", "inverse_sqrt")
TO_THE_END = tuple(name for name in SCHEDULES if name not in ("constant", "inverse_sqrt"))
"""Schedules that come to `min_lr` one step after the last."""


def make_schedule(name: str, **values: float | None) -> ScheduleConfig:
    decay_steps = values.pop("decay_steps", None)
    given = values | ({"decay_steps": decay_steps} if name == "wsd" else {})
    if name == "exponential":  # which never comes to 0
        given["min_lr"] = given["min_lr"] or 1e-3
    return ScheduleConfig.model_validate({"name": name, **given})


def rates(
    name: str, warmup: int = WARMUP, num_steps: int = STEPS, decay_steps: int | None = None
) -> list[float]:
    """rates[step] for steps 0 (unused) to `num_steps`."""
    schedule = make_schedule(name=name, warmup_steps=warmup, min_lr=LOW, decay_steps=decay_steps)
    config = AdamWConfig(lr=PEAK, schedule=schedule)
    return [math.nan, *(learning_rate(step, num_steps, config) for step in range(1, num_steps + 1))]


@pytest.mark.parametrize("name", SCHEDULES)
def test_warmup_is_linear_to_the_peak(name: str) -> None:
    # The same floating-point operations: equal, not merely close.
    assert rates(name)[1 : WARMUP + 1] == [PEAK * step / WARMUP for step in range(1, WARMUP + 1)]


# 100 steps after the warmup, and 101 equal parts of the decay: it comes to LOW in step 111, which
# is not there. A few roundings of 1e-16 each stay far below 1e-14.
@pytest.mark.parametrize(
    ("name", "corners"),
    [
        ("constant", {11: PEAK, 60: PEAK, 110: PEAK}),
        ("linear", {11: PEAK - 0.4 / 101, 60: PEAK - 20 / 101, 110: LOW + 0.4 / 101}),
        (
            "cosine",
            {
                11: LOW + 0.2 * (1 + math.cos(math.pi / 101)),
                60: LOW + 0.2 * (1 + math.cos(math.pi * 50 / 101)),
                110: LOW + 0.2 * (1 - math.cos(math.pi / 101)),
            },
        ),
        # No decay_steps: a tenth of all 110 steps, 11.
        ("wsd", {11: PEAK, 99: PEAK, 100: PEAK - 0.4 / 12, 110: LOW + 0.4 / 12}),
        ("exponential", {11: PEAK * 0.2 ** (1 / 101), 110: LOW * 5 ** (1 / 101)}),
        # As transformers has it: the timescale is the warmup.
        ("inverse_sqrt", {11: PEAK * math.sqrt(10 / 11), 40: PEAK / 2, 110: PEAK / math.sqrt(11)}),
    ],
)
def test_corners(name: str, corners: dict[int, float]) -> None:
    found = rates(name)
    assert {step: found[step] for step in corners} == pytest.approx(corners, rel=1e-14)


def test_wsd_with_its_own_decay() -> None:
    found = rates("wsd", decay_steps=49)
    assert {step: found[step] for step in (11, 61, 62, 86, 110)} == pytest.approx(
        {11: PEAK, 61: PEAK, 62: PEAK - 0.008, 86: HALF, 110: LOW + 0.008}, rel=1e-14
    )


def test_shapes_of_the_decay() -> None:
    schedule = ScheduleConfig.model_validate(
        {"name": "wsd", "warmup_steps": WARMUP, "decay": "sqrt", "decay_steps": 24}
    )
    config = AdamWConfig(lr=PEAK, schedule=schedule)
    # 24 steps and one more: a 25th after the first, √ of which is a fifth.
    assert learning_rate(STEPS - 23, STEPS, config) == pytest.approx(PEAK * 0.8, rel=1e-14)
    schedule = ScheduleConfig.model_validate(
        {"name": "polynomial", "power": 2.0, "min_lr": LOW, "warmup_steps": 0.5}
    )
    config = AdamWConfig(lr=PEAK, schedule=schedule)
    assert learning_rate(55, STEPS, config) == PEAK, "half of the run is warmup"
    assert learning_rate(55 + 28, STEPS, config) == pytest.approx(LOW + 0.1, rel=1e-14), (
        "half of the decay is over"
    )
    with pytest.raises(ValidationError, match="whole number of steps, or a share"):
        ScheduleConfig.model_validate({"warmup_steps": 1.5})


def spans() -> Iterator[tuple[int, int, int | None]]:
    """(steps, warmup, decay_steps) of every short run that a config can ask for, and of some longer
    ones."""
    for num_steps in (*range(1, 9), 99):
        for warmup in sorted({*range(min(num_steps, 8) + 2), num_steps - 1, num_steps}):
            left = num_steps - warmup
            yield from (
                (num_steps, warmup, decay)
                for decay in sorted({0, 1, left // 2, left})
                if 0 <= decay <= left
            )
    yield 5, 50, None  # it ends within its warmup


@pytest.mark.parametrize("low", [0.0, LOW, PEAK])
@pytest.mark.parametrize("name", SCHEDULES)
def test_no_step_of_any_run_is_wasted(name: str, low: float) -> None:
    """Every step has a rate, one of them the peak; the decay would come to min_lr with one step
    more."""
    for num_steps, warmup, decay in spans():
        schedule = make_schedule(
            name=name, warmup_steps=warmup, min_lr=low, decay_steps=decay or None
        )
        config = AdamWConfig(lr=PEAK, schedule=schedule)
        first, *rest = found = [
            learning_rate(step, num_steps, config) for step in range(1, num_steps + 1)
        ]
        what = name, low, num_steps, warmup, decay
        assert all(0 < rate <= PEAK for rate in found), what
        assert found[:warmup] == [
            PEAK * step / warmup for step in range(1, min(warmup, num_steps) + 1)
        ], what
        assert (max(found) == PEAK) == (warmup <= num_steps), what
        low = make_schedule(name=name, min_lr=low).min_lr
        assert warmup or first == PEAK, what
        assert all(a >= b for a, b in pairwise(found[max(warmup - 1, 0) :])), what
        if name in TO_THE_END and warmup < num_steps and low < PEAK:
            assert found[-1] > low, what
            assert learning_rate(num_steps + 1, num_steps, config) == pytest.approx(
                low, abs=1e-15
            ), what
        if name == "linear" and warmup <= num_steps:
            falls = {round(a - b, 12) for a, b in pairwise([*found[max(warmup - 1, 0) :], low])}
            assert len(falls) == 1, what
        assert len(rest) == num_steps - 1


@pytest.mark.parametrize("name", TO_THE_END)
def test_past_the_end_it_stays_at_the_lowest(name: str) -> None:
    config = AdamWConfig(lr=PEAK, schedule=make_schedule(name=name, min_lr=LOW))
    assert learning_rate(STEPS + 50, STEPS, config) == pytest.approx(LOW, rel=1e-14)


def test_wsd_decay_longer_than_what_is_left_does_not_jump() -> None:
    found = rates("wsd", decay_steps=STEPS)
    assert found[WARMUP] - found[WARMUP + 1] < 2 * (found[STEPS - 1] - found[STEPS])


def test_a_range_test_rises_by_the_same_factor() -> None:
    schedule = ScheduleConfig.model_validate({"name": "range_test", "start_lr": 1e-4})
    config = AdamWConfig(lr=1.0, schedule=schedule)
    found = [learning_rate(step, 5, config) for step in range(1, 6)]
    assert found == pytest.approx([1e-4, 1e-3, 1e-2, 0.1, 1.0], rel=1e-14)
    assert learning_rate(1, 1, config) == 1e-4
    with pytest.raises(ValidationError, match="warmup_steps"):
        ScheduleConfig.model_validate({"name": "range_test", "start_lr": 1e-4, "warmup_steps": 3})
