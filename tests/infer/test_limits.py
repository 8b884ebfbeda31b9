"""The server's limits as its clients meet them: too often, too many, too long, and its end while it
answers."""

from __future__ import annotations

import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai")
pytest.importorskip("fastapi")

import httpx
import openai
import orjson
from local_server import PATIENCE_S, Clock, Gated, Local, opened, serving

from megalite.errors import ConfigError
from megalite.infer.generate import Generator
from megalite.infer.sampling import Sampling
from megalite.infer.serving.front import Host, make_front
from megalite.infer.serving.guards import WRONG_KEYS_PER_MINUTE, _client, check_parts
from megalite.infer.serving.lanes import LARGE_AT_ONCE
from megalite.infer.serving.names import is_own_name
from megalite.infer.serving.run import Server, bind, make_server, serve
from megalite.infer.serving.settings import Settings
from scripted import Bytes

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


@pytest.mark.parametrize(
    "wrong", [{"max_bytes": 0}, {"requests_per_minute": -1}, {"timeout_s": float("nan")}]
)
def test_impossible_limits_are_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(
        ConfigError, match=f"^{next(iter(wrong.values()))} .*: give a number of at least"
    ):
        Settings("tiny", tmp_path, **wrong)


def test_each_key_has_its_rate_which_recovers_with_time(
    tmp_path: Path, clock: Clock, model: Gated
) -> None:
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
            assert httpx.get(f"{local.url}/health").status_code == 200, (
                "what no key is needed for is not counted"
            )
        clock.now += 19
        assert refused(one.models.list).response.headers["retry-after"] == "1"
        clock.now += 1
        one.models.list()
        assert isinstance(refused(one.models.list), openai.RateLimitError)
        clock.now += 3600
        for _ in range(3):
            one.models.list()
        assert isinstance(refused(one.models.list), openai.RateLimitError), "it is not saved up"


def test_who_waits_as_long_as_told_is_not_refused_again(
    tmp_path: Path, clock: Clock, model: Gated
) -> None:
    """Of an address, where there are no keys; 60/11 s are no whole number."""
    with serving(model, tmp_path, requests_per_minute=11) as local:
        client = local.client()
        for _ in range(11):
            client.models.list()
        clock.now += int(refused(client.models.list).response.headers["retry-after"])
        client.models.list()


def test_no_header_changes_who_asks(tmp_path: Path, clock: Clock, model: Gated) -> None:
    """A client on this machine is no proxy that could be believed."""
    with serving(model, tmp_path, requests_per_minute=5) as local:
        told = []
        for number in range(10):
            claims = {
                "x-forwarded-for": f"10.0.0.{number}",
                "forwarded": f"for=10.0.0.{number}",
                "x-real-ip": "10.0.0.9",
            }
            told.append(
                httpx.get(f"{local.url}/v1/models", headers=claims, verify=False).status_code
            )
    assert told == [200] * 5 + [429] * 5


def test_wrong_keys_are_limited_and_right_ones_go_on(
    tmp_path: Path, clock: Clock, model: Gated
) -> None:
    def status(key: str, scheme: str = "Bearer") -> int:
        headers = {"authorization": f"{scheme} {key}"}
        return httpx.get(f"{local.url}/v1/models", headers=headers, verify=False).status_code

    with serving(model, tmp_path, keys=["right", "rare"]) as local:
        assert [
            status("right", scheme) for scheme in ("Bearer", "bearer", "BEARER", "bearer  ")
        ] == [200] * 4
        assert [status("right", scheme) for scheme in ("Basic", "x", "Bearerright")] == [401] * 3
        told = [status(f"guess {number}") for number in range(20)]
        assert told == [401] * WRONG_KEYS_PER_MINUTE + [429] * (20 - WRONG_KEYS_PER_MINUTE)
        assert status("rare") == 429, "or the limit would say which guess is right"
        assert status("right") == 200, "who is known is not kept out by who shares an address"
        assert httpx.get(f"{local.url}/v1/models").status_code == 401
        assert httpx.get(f"{local.url}/health").status_code == 200
        clock.now += 60
        assert status("rare") == 200
        assert status("guess") == 401


OWN = [
    "localhost",
    "LOCALHOST:80",
    "localhost.",
    "127.0.0.1",
    "127.9.9.9:8000",
    "[::1]",
    "[::1]:8000",
]
FOREIGN = [
    "evil.example", "evil.example:8000", "localhost.evil.example", "evil-localhost", "127.0.0.1.evil.example",
    "10.1.2.3", "0.0.0.0", "127.1", "2130706433", "", "localhost:8000@evil.example", "localhost evil.example", "[::2]",
    "loc\xe4lhost",
]  # fmt: skip


def test_without_a_key_only_its_own_names_lead_to_the_server(tmp_path: Path, model: Gated) -> None:
    """Any page can have its own name lead to this machine, and then reads what it answers."""
    model.run()

    bodies = {
        "/v1/completions": {"prompt": "x"},
        "/v1/ratings": {"prompt": "x", "answer": "y", "rating": "up"},
    }

    def status(host: str, path: str) -> int:
        headers = [(b"host", host.encode("latin-1")), (b"x-forwarded-host", b"localhost")]
        method, body = ("POST", bodies[path]) if path in bodies else ("GET", None)
        return httpx.request(
            method, local.url + path, headers=headers, json=body, verify=False
        ).status_code

    with serving(model, tmp_path / "open", host="my.box") as local:
        for path in ("/v1/completions", "/", "/v1/about", "/health"):
            assert [status(host, path) for host in [*OWN, "My.Box:8000"]] == [200] * (len(OWN) + 1)
        for path in ("/v1/completions", "/v1/ratings", "/", "/v1/about", "/metrics"):
            assert {host: status(host, path) for host in FOREIGN} == dict.fromkeys(FOREIGN, 403)
        assert not list((tmp_path / "open").iterdir())
        address = local.url.removeprefix("http://").split(":")
        for more, wanted in ((b"", b"200"), (b"Origin: http://evil.example\r\n", b"403")):
            with socket.create_connection((address[0], int(address[1]))) as check:
                check.sendall(b"GET /health HTTP/1.0\r\n" + more + b"\r\n")
                assert check.recv(12) == b"HTTP/1.1 " + wanted, "no browser leaves the name out"
    with serving(model, tmp_path / "closed", keys=["key"]) as local:
        assert (
            httpx.get(f"{local.url}/health", headers={"host": "evil.example"}).status_code == 200
        ), "a key protects it"


def test_names_of_a_server_on_all_addresses() -> None:
    """An address leads nowhere else, whichever page names it."""
    for bound in ("0.0.0.0", "::", ""):
        for host in ("10.1.2.3:80", "[fe80::1]", socket.gethostname(), "localhost"):
            assert is_own_name(host, bound, "10.1.2.3"), host
        assert not is_own_name("evil.example", bound, "10.1.2.3")
    assert is_own_name("10.1.2.3", "my.box", "10.1.2.3"), "the connection's own"
    assert not is_own_name("10.1.2.4", "10.1.2.3", "10.1.2.3")


def test_addresses_of_one_network_count_as_one() -> None:
    client = lambda address: _client({"client": (address, 1)})  # noqa: E731
    assert client("2001:db8::1") == client("2001:db8::ffff:1") != client("2001:db8:0:1::1")
    assert client("10.0.0.1") != client("10.0.0.2")


def test_large_requests_are_bounded_and_hold_up_no_small_ones(
    tmp_path: Path, model: Gated, beside: ThreadPoolExecutor
) -> None:
    """Tokenizing large prompts took memory and time from all others before any was refused."""
    model.run()
    gate, under_way = threading.Event(), []

    class Slow(Bytes):
        def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
            if len(texts[0]) > 1000:
                under_way.append(len(texts[0]))
                assert gate.wait(PATIENCE_S)
            return super().encode_batch(texts)

    generator = Generator(model, Slow(), frozenset({256}), Sampling(temperature=0))
    large = "x" * 100_000
    with serving(generator, tmp_path, max_bytes=110_000) as local, ThreadPoolExecutor(24) as pool:
        body = {"prompt": large, "max_tokens": 2}
        asked = [
            pool.submit(
                httpx.post,
                f"{local.url}/v1/completions",
                json=body,
                timeout=PATIENCE_S,
                verify=False,
            )
            for _ in range(24)
        ]
        most = LARGE_AT_ONCE * 110_000 // 100_000
        early = []
        for done in as_completed(asked, PATIENCE_S):
            early.append(done.result())
            if len(early) == 24 - most:
                break
        assert {one.status_code for one in early} == {503}
        assert early[0].json()["error"]["code"] == "overloaded"
        assert early[0].headers["retry-after"] == "1"
        assert ask(local).choices[0].text == "0123", "while the large ones wait"
        assert len(under_way) == 1
        gate.set()
        rest = [done.result() for done in asked if done.result() not in early]
        assert {one.json()["error"]["code"] for one in rest} == {"context_length_exceeded"}


def test_what_cannot_fit_is_not_tokenized(
    tmp_path: Path, model: Gated, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.capacity = 100  # type: ignore[misc]
    monkeypatch.setattr(Bytes, "encode_batch", lambda *_: pytest.fail("it was tokenized"))
    with serving(model, tmp_path) as local:
        refused = httpx.post(f"{local.url}/v1/completions", json={"prompt": ["x", "y" * 6401]})
        assert (refused.status_code, refused.json()["error"]["code"]) == (
            400,
            "context_length_exceeded",
        )
        assert "6,401 bytes" in refused.json()["error"]["message"]


def test_bodies_that_come_slowly_take_bounded_memory(tmp_path: Path, model: Gated) -> None:
    """And leave room for small ones."""
    model.run()
    with serving(model, tmp_path, max_bytes=100_000) as local:
        host, port = local.url.removeprefix("http://").split(":")
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        held = []
        for _ in range(40):
            held.append(socket.create_connection((host, int(port)), timeout=PATIENCE_S))
            held[-1].sendall(head + b"Content-Length: 99999\r\n\r\n" + b"x" * 99_000)
        told: dict[socket.socket, bytes] = {}
        while len(told) < 40 - 32:
            ready, _, _ = select.select(
                [one for one in held if one not in told], [], [], PATIENCE_S
            )
            assert ready, told
            told |= {one: one.recv(65536) for one in ready}
        assert all(one.startswith(b"HTTP/1.1 503") for one in told.values())
        assert ask(local).choices[0].text == "0123"
        for one in held:
            one.close()


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
        assert ["".join(pieces) for pieces in (running, *waiting)] == ["0123"] * 3, (
            "those that were taken on"
        )
        assert ask(local).choices[0].text == "0123"


def test_more_answers_than_can_ever_wait_are_no_matter_of_trying_again(
    tmp_path: Path, model: Gated
) -> None:
    model.run()
    with serving(model, tmp_path, max_waiting=4) as local:
        for more in ({"n": 5}, {"prompt": ["x"] * 5}, {"prompt": ["x"] * 3, "n": 2}):
            wrong = refused(
                lambda more=more: local.client().completions.create(
                    **{"model": "tiny", "prompt": "x"} | more
                )
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
        assert (found.status_code, found.json()["status"]) == (
            503,
            "a step of the model has not ended after 11 s",
        )
        model.run()
        with pytest.raises(openai.APIError, match="longer than this server allows"):
            list(pieces)
        local.until_idle()
        assert httpx.get(f"{local.url}/health").status_code == 200, (
            "it may have been no more than slow"
        )


class Panic(BaseException):
    """As what a tokenizer in Rust raises."""


@pytest.mark.parametrize("problem", [RuntimeError, Panic])
def test_a_step_that_fails_ends_its_answers_alone(
    tmp_path: Path, model: Gated, problem: type[BaseException]
) -> None:
    predict = model.predict

    def fails(*_: Any) -> Any:
        model.predict = predict  # type: ignore[method-assign]
        raise problem("of this step")

    model.predict = fails  # type: ignore[method-assign]
    model.run()
    with serving(model, tmp_path) as local:
        assert "the model failed" in str(refused(lambda: ask(local)))
        assert ask(local).choices[0].text == "0123"
        assert httpx.get(f"{local.url}/health").status_code == 200


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


def test_asked_to_end_just_before_it_listens_to_signals(
    tmp_path: Path, model: Gated, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.run()
    run, before, in_vain = Server.run, signal.getsignal(signal.SIGTERM), threading.Event()

    def asked(server: Server, sockets: list[socket.socket]) -> None:
        def give_up() -> None:
            in_vain.set()
            server.should_exit = True

        late = threading.Timer(20, give_up)
        late.start()
        signal.raise_signal(signal.SIGTERM)
        run(server, sockets)
        late.cancel()

    monkeypatch.setattr(Server, "run", asked)
    generator = Generator(model, Bytes(), frozenset({256}), Sampling(temperature=0))
    try:
        host = Host(opened(generator), Settings("tiny", tmp_path))
        serve(lambda: host, bind("127.0.0.1", 0), grace_s=1)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not in_vain.is_set()


def test_an_address_that_another_server_took_meanwhile(tmp_path: Path, model: Gated) -> None:
    """Both bind it before they read their models; one of them listens first."""
    first = bind("127.0.0.1", 0)
    port = first.getsockname()[1]
    with first, bind("127.0.0.1", port) as second:
        first.listen()
        app = make_front(Host(opened(model), Settings("tiny", tmp_path)))
        with pytest.raises(ConfigError, match=f"--port {port} cannot be listened on: Address alr"):
            make_server(app, 1.0).run([second])


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


def body_of(before: str, part: str, behind: str, count: int) -> bytes:
    return f"{before}{','.join([part] * count)}{behind}".encode()


PARTS = {
    "lists": (body_of('{"prompt":[', "[]", "]}", 5000), "4,096 lists and objects"),
    "objects": (body_of('{"messages":[', '{"role":"user"}', "]}", 5000), "4,096 lists and objects"),
    "keys": (body_of("{", '"a":1', "}", 9000), "8,192 keys"),
    "values": (body_of('{"prompt":[', "1", "]}", 270_000), "262,144 values"),
    "texts": (body_of('{"prompt":[', '"\\\\"', "]}", 33_000), "32,768 texts"),
    "many texts": (body_of('{"prompt":[', '"a"', "]}", 200_000), "32,768 texts"),
    "nested": (b'{"messages":' + b"[" * 400_000 + b"]" * 400_000 + b"}", "4,096 lists and objects"),
}
PLAIN = {
    "text of marks": b'{"prompt":"' + b'[{,:\\"' * 150_000 + b'"}',
    "tokens": body_of('{"prompt":[', "1", "]}", 200_000),
    "messages": body_of('{"messages":[', '{"role":"user","content":"a, [b]: {c}"}', "]}", 4000),
    "no end": b'{"prompt":"' + b'\\"' * 490_000,
    "backslashes": b'{"prompt":"' + b"\\" * 990_001,
}


@pytest.mark.parametrize("kind", PARTS)
def test_a_body_of_many_parts_is_refused_before_it_is_parsed(
    model: Gated, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it is parsed, nobody else is answered."""
    body, what = PARTS[kind]
    monkeypatch.setattr("json.loads", pytest.fail)
    with serving(model, tmp_path) as local:
        # Also of a length that is not told.
        for content in (
            body,
            iter([body[:5000], body[5000:]]),
        ):
            headers = {"content-type": "application/json"}
            answer = httpx.post(
                f"{local.url}/v1/chat/completions", content=content, headers=headers
            )
            assert (answer.status_code, orjson.loads(answer.content)["error"]["message"]) == (
                400, f"the body has more than {what}",
            )  # fmt: skip


@pytest.mark.parametrize("kind", PLAIN)
def test_what_is_within_a_text_is_no_part_of_a_body(kind: str) -> None:
    began = time.thread_time()
    check_parts(PLAIN[kind])
    assert time.thread_time() - began < 0.5, (
        "some milliseconds; what was tried anew from each quote would take minutes"
    )
