"""A server that speaks OpenAI's chat completions, and answers as a function of the request alone:
after a time of its own, so that answers come in another order than they were asked for, and after
refusing some of the first tries."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Body = dict[str, Any]
WORDS = """
river stone garden engine letter window harbour planet violin market copper forest captain mirror orchard
ladder candle bridge winter ocean pepper saddle thunder village walnut yellow zebra anchor basket cotton
""".split()  # noqa: SIM905


class Failing(Exception):
    """Raised by an answer function for a response with this status."""

    def __init__(self, status: int, text: str = "no", **headers: str) -> None:
        super().__init__(text)
        self.status, self.headers = status, headers


def draw(body: Body, what: str = "") -> int:
    """A number that follows from the request."""
    told = json.dumps([what, body], sort_keys=True).encode()
    return int.from_bytes(hashlib.blake2b(told, digest_size=8).digest(), "little")


def words(body: Body, count: int, what: str = "") -> str:
    """Words that follow from the request."""
    return " ".join(WORDS[draw(body, f"{what}{n}") % len(WORDS)] for n in range(count))


class Stub:
    """What was asked, and how often."""

    def __init__(self, answer: Callable[[Body], str], delay_s: float, url: str) -> None:
        self.answer, self.delay_s, self.url = answer, delay_s, url
        self.bodies: list[Body] = []
        self.tells_usage = True
        self.under_way = self.most_under_way = 0
        self.authorization: list[str | None] = []
        self.lock = threading.Lock()

    def respond(self, body: Body) -> tuple[int, Body, dict[str, str]]:
        try:
            text = self.answer(body)
        except Failing as failing:
            return failing.status, {"error": {"message": str(failing)}}, failing.headers
        time.sleep(self.delay_s * (draw(body, "delay") % 8))
        asked = " ".join(message["content"] for message in body["messages"])
        prompt, completion = (len(x.split()) for x in (asked, text))
        finish, text = ("length", text[:-1]) if text.endswith("\0") else ("stop", text)
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": finish}
        usage = {"prompt_tokens": prompt, "completion_tokens": completion}
        return 200, {"choices": [choice], **({"usage": usage} if self.tells_usage else {})}, {}


@contextlib.contextmanager
def stub_endpoint(answer: Callable[[Body], str], delay_s: float = 0.0) -> Iterator[Stub]:
    """Serve in a thread. `answer` returns the text of an answer, with NUL at its end where it is
    cut off, or raises Failing."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        # Header and body are two writes: without this the second waits for the other side's ACK.
        disable_nagle_algorithm = True

        def handle(self) -> None:
            with contextlib.suppress(OSError):  # who asked was killed
                super().handle()

        def do_POST(self) -> None:
            assert self.path == "/v1/chat/completions"
            data = self.rfile.read(int(self.headers["content-length"]))
            if not data:
                return
            body = json.loads(data)
            with stub.lock:
                stub.bodies.append(body)
                stub.authorization.append(self.headers["authorization"])
                stub.under_way += 1
                stub.most_under_way = max(stub.most_under_way, stub.under_way)
            try:
                status, values, headers = stub.respond(body)
            finally:
                with stub.lock:
                    stub.under_way -= 1
            data = json.dumps(values).encode()
            self.send_response(status)
            for name, value in {**headers, "content-length": str(len(data))}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    stub = Stub(answer, delay_s, f"http://127.0.0.1:{server.server_port}/v1")
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield stub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
