"""A server in this process, of a model that takes a step when it is told to, and a clock that is
set by hand."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
from torch import Tensor

from megalite.infer.cache import CachedSequenceInfo
from megalite.infer.classify import Classifier
from megalite.infer.encode import Encoder
from megalite.infer.generate import Generator
from megalite.infer.sampling import Sampling
from megalite.infer.seq2seq import TargetGenerator
from megalite.infer.serving.front import Host, make_front
from megalite.infer.serving.loading import Open, Opened
from megalite.infer.serving.run import Server, make_server
from megalite.infer.serving.settings import Settings
from scripted import Bytes, Scripted

PATIENCE_S = 60.0
"""Far beyond what a loaded machine needs."""


class Clock:
    """In place of the module `time`."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class Gated(Scripted):
    """Every step waits until it is let through."""

    def __init__(self, script: bytes, num_slots: int = 1, vocab_size: int = 512):
        super().__init__(list(script), vocab_size=vocab_size)
        self.num_slots = num_slots
        self._steps, self._free = threading.Semaphore(0), False

    def step(self, count: int = 1) -> None:
        self._steps.release(count)

    def run(self) -> None:
        """From now on nothing waits."""
        self._free = True
        self._steps.release()

    def predict(self, tokens_BT: Tensor, places: CachedSequenceInfo, last_B: Tensor) -> Tensor:
        assert self._free or self._steps.acquire(timeout=PATIENCE_S)
        return super().predict(tokens_BT, places, last_B)


@dataclass
class Local:
    server: Server
    host: Any
    app: Any
    url: str

    def client(self, key: str = "none") -> openai.OpenAI:
        http = openai.DefaultHttpxClient(verify=False)  # which takes its time to find certificates
        return openai.OpenAI(
            base_url=f"{self.url}/v1",
            api_key=key,
            max_retries=0,
            timeout=PATIENCE_S,
            http_client=http,
        )

    def terminate(self) -> None:
        """What SIGTERM does."""
        self.server.handle_exit(signal.SIGTERM, None)
        for thread in threading.enumerate():
            if thread.name == "closing":
                thread.join()

    def until_closed(self) -> None:
        """To new clients."""
        address = self.url.removeprefix("http://").split(":")
        ends = time.monotonic() + PATIENCE_S
        while time.monotonic() < ends:
            try:
                socket.create_connection((address[0], int(address[1]))).close()
            except ConnectionRefusedError:
                return
            time.sleep(0.01)
        raise AssertionError(f"{self.url} still takes clients")

    def until_idle(self) -> None:
        self.until("megalite_slots_busy 0.0", "megalite_waiting 0.0")

    def until(self, *lines: str) -> None:
        """Of the metrics."""
        ends = time.monotonic() + PATIENCE_S
        while time.monotonic() < ends:
            found = httpx.get(f"{self.url}/metrics", verify=False, timeout=PATIENCE_S).text
            if set(lines) <= set(found.splitlines()):
                return
            time.sleep(0.01)
        raise AssertionError(found)


def opened(
    model: Generator | Encoder | Classifier | TargetGenerator | Gated, version: str = "first"
) -> Opened:
    """As if it were read from a folder."""
    if isinstance(model, Gated):
        model = Generator(model, Bytes(), frozenset({256}), Sampling(temperature=0))
    return Opened(model, Path(version), version)


@contextlib.contextmanager
def serving(
    model: Generator | Encoder | Classifier | TargetGenerator | Gated,
    folder: Path,
    grace_s: float = 1.0,
    open_again: Open | None = None,
    **settings: Any,
) -> Iterator[Local]:
    """Ratings go to the folder."""
    asked = Settings("tiny", folder, **settings)
    with running(Host(opened(model), asked, open_again), grace_s) as found:
        yield found


@contextlib.contextmanager
def running(host: Any, grace_s: float = 1.0) -> Iterator[Local]:
    """A host, a split between two, or several by name."""
    app = make_front(host)
    listening = socket.create_server(("127.0.0.1", 0))
    server = make_server(app, grace_s)
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    try:
        yield Local(server, host, app, f"http://127.0.0.1:{listening.getsockname()[1]}")
    finally:
        server.should_exit = True
        host.close(0.0)
        named = getattr(host, "hosts", {}).values()
        for each in named or (getattr(host, "champion", host), getattr(host, "challenger", host)):
            model = getattr(getattr(each.current.engine, "generator", None), "model", None)
            if isinstance(model, Gated):
                model.run()
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
