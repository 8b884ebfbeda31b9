"""The server as its users meet it: the official client, many at once, wrong keys, large prompts,
clients that go."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from megalite.infer.generate import Generator
from megalite.infer.sampling import Sampling
from tiny_models import GROUPED, make_byte_model

openai = pytest.importorskip("openai")
httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")
from megalite.infer.serving import connections  # noqa: E402

KEY = "a key of the tests' own"
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
LENGTH = 16_384
PATIENCE_S = 60.0
FILES = 512


def make_folder(folder: Path) -> Path:
    """A random model that speaks in bytes, and never ends by itself."""
    make_byte_model(folder, GROUPED, max_position_embeddings=LENGTH)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@dataclass
class Served:
    process: subprocess.Popen[bytes]
    url: str
    folder: Path
    log: Path

    def client(self, kind: Any = openai.OpenAI, key: str = KEY) -> Any:
        return kind(base_url=f"{self.url}/v1", api_key=key, max_retries=0)

    def metric(self, name: str) -> float:
        text = httpx.get(f"{self.url}/metrics", timeout=PATIENCE_S).text
        return sum(
            float(value)
            for value in re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
        )

    def until(self, name: str, value: float) -> None:
        ends = time.monotonic() + PATIENCE_S
        while (found := self.metric(name)) != value:
            assert time.monotonic() < ends, f"{name} is {found}, not {value}"
            time.sleep(0.05)


def few_files() -> None:
    """Fewer than the connections that are made to the server."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, FILES))


def start(folder: Path, root: Path, *options: str) -> Served:
    log = root / "log"
    command = [
        sys.executable,
        "-m",
        "megalite",
        "serve",
        str(folder),
        "--port",
        "0",
        "--name",
        "tiny",
        *options,
    ]
    environment = os.environ | {"MEGALITE_API_KEY": KEY, "OMP_NUM_THREADS": "1"}
    with open(log, "wb") as file:
        process = subprocess.Popen(
            command, env=environment, stderr=file, cwd=root, preexec_fn=few_files
        )
    while not (said := re.search(r"tiny on (http://\S+) .*\n", log.read_text())):
        assert process.poll() is None, log.read_text()
        time.sleep(0.05)
    served = Served(process, said[1], folder, log)
    while True:
        try:
            assert httpx.get(f"{served.url}/health", timeout=PATIENCE_S).status_code == 200
            return served
        except httpx.ConnectError:  # it does not listen yet
            assert process.poll() is None, log.read_text()
            time.sleep(0.05)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("served")
    (root / "current").symlink_to(make_folder(root / "tiny"))
    options = f"--slots 4 --max-length {LENGTH} --grace 1 --requests-per-minute 600"
    found = start(root / "current", root, *options.split())
    yield found
    if found.process.poll() is None:
        found.process.kill()
    found.process.wait()


@pytest.fixture(scope="module")
def offline(served: Served) -> Generator:
    return Generator.open(served.folder, num_slots=1)


def text_of(
    offline: Generator, prompt: str | list[int], count: int, seed: int, temperature: float = 1.5
) -> str:
    (answer,) = offline.answer([offline.request(prompt, count, Sampling(temperature, seed=seed))])
    return answer.text


ASKED: dict[str, Any] = {
    "model": "tiny",
    "max_tokens": 24,
    "seed": 3,
    "temperature": 1.5,
    "top_p": 1.0,
}
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello?"}]


def test_a_completion(served: Served, offline: Generator) -> None:
    done = served.client().completions.create(prompt="Once", logprobs=2, **ASKED)
    (choice,) = done.choices
    assert choice.text == text_of(offline, "Once", 24, 3)
    assert choice.finish_reason == "length"
    assert (done.usage.prompt_tokens, done.usage.completion_tokens, done.usage.total_tokens) == (
        4,
        24,
        28,
    )
    assert len(choice.logprobs.token_logprobs) == 24
    assert all(
        max(top.values()) >= own
        for top, own in zip(
            choice.logprobs.top_logprobs, choice.logprobs.token_logprobs, strict=True
        )
    )


def test_a_stream_is_the_completion_in_pieces(served: Served, offline: Generator) -> None:
    chunks = list(
        served.client().completions.create(
            prompt="Once", stream=True, stream_options={"include_usage": True}, **ASKED
        )
    )
    assert chunks[-1].usage.completion_tokens == 24
    pieces = [chunk.choices[0] for chunk in chunks[:-1]]
    assert "".join(piece.text for piece in pieces) == text_of(offline, "Once", 24, 3)
    assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["length"]
    assert len(pieces) > 3


def test_chat_by_the_template_and_several_choices(served: Served, offline: Generator) -> None:
    client = served.client()
    prompt = "<system>Be brief.\n<user>Hello?\n<assistant>"
    wanted = [text_of(offline, prompt, 24, seed) for seed in (3, 4)]
    whole = client.chat.completions.create(
        messages=CHAT, n=2, logprobs=True, top_logprobs=1, **ASKED
    )
    assert [choice.message.content for choice in whole.choices] == wanted
    assert whole.usage.prompt_tokens == len(prompt)
    assert len(whole.choices[1].logprobs.content) == 24
    texts = {0: "", 1: ""}
    for chunk in client.chat.completions.create(messages=CHAT, n=2, stream=True, **ASKED):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert list(texts.values()) == wanted


def test_stop_strings_and_several_prompts(served: Served, offline: Generator) -> None:
    whole = text_of(offline, "Once", 24, 3)
    stop = whole[9:11]
    done = served.client().completions.create(prompt=["Once", "ON"], stop=[stop], **ASKED)
    assert done.choices[0].text == whole[: whole.index(stop)]
    assert done.choices[0].finish_reason == "stop"
    assert [choice.index for choice in done.choices] == [0, 1]
    assert done.usage.prompt_tokens == 6


def test_64_at_once_are_all_answered_each_with_its_own(served: Served, offline: Generator) -> None:
    async def all_of_them() -> list[Any]:
        async with served.client(openai.AsyncOpenAI) as client:
            jobs = [
                client.completions.create(
                    prompt=f"{i}", **ASKED | {"seed": i, "max_tokens": 8 + i % 9}
                )
                for i in range(64)
            ]
            return await asyncio.gather(*jobs)

    for i, done in enumerate(asyncio.run(all_of_them())):
        assert done.choices[0].text == text_of(offline, f"{i}", 8 + i % 9, i), i
    served.until("megalite_slots_busy", 0)


def test_200_idle_and_200_half_sent_connections_keep_nobody_from_an_answer(
    served: Served, offline: Generator, pytestconfig: pytest.Config
) -> None:
    """Before, connections were never closed: with no open file left the server answered nobody, and
    wrote a log of megabytes a second."""
    place = served.url.removeprefix("http://").split(":")
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
        "Content-Type: application/json\r\n"
    )
    half = f'{head}Content-Length: 100000\r\n\r\n{{"prompt": "{"x" * 50_000}'.encode()
    logged, memory = served.log.stat().st_size, memory_of(served.process)
    held = []
    for number in range(400):
        held.append(socket.create_connection((place[0], int(place[1])), timeout=PATIENCE_S))
        if number % 2:
            held[-1].sendall(half if number % 4 == 1 else half[:60])
    test_64_at_once_are_all_answered_each_with_its_own(served, offline)
    assert memory_of(served.process) - memory < 200e6
    assert served.log.stat().st_size - logged < 100_000
    assert "Traceback" not in served.log.read_text()
    if pytestconfig.getoption("--whole"):
        time.sleep(connections.BODY_S + 50_000 / connections.BODY_BYTES_PER_S + 3)
        for connection in held:
            connection.settimeout(1)
            with contextlib.suppress(ConnectionResetError):
                assert connection.recv(65536) == b"", "hung up on"
        assert served.log.stat().st_size - logged < 100_000
    for connection in held:
        connection.close()


def test_the_model_behind_a_link_is_swapped_under_load(served: Served, offline: Generator) -> None:
    """On SIGHUP. A link that leads to a damaged folder changes nothing."""
    other = served.log.parent / "other"
    shutil.copytree(served.folder, other)
    tensors = load_file(other / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].flip(0)
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    asked = ASKED | {"temperature": 0}
    wanted = [
        text_of(offline, "Once", 24, 3, 0),
        text_of(Generator.open(other, num_slots=1), "Once", 24, 3, 0),
    ]

    def turn(target: Path, outcome: str) -> None:
        name = re.escape(f'megalite_reloads_total{{outcome="{outcome}"}}')
        before = served.metric(name)
        link = served.folder.with_name("next")
        link.symlink_to(target)
        link.replace(served.folder)
        served.process.send_signal(signal.SIGHUP)
        served.until(name, before + 1)

    async def swap_under_load() -> tuple[list[str], list[str]]:
        async with served.client(openai.AsyncOpenAI) as client:

            async def ask() -> str:
                done = await client.completions.create(prompt="Once", **asked)
                return str(done.choices[0].text)

            jobs = [asyncio.create_task(ask()) for _ in range(48)]
            await asyncio.gather(*jobs[:4])
            await asyncio.to_thread(turn, other, "done")
            return await asyncio.gather(*jobs), [await ask()]

    during, after = asyncio.run(swap_under_load())
    assert {*during} <= {*wanted}
    assert wanted[0] in during
    assert after == wanted[1:]
    broken = served.log.parent / "broken"
    shutil.copytree(other, broken)
    os.truncate(broken / "model.safetensors", 20_000)
    turn(broken, "refused")
    assert served.client().completions.create(prompt="Once", **asked).choices[0].text == wanted[1]
    assert " stays what it was: " in served.log.read_text()
    turn(served.log.parent / "tiny", "done")
    assert served.client().completions.create(prompt="Once", **asked).choices[0].text == wanted[0]


def memory_of(process: subprocess.Popen[bytes]) -> float:
    """Bytes."""
    return (
        float(re.findall(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())[0])
        * 1e3
    )


def test_a_client_that_disappears_frees_its_slot(served: Served) -> None:
    before = served.metric("megalite_answers_total")
    body = {"model": "tiny", "prompt": "x", "max_tokens": 16_000, "temperature": 1.5}
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx.stream(
        "POST", f"{served.url}/v1/completions", json=body | {"stream": True}, headers=headers
    ) as response:
        lines = response.iter_lines()  # kept: a stream nobody reads from is closed
        next(lines)
        served.until("megalite_slots_busy", 1)
    served.until("megalite_answers_total", before + 1)
    connection = http.client.HTTPConnection(served.url.removeprefix("http://"))
    connection.request(
        "POST", "/v1/completions", json.dumps(body), headers | {"Content-Type": "application/json"}
    )
    served.until("megalite_slots_busy", 1)
    connection.close()
    served.until("megalite_answers_total", before + 2)
    assert served.metric("megalite_slots_busy") == 0
    text = httpx.get(f"{served.url}/metrics").text
    assert 'megalite_answers_total{finish="cancelled"} 2.0' in text


def test_keys(served: Served) -> None:
    for key in ("wrong", KEY[:-1], KEY + "x"):
        with pytest.raises(openai.AuthenticationError, match="the API key is wrong"):
            served.client(key=key).models.list()
    assert httpx.get(f"{served.url}/v1/models").json()["error"]["code"] == "invalid_api_key"
    assert [model.id for model in served.client().models.list()] == ["tiny"]
    assert served.client().models.retrieve("tiny").id == "tiny"


@pytest.mark.parametrize("chunked", [False, True])
def test_a_large_prompt_is_refused_before_it_is_read(served: Served, chunked: bool) -> None:
    body = json.dumps({"model": "tiny", "prompt": "x" * 10_000_000}).encode()
    pieces = (body[i : i + 65536] for i in range(0, len(body), 65536))
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    response = httpx.post(
        f"{served.url}/v1/completions", content=pieces if chunked else body, headers=headers
    )
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "request_too_large"


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"prompt": "x", "temperature": -1}, "temperature: "),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens: "),
        ({"prompt": "x", "frequency_penalty": 1}, "frequency_penalty: must be left out, or 0: of"),
        ({"prompt": "x", "best_off": 1}, "best_off: is not known"),
        (
            {"prompt": [1, 999]},
            "the prompt has the token 999, but the model knows those from 0 to 255",
        ),
        ({"prompt": []}, "the prompt has 0 tokens"),
        ({"prompt": "x" * LENGTH}, f"the prompt has {LENGTH} tokens"),
        ({"prompt": "x", "model": "other"}, "the model 'other' does not exist"),
        ({}, "prompt: "),
    ],
)
def test_what_is_wrong_with_a_request_is_said(
    served: Served, values: dict[str, Any], says: str
) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    response = httpx.post(
        f"{served.url}/v1/completions", json={"model": "tiny"} | values, headers=headers
    )
    problem = response.json()["error"]
    assert response.status_code == (404 if values.get("model") else 400)
    assert says in problem["message"]
    assert problem["type"] == "invalid_request_error"


def test_what_is_no_json_and_no_path(served: Served) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    response = httpx.post(
        f"{served.url}/v1/completions",
        content=b"{nonsense",
        headers=headers | {"Content-Type": "application/json"},
    )
    assert (response.status_code, response.json()["error"]["message"]) == (
        400,
        "the body is not valid JSON",
    )
    assert (
        httpx.get(f"{served.url}/v1/nothing", headers=headers).json()["error"]["message"]
        == "Not Found"
    )


def test_the_page_in_a_browser(served: Served) -> None:
    playwright = pytest.importorskip("playwright.sync_api")
    browser = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if browser is None:
        pytest.skip("no Chromium on this machine")
    rows = served.log.with_name("ratings") / "preference.jsonl"
    before = len(rows.read_bytes().splitlines()) if rows.exists() else 0
    with playwright.sync_playwright() as tool:
        page = tool.chromium.launch(executable_path=browser, args=["--no-sandbox"]).new_page()
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(served.url)
        page.fill("#key", KEY)
        page.fill("#max_tokens", "20")
        page.fill("#prompt", "Hello <b>there</b>")
        page.keyboard.press("Enter")
        page.click("[aria-label='Correct it']")
        assert page.inner_text(".user .text") == "Hello <b>there</b>", (
            "what is said is text, not markup"
        )
        # As the server said it, not as it is drawn.
        said = page.evaluate("talk[0].answers[0].versions[0].said")
        page.fill("[aria-label='Your answer']", "Hello yourself.")
        page.click("text=Save")
        page.wait_for_selector("text=your answer is noted")
        assert page.text_content(".answer .text") == "Hello yourself."
        assert page.inner_text(".pace").startswith("20 tokens, ")
        noted = json.loads(rows.read_bytes().splitlines()[-1])
        assert noted["id"].startswith("chatcmpl-"), "the response that was rated"
        asked: list[Any] = []
        page.on(
            "request",
            lambda request: asked.append(request.post_data_json) if request.post_data else None,
        )
        page.fill("#max_tokens", "9999")
        page.fill("#prompt", "And more?")
        page.keyboard.press("Enter")
        page.wait_for_selector(".busy:not(:empty)")
        page.reload()
        page.wait_for_selector(".turn:last-child [aria-label='Answer again']")
        assert page.locator(".busy").count() == 0
        assert page.text_content(".turn:last-child .answer .text"), "what it had said by then"
        page.fill("#prompt", "And more?")
        page.keyboard.press("Enter")
        page.wait_for_selector(".busy:not(:empty)")
        page.click("#fresh")
        page.wait_for_selector("#send:has-text('Send')")
        page.click("#gear")
        page.fill("#max_tokens", "5")
        page.fill("#prompt", "Again?")
        page.keyboard.press("Enter")
        page.click("[aria-label='Bad answer']")
        page.wait_for_selector("text=Thank you, noted")
        *_, again, _ = asked
        assert again["messages"] == [{"role": "user", "content": "Again?"}], (
            "nothing of the talk before"
        )
        page.route("**/v1/ratings", lambda route: route.abort())
        page.fill("#prompt", "And now?")
        page.keyboard.press("Enter")
        page.click("[aria-label='Good answer'] >> nth=1")
        page.wait_for_selector(".problem")
        page.route("**/v1/chat/completions", lambda route: route.abort())
        page.fill("#prompt", "And then?")
        page.keyboard.press("Enter")
        page.wait_for_selector("text=cannot be reached")
        assert page.input_value("#prompt") == "And then?", "to be sent again"
        assert not problems
    added = [json.loads(line) for line in rows.read_bytes().splitlines()[before:]]
    assert [(row["prompt"][0]["content"], row["chosen"], row["rejected"]) for row in added] == [
        ("Hello <b>there</b>", "Hello yourself.", said)
    ]


def test_it_ends_as_asked_and_has_told_no_secrets(served: Served) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    body = ASKED | {"prompt": "a secret of the user's", "max_tokens": 16_000, "stream": True}
    with httpx.stream(
        "POST", f"{served.url}/v1/completions", json=body, headers=headers, timeout=PATIENCE_S
    ) as response:
        lines = response.iter_lines()
        next(lines)
        served.process.send_signal(signal.SIGTERM)
        last = [line for line in lines if line]
    assert last[-1] == "data: [DONE]", "cut off cleanly"
    assert served.process.wait(PATIENCE_S) == 0
    log = served.log.read_text()
    assert "POST /v1/completions 200" in log
    assert KEY not in log
    assert "secret" not in log
    assert "Traceback" not in log, log
