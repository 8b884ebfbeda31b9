"""Steps are written in order, when the device has come to them, and none is lost."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megalite.observe.steps import StepLog


class Device:
    """Runs behind the host: it is asked for steps, and has done only some of them."""

    def __init__(self) -> None:
        self.asked = self.done = 0
        self.broken = False

    def tick(self, tokens: int) -> Tick:
        self.asked += 1
        return Tick(self, self.asked, tokens)


class Tick:
    def __init__(self, device: Device, number: int, tokens: int):
        self.device, self.number, self.tokens = device, number, tokens

    def passed(self) -> bool:
        if self.device.broken:
            raise RuntimeError("the device is gone")
        return self.device.done >= self.number

    def read(self) -> dict[str, float]:
        self.device.done = max(self.device.done, self.number)
        return {"tokens_per_s": float(self.tokens)}


class Recorder:
    def __init__(self) -> None:
        self.records: list[dict[str, float]] = []

    def step(self, record: dict[str, float]) -> None:
        self.records.append(record)

    @property
    def steps(self) -> list[float]:
        return [record["step"] for record in self.records]


def make_log() -> tuple[StepLog, Device, Recorder]:
    device, recorder = Device(), Recorder()
    meter: Any = device
    sink: Any = recorder
    return StepLog(sink, meter), device, recorder


def add(log: StepLog, step: int, loss: float = 1.0) -> None:
    log.add(
        {
            "step": step,
            "loss": torch.tensor(loss),
            "lr": 0.1,
            "grad_norm": torch.tensor(2.0 * step),
        },
        tokens=100,
    )


def test_a_step_is_written_when_the_device_has_passed_it() -> None:
    log, device, recorder = make_log()
    with log:
        add(log, 1)
        add(log, 2)
        assert recorder.steps == []
        device.done = 1
        add(log, 3)
        assert recorder.steps == [1]
        log.wait()
        assert recorder.steps == [1, 2, 3]
        add(log, 4)
    assert recorder.steps == [1, 2, 3, 4]
    assert recorder.records[1] == {
        "step": 2,
        "loss": 1.0,
        "lr": 0.1,
        "grad_norm": 4.0,
        "tokens_per_s": 100.0,
    }
    assert list(recorder.records[0]) == ["step", "loss", "lr", "grad_norm", "tokens_per_s"]


def test_numbers_are_those_of_the_step_and_may_be_infinite() -> None:
    log, _, recorder = make_log()
    loss = torch.tensor(math.inf)
    with log:
        log.add({"step": 1, "loss": loss}, tokens=1)
        loss.fill_(3.0)  # the next step's, in the same memory
        log.add({"step": 2, "loss": loss, "grad_norm": torch.tensor(math.nan)}, tokens=1)
    assert recorder.records[0]["loss"] == math.inf
    assert recorder.records[1]["loss"] == 3.0
    assert math.isnan(recorder.records[1]["grad_norm"])


def end_by(error: BaseException, log: StepLog, device: Device, broken: bool = False) -> None:
    with log:
        for step in range(1, 4):
            add(log, step)
        device.done, device.broken = 2, broken
        raise error


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt("as it was"), RuntimeError("as it was")], ids=repr
)
def test_a_run_that_ends_early_writes_what_the_device_has_done(error: BaseException) -> None:
    log, device, recorder = make_log()
    with pytest.raises(type(error), match="as it was"):
        end_by(error, log, device)
    assert recorder.steps == [1, 2]
    assert device.done == 2  # nobody waited for the third


def test_an_error_is_not_hidden_by_a_device_that_fails() -> None:
    log, device, recorder = make_log()
    with pytest.raises(KeyError):
        end_by(KeyError(), log, device, broken=True)
    assert recorder.steps == []


def test_ranks_without_a_recorder_copy_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "to", lambda *_, **__: pytest.fail("copied"))
    device: Any = Device()
    with StepLog(None, device) as log:
        add(log, 1)
