"""The server's limits as its clients meet them: too often, too many, too long, and its end while it answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai")
pytest.importorskip("fastapi")

import httpx
import openai
from local_server import Clock, Gated, Local, serving

from megalite.errors import ConfigError
from megalite.infer.serving.app import Settings

ANSWER = b"0123456789"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in ("engine", "guards"):
        monkeypatch.setattr(f"megalite.infer.serving.{module}.time", clock)
    return clock


@pytest.fixture
def model() -> Gated:
    return Gated(ANSWER)


@pytest.fixture
def beside() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


def ask(local: Local, count: int = 4, **more: Any) -> Any:
    return local.client().completions.create(model="tiny", prompt="x", max_tokens=count, **more)


def stream(local: Local, count: int = 4, **more: Any) -> Iterator[str]:
    """The pieces; the request has been taken on when this returns."""
    chunks = ask(local, count, stream=True, **more)
    return (chunk.choices[0].text for chunk in chunks)


def refused(call: Callable[[], Any]) -> Any:
    with pytest.raises(openai.APIStatusError) as caught:
        call()
    return caught.value


@pytest.mark.parametrize("wrong", [{"max_bytes": 0}, {"requests_per_minute": -1}, {"timeout_s": float("nan")}])
def test_impossible_limits_are_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"^{next(iter(wrong.values()))} .*: give a number of at least"):
        Settings("tiny", tmp_path, **wrong)


def test_each_key_has_its_rate_which_recovers_with_time(tmp_path: Path, clock: Clock, model: Gated) -> None:
    with serving(model, tmp_path, keys=["one", "two"], requests_per_minute=3) as local:
        one, two = local.client("one"), local.client("two")
        for _ in range(3):
            one.models.list()
        limited = refused(one.models.list)
        assert isinstance(limited, openai.RateLimitError)
        assert (limited.type, limited.code) == ("rate_limit_error", "rate_limit_exceeded")
        assert limited.response.headers["retry-after"] == "20"
        two.models.list()
        for _ in range(9):
            assert httpx.get(f"{local.url}/health").status_code == 200, "what no key is needed for is not counted"
        clock.now += 19
        assert refused(one.models.list).response.headers["retry-after"] == "1"
        clock.now += 1
        one.models.list()
        assert isinstance(refused(one.models.list), openai.RateLimitError)
        clock.now += 3600
        for _ in range(3):
            one.models.list()
        assert isinstance(refused(one.models.list), openai.RateLimitError), "it is not saved up"


def test_who_waits_as_long_as_told_is_not_refused_again(tmp_path: Path, clock: Clock, model: Gated) -> None:
    """Of an address, where there are no keys; 60/11 s are no whole number."""
    with serving(model, tmp_path, requests_per_minute=11) as local:
        client = local.client()
        for _ in range(11):
            client.models.list()
        clock.now += int(refused(client.models.list).response.headers["retry-after"])
        client.models.list()


def test_too_many_that_wait(tmp_path: Path, model: Gated, beside: ThreadPoolExecutor) -> None:
    with serving(model, tmp_path, max_waiting=2) as local:
        running = stream(local)
        local.until("megalite_slots_busy 1.0")
        waiting = [stream(local), stream(local)]
        for more in ({}, {"stream": True}):
            full = refused(lambda more=more: ask(local, **more))
            assert (full.status_code, full.code) == (503, "overloaded")
            assert "2 requests wait already: try again later" in full.message
        model.run()
        assert ["".join(pieces) for pieces in (running, *waiting)] == ["0123"] * 3, "those that were taken on"
        assert ask(local).choices[0].text == "0123"


def test_more_answers_than_can_ever_wait_are_no_matter_of_trying_again(tmp_path: Path, model: Gated) -> None:
    model.run()
    with serving(model, tmp_path, max_waiting=4) as local:
        for more in ({"n": 5}, {"prompt": ["x"] * 5}, {"prompt": ["x"] * 3, "n": 2}):
            wrong = refused(
                lambda more=more: local.client().completions.create(**{"model": "tiny", "prompt": "x"} | more)
            )
            assert wrong.status_code == 400
            assert "this server gives at most 4 answers" in wrong.message
        assert len(ask(local, n=4).choices) == 4


def test_a_step_that_hangs_is_seen_from_outside(tmp_path: Path, clock: Clock, model: Gated) -> None:
    with serving(model, tmp_path, timeout_s=10) as local:
        pieces = stream(local)
        local.until("megalite_slots_busy 1.0")
        clock.now += 10
        assert httpx.get(f"{local.url}/health").json() == {"status": "ok"}
        clock.now += 1
        found = httpx.get(f"{local.url}/health")
        assert (found.status_code, found.json()["status"]) == (503, "a step of the model has not ended after 11 s")
        model.run()
        with pytest.raises(openai.APIError, match="longer than this server allows"):
            list(pieces)
        local.until_idle()
        assert httpx.get(f"{local.url}/health").status_code == 200, "it may have been no more than slow"


def test_a_stream_that_takes_too_long(tmp_path: Path, clock: Clock, model: Gated) -> None:
    with serving(model, tmp_path, timeout_s=10) as local:
        pieces = stream(local)
        model.step()
        assert next(pieces) == "0"
        clock.now += 10
        model.step()
        with pytest.raises(openai.APIError, match="longer than this server allows") as caught:
            list(pieces)
        assert caught.value.code == "timeout"
        model.run()
        local.until_idle()
        assert ask(local).choices[0].text == "0123"


def test_an_answer_that_takes_too_long_and_one_that_waits_for_it(
    tmp_path: Path, clock: Clock, model: Gated, beside: ThreadPoolExecutor
) -> None:
    with serving(model, tmp_path, timeout_s=10) as local:
        found: list[Future[Any]] = [beside.submit(refused, lambda: ask(local))]
        local.until("megalite_slots_busy 1.0")
        found.append(beside.submit(refused, lambda: ask(local)))
        model.step()
        local.until("megalite_slots_busy 1.0", "megalite_waiting 1.0")
        clock.now += 10
        model.step()
        for late in found:
            assert (late.result().status_code, late.result().code) == (504, "timeout")
        model.run()
        local.until_idle()
        local.until('megalite_answers_total{finish="time"} 2.0')
        assert ask(local).choices[0].text == "0123"


def test_answers_under_way_may_end_and_no_more_are_taken_on(tmp_path: Path, model: Gated) -> None:
    with serving(model, tmp_path, grace_s=30) as local:
        pieces = stream(local)
        model.step()
        assert next(pieces) == "0"
        waiting = stream(local)
        local.terminate()
        local.until_closed()
        with pytest.raises(openai.APIConnectionError):
            ask(local)
        model.run()
        assert "".join(pieces) == "123"
        assert "".join(waiting) == "0123", "it had been taken on"


def test_answers_that_do_not_end_in_time_are_cut_off(
    tmp_path: Path, clock: Clock, model: Gated, beside: ThreadPoolExecutor
) -> None:
    with serving(model, tmp_path, grace_s=30) as local:
        pieces = stream(local, 9)
        model.step()
        assert next(pieces) == "0"
        whole = beside.submit(refused, lambda: ask(local))
        model.step()
        assert next(pieces) == "1"
        local.until("megalite_waiting 1.0")
        local.terminate()
        model.step()
        assert next(pieces) == "2"
        clock.now += 31
        model.step(2)
        with pytest.raises(openai.APIError, match="about to end"):
            list(pieces)
        assert (whole.result().status_code, whole.result().code) == (503, "shutting_down")
