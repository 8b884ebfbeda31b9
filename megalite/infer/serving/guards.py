"""What stands before the API: how large a request may be, who may ask, and how often. None of it reads a body."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import math
import os
import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson
from starlette.exceptions import HTTPException

from megalite.errors import ConfigError
from megalite.infer.serving.protocol import error

KEY_VARIABLE = "MEGALITE_API_KEY"
OPEN_PATHS = ("/", "/health", "/metrics", "/v1/about")
MOST_CLIENTS = 10_000
"""Whose requests are counted; who has asked for nothing for longest is forgotten first."""
DISCARDED_S, DISCARDED_BYTES = 10.0, 256 << 20
"""How long and how much of a refused body is read and thrown away, so that its sender hears why."""


def read_keys(file: Path | None) -> list[str]:
    """The keys that open the API, a line each in a file; else from the environment. None: it is open to all."""
    if file is None:
        return [key] if (key := os.environ.get(KEY_VARIABLE, "").strip()) else []
    try:
        keys = [line.strip() for line in file.read_text().splitlines() if line.strip()]
    except OSError as problem:
        raise ConfigError(f"{file}: {problem.strerror}") from None
    if not keys:
        raise ConfigError(f"{file} holds no key: write one, of your own making, on a line")
    return keys


class Refused(HTTPException):
    def __init__(self, status: int, body: dict[str, Any], headers: dict[str, str] | None = None):
        super().__init__(status, body["error"]["message"], headers)
        self.body = body


def too_large(limit: int) -> Refused:
    text = f"the request is larger than the {limit:,} bytes that this server takes"
    return Refused(413, error(text, "invalid_request_error", code="request_too_large"))


class Guards:
    """ASGI middleware."""

    def __init__(self, app: Any, keys: Sequence[str], max_bytes: int, requests_per_minute: int):
        """`requests_per_minute`: of one key, or of one address where there are no keys; 0 for any number."""
        self.app, self.max_bytes = app, max_bytes
        self.keys = [key.encode() for key in keys]
        self.rate = Rate(requests_per_minute) if requests_per_minute else None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            self._check_size(scope)
            if scope["path"] not in OPEN_PATHS:
                self._check_rate(self._check_key(scope), scope)
        except Refused as refused:
            await _refuse(refused, receive, send)
            return
        await self.app(scope, self._counted(receive), send)

    def _check_size(self, scope: Any) -> None:
        length = _header(scope, b"content-length")
        if length is not None and (not length.isdigit() or int(length) > self.max_bytes):
            raise too_large(self.max_bytes)

    def _counted(self, receive: Any) -> Any:
        """For a body that does not say how large it is."""
        total = 0

        async def receiving() -> Any:
            nonlocal total
            message = await receive()
            total += len(message.get("body", b""))
            if total > self.max_bytes:
                raise too_large(self.max_bytes)
            return message

        return receiving

    def _check_key(self, scope: Any) -> bytes | None:
        """The key; None where none is asked for."""
        if not self.keys:
            return None
        given = (_header(scope, b"authorization") or b"").removeprefix(b"Bearer ").strip()
        # Each is compared, and whole: time must not tell how much of a key was right.
        fits = [hmac.compare_digest(given, key) for key in self.keys]
        if not any(fits):
            text = "the API key is wrong" if given else "an API key is needed: Authorization: Bearer KEY"
            headers = {"www-authenticate": "Bearer"}
            raise Refused(401, error(text, "invalid_request_error", code="invalid_api_key"), headers)
        return given

    def _check_rate(self, key: bytes | None, scope: Any) -> None:
        if self.rate is None:
            return
        client = key or str((scope.get("client") or ("",))[0]).encode()
        if wait := self.rate.wait_s(client):
            text = f"more than {self.rate.per_minute} requests a minute: try again in {wait} s"
            headers = {"retry-after": str(wait)}
            raise Refused(429, error(text, "rate_limit_error", code="rate_limit_exceeded"), headers)


class Rate:
    """A bucket for each client: it holds the requests of a minute and fills up steadily."""

    def __init__(self, per_minute: int):
        self.per_minute = per_minute
        self._buckets: OrderedDict[bytes, tuple[float, float]] = OrderedDict()
        """What is left, and when it was looked at."""

    def wait_s(self, client: bytes) -> int:
        """0, and the request counts; or after how many seconds the next one may come."""
        now = time.monotonic()
        left, then = self._buckets.pop(client, (float(self.per_minute), now))
        # Rounded, or who comes back in time may be refused for what rounding left.
        left = round(min(left + (now - then) * self.per_minute / 60, self.per_minute), 6)
        self._buckets[client] = (left - 1 if left >= 1 else left, now)
        if len(self._buckets) > MOST_CLIENTS:
            self._buckets.popitem(last=False)
        return 0 if left >= 1 else math.ceil(round((1 - left) * 60 / self.per_minute, 3))


def _header(scope: Any, name: bytes) -> bytes | None:
    return next((value for key, value in scope["headers"] if key == name), None)


async def _refuse(refused: Refused, receive: Any, send: Any) -> None:
    body = orjson.dumps(refused.body)
    headers = {"content-type": "application/json", "content-length": str(len(body)), **(refused.headers or {})}
    coded = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refused.status_code, "headers": coded})
    await send({"type": "http.response.body", "body": body, "more_body": True})
    # A connection closed on a sender that is not done would take the answer with it.
    total, more = 0, True
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DISCARDED_S):
            while more and total < DISCARDED_BYTES:
                message = await receive()
                total, more = total + len(message.get("body", b"")), message.get("more_body", False)
    await send({"type": "http.response.body", "body": b""})
