"""Serve a model for a moment, and ask it a question by OpenAI's API."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from megalite.errors import DataError
from megalite.runtime.exit_codes import describe

QUESTION = "What is this line?\ndef close(self):"
WAIT_S = 60.0


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as listener:
        # Port 0: the system takes a free one.
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def ask(url: str, server: subprocess.Popen[bytes]) -> str:
    """Return the answer of `server`, at `url`, to the question; wait until it is there. Raise
    DataError where it ends, or never answers."""
    body = {"messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": 24}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    until = time.monotonic() + WAIT_S
    while True:
        try:
            with urllib.request.urlopen(request, timeout=WAIT_S) as answer:
                return json.load(answer)["choices"][0]["message"]["content"]
        except OSError as error:
            # Until its weights are read, the server does not listen, or says that it is not ready.
            if (status := server.poll()) is not None:
                raise DataError(f"the server has ended with {describe(status)}") from None
            if time.monotonic() > until:
                raise DataError(f"{url} does not answer: {error}") from None
            time.sleep(0.5)


def serve_and_ask(model: Path) -> int:
    """Print the question and the served model's answer; return 1 where there is none."""
    port = free_port()
    command = [sys.executable, "-m", "megalite", "serve", str(model), "--port", str(port)]
    # Nobody else asks: no answer has to be waited for at the end.
    server = subprocess.Popen([*command, "--grace", "0"])
    try:
        answer = ask(f"http://127.0.0.1:{port}", server)
    finally:
        server.terminate()
        server.wait(WAIT_S)
    print(f"{QUESTION}\n→ {answer}")
    return 0 if answer else 1
