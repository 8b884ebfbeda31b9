"""The server's API where it is easily got wrong: what clients send back, odd numbers and texts,
parts of characters."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai")
pytest.importorskip("fastapi")

import httpx
from local_server import Gated, Local, serving

from chats import write_tokenizer
from megalite.data.tokenizer import load_tokenizer
from megalite.infer.answer import Choice
from megalite.infer.generate import Generator
from megalite.infer.sampling import Sampling
from megalite.infer.serving.protocol import Reply
from scripted import Bytes, Scripted

SAID = "né 🙂!"


def ungated(script: bytes, **more: int) -> Gated:
    model = Gated(script, num_slots=2, **more)
    model.run()
    return model


@pytest.fixture(scope="module")
def ratings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ratings")


@pytest.fixture(scope="module")
def local(ratings: Path) -> Iterator[Local]:
    with serving(ungated(SAID.encode()), ratings) as found:
        yield found


@pytest.fixture(scope="module")
def few(ratings: Path) -> Iterator[Local]:
    """Of few tokens."""
    with serving(ungated(b"\x01\x02\x03", vocab_size=8), ratings) as found:
        yield found


@pytest.fixture
def chats(tmp_path: Path) -> Iterator[Local]:
    """With a chat template."""
    folder = write_tokenizer(tmp_path / "model")
    tokenizer = load_tokenizer(folder)
    prompt = len(tokenizer.encode("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"))
    scripted = Scripted(tokenizer.encode("hello, one two<|im_end|>"), prompt)
    ends = frozenset(tokenizer.encode("<|im_end|>"))
    generator = Generator(scripted, tokenizer, ends, Sampling(temperature=0), folder)
    with serving(generator, tmp_path / "ratings") as found:
        yield found


def post(local: Local, path: str, body: Any, **headers: str) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"content-type": "application/json"} | {
        name.replace("_", "-"): value for name, value in headers.items()
    }
    return httpx.post(f"{local.url}/v1/{path}", content=content, headers=headers, verify=False)


def test_an_answer_may_be_sent_back_as_it_came(chats: Local) -> None:
    messages: list[Any] = [{"role": "user", "content": "hello"}]
    said = (
        chats.client().chat.completions.create(model="tiny", messages=messages).choices[0].message
    )
    assert said.content == "hello, one two"
    for form in (said, said.model_dump()):
        again = [*messages, form, {"role": "user", "content": "say hello"}]
        assert (
            chats.client()
            .chat.completions.create(model="tiny", messages=again, max_tokens=2)
            .choices
        )
    called = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function"}]}
    refused = post(chats, "chat/completions", {"messages": [*messages, called]})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "messages.1.tool_calls"


def test_chats_need_a_template_and_are_told_no_paths(local: Local) -> None:
    refused = post(local, "chat/completions", {"messages": [{"role": "user", "content": "hello"}]})
    assert refused.status_code == 400
    assert (
        refused.json()["error"]["message"]
        == "the model 'tiny' has no chat template; use /v1/completions"
    )


def test_log_probabilities_of_a_stream_are_those_of_the_whole(local: Local) -> None:
    asked: dict[str, Any] = {
        "model": "tiny", "prompt": "x", "max_tokens": len(SAID.encode()), "logprobs": 2, "stop": "!!",
    }  # fmt: skip
    create = local.client().completions.create
    whole = create(**asked).choices[0].logprobs
    pieces = [c.choices[0].logprobs for c in create(stream=True, **asked)]
    for field in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [value for piece in pieces if piece for value in getattr(piece, field)] == getattr(
            whole, field
        )
    assert whole.text_offset[:4] == [0, 1, 2, 3]
    for token, top in zip(whole.tokens, whole.top_logprobs, strict=True):
        assert token in top, "also one that is not among the likeliest"


def test_part_of_a_character_has_no_bytes() -> None:
    reply = Reply("chatcmpl", "tiny", lambda token: Bytes().decode([token]), "")
    parts = [Choice(token, -1.0, ((token, -1.0),)) for token in "é!".encode()]
    found = reply.choice(0, "é!", parts, "stop", streamed=False)["logprobs"]["content"]
    assert [entry["bytes"] for entry in found] == [None, None, [33]]
    assert found[0]["top_logprobs"][0]["bytes"] is None


def test_an_answer_that_says_nothing_has_no_log_probabilities_but_their_list() -> None:
    reply = Reply("chatcmpl", "tiny", str, "")
    for tokens, streamed, wanted in (
        ([], False, {"content": []}),
        ([], True, None),
        (None, False, None),
    ):
        assert reply.choice(0, "", tokens, "stop", streamed)["logprobs"] == wanted


def test_a_body_is_written_beside_the_loop(local: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    """One with logprobs may have a million parts."""
    threads = []
    for name in ("opening", "piece", "whole"):
        method = getattr(Reply, name)

        def noted(*arguments: Any, method: Any = method, **named: Any) -> Any:
            threads.append(threading.current_thread())
            return method(*arguments, **named)

        monkeypatch.setattr(Reply, name, noted)
    for stream in (True, False):
        post(local, "completions", {"prompt": "x", "max_tokens": 1, "stream": stream})
    assert len(set(threads)) == 2


def test_controls_among_stop_strings_are_looked_up_once(
    chats: Local, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The vocabulary of a real model is a new dictionary of 100,000 tokens at every call."""
    tokenizer, calls = chats.host.current.engine.generator.tokenizer, []
    vocabulary = tokenizer.vocabulary
    monkeypatch.setattr(tokenizer, "vocabulary", lambda: calls.append(1) or vocabulary())
    body = {"messages": [{"role": "user", "content": "hello"}], "stop": ["<|user|>"] * 16, "n": 16}
    assert post(chats, "chat/completions", body).status_code == 200
    assert len(calls) == 1


@pytest.mark.parametrize("asked", [True, False])
def test_usage_is_in_every_piece_of_a_stream_that_tells_it(local: Local, asked: bool) -> None:
    body = {
        "prompt": "x",
        "max_tokens": 3,
        "stream": True,
        "stream_options": {"include_usage": asked},
    }
    events = post(local, "completions", body).text.split("data: ")[1:-1]
    told = [json.loads(event).get("usage", "no") for event in events]
    counts = {"prompt_tokens": 1, "completion_tokens": 3, "total_tokens": 4}
    assert told == ([None] * (len(told) - 1) + [counts] if asked else ["no"] * len(told))


@pytest.mark.parametrize(
    "odd",
    [
        {"temperature": 1e-50}, {"temperature": 1e-39, "top_p": 0.9}, {"repetition_penalty": 1e-42},
        {"repetition_penalty": 1e-42, "temperature": 1.0}, {"top_k": 2**70}, {"logprobs": 20}, {"seed": -(2**63)},
        {"temperature": 100, "min_p": 1e-300, "top_p": 1e-300},
    ],
)  # fmt: skip
def test_odd_numbers_do_no_harm(few: Local, odd: dict[str, Any]) -> None:
    """To anybody: a step that fails would end all answers under way."""
    done = post(few, "completions", {"prompt": "\x01", "max_tokens": 3} | odd)
    assert done.status_code == 200, done.text
    assert done.json()["usage"]["completion_tokens"] == 3
    if odd.get("temperature", 0) < 1:
        assert done.json()["choices"][0]["text"] == "\x01\x02\x03", "the likeliest"


@pytest.mark.parametrize(
    "usual",
    [
        dict.fromkeys(
            [
                "max_tokens",
                "n",
                "stream",
                "stream_options",
                "stop",
                "seed",
                "logprobs",
                "echo",
                "user",
            ]
        ),
        {
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "logit_bias": {},
            "best_of": 1,
            "suffix": "",
        },
        {"top_k": -1, "top_p": 1, "temperature": 0},  # vLLM's word for no limit
    ],
)
def test_usual_values_may_be_spelled_out(local: Local, usual: dict[str, Any]) -> None:
    spelled = post(local, "completions", {"prompt": "x"} | usual)
    assert spelled.status_code == 200, spelled.text
    left_out = post(local, "completions", {"prompt": "x"})
    assert spelled.json()["choices"] == left_out.json()["choices"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b'{"prompt": "x", "\\ud800": 1}', None),
        (b'{"prompt": "\\ud800"}', "prompt"),
        (b'{"prompt": "x", "stop": "\\udfff"}', "stop"),
        (b'{"prompt": "x", "stop": ""}', "stop"),
        (b'{"prompt": "x", "temperature": NaN}', "temperature"),
        (b'{"prompt": "x", "seed": 1e400}', "seed"),
        (b'{"prompt": "x", "user": "\\ud800"}', "user"),
        (b'{"prompt": "x", "metadata": {"a": "\\ud800"}}', "metadata.a"),
        (b'{"prompt": "x", "metadata": {"\\ud800": "a"}}', "metadata"),
        (b'{"prompt": "x", "logit_bias": {"5": 1}}', "logit_bias"),
        (b'{"prompt": ["x", 1]}', "prompt"),
        (b'{"prompt": [[1], ["x"]]}', "prompt"),
        (b'{"prompt": [true]}', "prompt"),
        (b'{"prompt": {"a": 1}}', "prompt"),
        (b'{"prompt": [' + b'"a",1,' * 15_000 + b"1]}", "prompt"),
        (b'{"prompt": "x", "stop": ["a", 1]}', "stop"),
        (b'{"prompt": "x", "logprobs": false}', "logprobs"),
        (b'{"prompt": "x", "logprobs": true}', "logprobs"),
        (b'{"prompt": "x", "n": true}', "n"),
        (b'{"prompt": "x", "n": 1.5}', "n"),
        (b'{"prompt": "x", "max_tokens": "5"}', "max_tokens"),
        (b'{"prompt": "x", "temperature": "1"}', "temperature"),
        (b'{"prompt": "x", "stream": 1}', "stream"),
        (b'{"prompt": "x", "stream": "true"}', "stream"),
        (b'{"prompt": "x", "echo": 0}', "echo"),
        (b'{"prompt": ' + b"[" * 100_000, None),
        (b'{"prompt": ' + b"1" * 10_000 + b"}", None),
        (b'{"prompt": "x", "stream_options": {"include_usage": true}}', None),
        (b"\xff\xfe", None),
        (b"[]", None),
        (b"", None),
    ],
)
def test_odd_bodies_are_refused_in_openai_s_form(
    local: Local, body: bytes, param: str | None
) -> None:
    refused = post(local, "completions", body)
    assert refused.status_code == 400, refused.text
    problem = refused.json()["error"]
    assert problem["type"] == "invalid_request_error"
    if param:
        assert problem["param"] == param
    for word in (
        "Value error",
        "Input",
        "function-",
        "list[",
        "constrained",
        "dictionary",
        "python",
    ):
        assert word not in f"{problem['param']} {problem['message']}"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("chat/completions", {"messages": [{"role": "user", "content": ["x"]}]}, "messages.0.content"),
        ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages.0.content"),
        ("chat/completions", {"messages": [{"role": "king", "content": "x"}]}, "messages.0.role"),
        ("chat/completions", {"messages": [{"content": "x"}]}, "messages.0.role"),
        ("chat/completions", {"messages": [{"role": "user", "content": "x", "list[int]": 1}]}, "messages.0.list[int]"),
        ("chat/completions", {"messages": "x"}, "messages"),
        ("chat/completions", {"messages": [7]}, "messages.0"),
        ("chat/completions", {"messages": [{"role": "user", "content": "x"}], "logprobs": 1}, "logprobs"),
        ("chat/completions", {"messages": []}, "messages"),
        ("ratings", {"prompt": 5, "answer": "x", "rating": "up"}, "prompt"),
        ("ratings", {"messages": [{"role": "user", "content": 5}], "answer": "x"}, "messages.0.content"),
        ("ratings", {"prompt": "x", "answer": "x", "rating": 1}, "rating"),
        ("ratings", {"prompt": "x", "rating": "up"}, "answer"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_by_its_place_in_the_body(
    local: Local, path: str, body: Any, param: str
) -> None:
    """And not by the types that pydantic tried there."""
    refused = post(local, path, body)
    assert refused.status_code == 400
    problem = refused.json()["error"]
    assert problem["param"] == param
    assert problem["message"].startswith(f"{param}: ")


def test_a_prompt_that_is_too_long_has_the_code_that_clients_look_for(local: Local) -> None:
    refused = post(local, "completions", {"prompt": "x" * Gated.capacity})
    assert (refused.status_code, refused.json()["error"]["code"]) == (
        400,
        "context_length_exceeded",
    )
    empty = post(local, "completions", {"prompt": []})
    assert (empty.status_code, empty.json()["error"]["code"]) == (400, None)


def test_a_page_of_somebody_else_cannot_write_ratings(local: Local, ratings: Path) -> None:
    """A browser sends what is plain text from any page, says from which, and asks before it sends
    JSON."""
    body = {"prompt": "x", "answer": "y", "rating": "up"}
    refused = post(local, "ratings", body, content_type="text/plain")
    assert refused.status_code == 400
    assert "Content-Type: application/json" in refused.json()["error"]["message"]
    asks = {"origin": "http://elsewhere", "access-control-request-method": "POST"}
    asked = httpx.options(f"{local.url}/v1/ratings", headers=asks)
    assert asked.status_code == 403
    assert not any(name.startswith("access-control") for name in asked.headers)
    port = local.url.rpartition(":")[2]
    for origin in (
        "http://elsewhere",
        "null",
        "",
        f"http://localhost:{port}",
        f"ftp://127.0.0.1:{port}",
        local.url + "0",
    ):
        for path, sent in (("ratings", body), ("completions", {"prompt": "x"})):
            refused = post(local, path, sent, origin=origin)
            assert (refused.status_code, refused.json()["error"]["code"]) == (
                403,
                "unknown_origin",
            ), origin
    assert not list(ratings.iterdir())
    assert post(local, "ratings", body, origin=local.url).status_code == 201
    assert post(local, "ratings", body).status_code == 201


def test_what_strangers_ask_for_makes_no_metrics_of_its_own(local: Local) -> None:
    for number in range(5):
        assert httpx.get(f"{local.url}/strange-{number}").status_code == 404
        strange = httpx.request(f"STRANGE{number}", f"{local.url}/v1/models")
        assert (strange.status_code, strange.headers["allow"]) == (405, "GET")
    told = httpx.get(f"{local.url}/metrics").text
    assert 'megalite_requests_total{path="other",status="404"} 5.0' in told
    assert "strange" not in told.lower()


@pytest.mark.parametrize("version", ["2.3", "2.4"])
def test_a_client_that_is_gone_before_its_stream_begins_takes_no_slot(
    tmp_path: Path, version: str
) -> None:
    model = Gated(b"endless", num_slots=1)
    body = json.dumps({"prompt": "x", "max_tokens": 9000, "stream": True}).encode()
    messages = iter([{"type": "http.request", "body": body}, {"type": "http.disconnect"}])
    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": version}, "http_version": "1.1", "method": "POST",
        "path": "/v1/completions", "raw_path": b"/v1/completions", "query_string": b"", "root_path": "",
        "scheme": "http", "headers": [(b"content-type", b"application/json"), (b"host", b"localhost")],
        "client": ("test", 1),
    }  # fmt: skip

    async def receive() -> Any:
        return next(messages, {"type": "http.disconnect"})

    async def send(message: Any) -> None:
        if version == "2.4":
            raise OSError("nobody is there")

    with serving(model, tmp_path) as local:
        asyncio.run(asyncio.wait_for(local.app(scope, receive, send), 10))
        model.step(3)
        local.until('megalite_answers_total{finish="cancelled"} 1.0')
