"""Checks in front of the API: how large a request may be, who may ask, under which host name, and
how often. None of them parses a body."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import math
import os
import re
import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson
from starlette.exceptions import HTTPException

from megalite.errors import ConfigError
from megalite.infer.serving.lanes import SMALL_BYTES
from megalite.infer.serving.names import is_own_name, is_own_page
from megalite.infer.serving.protocol import error
from megalite.utils.outside import read_text

KEY_VARIABLE = "MEGALITE_API_KEY"
ADMIN_KEY_VARIABLE = "MEGALITE_ADMIN_KEY"
ADMIN, RELOAD, QUEUE = "/admin/", "/admin/reload", "/admin/review"
CLIENT = "megalite.client"
"""What a request's scope tells who asks by: the key, or without keys the address."""
OPEN_PATHS = ("/", "/health", "/metrics", "/v1/about", "/review")
MOST_CLIENTS = 10_000
"""Number of clients whose requests are counted; the one idle for longest is forgotten first."""
WRONG_KEYS_PER_MINUTE = 10
"""Wrong keys allowed per address. It may still use keys that were right before."""
LARGE_AT_ONCE = 32
"""Number of largest requests whose bodies may be in memory at once; small ones are not counted."""
MOST_PARTS = (
    ((b"[", b"{"), 4096, "lists and objects"),
    ((b":",), 8192, "keys"),
    ((b",",), 1 << 18, "values"),
)
"""Most JSON parts of a body, by kind. Its parsing time, during which others wait, depends on these:
at most some 50 ms."""
MOST_TEXTS = 1 << 15
COUNTED_BYTES = 4096
"""A body up to this size cannot exceed these counts."""
DISCARDED_S, DISCARDED_BYTES = 10.0, 256 << 20
"""How long and how much of a refused body is read and discarded, so that its sender gets to read
the answer."""


def read_keys(file: Path | None) -> list[str]:
    """Return the API keys: one per line of `file`, otherwise the one in the environment. An empty
    list opens the API to all. Raise ConfigError for a file without a key."""
    if file is None:
        return [key] if (key := os.environ.get(KEY_VARIABLE, "").strip()) else []
    keys = [line.strip() for line in read_text(file, ConfigError).splitlines() if line.strip()]
    if not keys:
        raise ConfigError(f"{file} holds no key: write one, of your own making, on a line")
    return keys


class Refused(HTTPException):
    """Raised for a request that is not passed on, with the response's body."""

    def __init__(self, status: int, body: dict[str, Any], headers: dict[str, str] | None = None):
        super().__init__(status, body["error"]["message"], headers)
        self.body = body


def too_large(limit: int) -> Refused:
    """Return the error for a request larger than `limit` bytes."""
    text = f"the request is larger than the {limit:,} bytes that this server takes"
    return Refused(413, error(text, "invalid_request_error", code="request_too_large"))


class Guards:
    """ASGI middleware that checks requests. It trusts no header about the client: an address is
    that of the connection."""

    def __init__(
        self,
        app: Any,
        keys: Sequence[str],
        max_bytes: int,
        requests_per_minute: int,
        host: str,
        admin_key: str = "",
    ):
        """Wrap `app`. A request needs one of `keys`, if there are any, and a body of at most
        `max_bytes`. `requests_per_minute` applies per key, or per address without keys; 0 is no
        limit. `host` is what the server was asked to listen on. Paths below ADMIN open to
        `admin_key` alone, which opens nothing else."""
        self.app, self.max_bytes, self.host = app, max_bytes, host
        self.keys = [key.encode() for key in keys]
        self.admin_keys = [admin_key.encode()] if admin_key else []
        self.rate = Rate(requests_per_minute) if requests_per_minute else None
        self.wrong = Rate(WRONG_KEYS_PER_MINUTE)
        self._right: OrderedDict[tuple[bytes, bytes], None] = OrderedDict()
        """Addresses with the keys that they have used successfully."""
        self._held = 0
        """Bytes of large bodies in memory."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            self._check_size(scope)
            self._check_names(scope)
            if scope["path"] not in OPEN_PATHS:
                scope[CLIENT] = self._check_key(scope) or _client(scope)
                self._check_rate(scope[CLIENT])
        except Refused as refused:
            await _refuse(refused, receive, send)
            return
        held = Held(self)
        try:
            await self.app(scope, self._counted(receive, held), send)
        finally:
            held.release()

    def _check_size(self, scope: Any) -> None:
        """Raise Refused if the stated length is too large or no number."""
        length = _header(scope, b"content-length")
        # Digits alone, for int() also takes signs, spaces and underscores.
        if length is not None and (not length.isdigit() or int(length) > self.max_bytes):
            raise too_large(self.max_bytes)

    def _check_names(self, scope: Any) -> None:
        """Refuse requests from foreign web pages if there is no key. Whoever reaches the server may
        then ask, and a page in a browser on this machine reaches it too: under a host name of its
        own, or from an origin of its own. Raise Refused."""
        if self.keys:
            return
        named = _header(scope, b"host")
        host = (named or b"").decode("latin-1")
        # Every browser names it; a load balancer's check by HTTP/1.0 does not.
        if named is not None and not is_own_name(
            host, self.host, str((scope.get("server") or ("",))[0])
        ):
            text = (
                f"the server has no API key, and then answers only to its own names, of which {host[:100]!r} is none: "
                f"set {KEY_VARIABLE}, or give the name to --host"
            )
            raise Refused(403, error(text, "invalid_request_error", code="unknown_host"))
        origin = _header(scope, b"origin")
        if origin is not None and not is_own_page(origin.decode("latin-1"), host):
            text = "the server has no API key, and then takes requests from no page but its own"
            raise Refused(403, error(text, "invalid_request_error", code="unknown_origin"))

    def _counted(self, receive: Any, held: Held) -> Any:
        """Return `receive` with limits: for bodies that do not state their size, and to check the
        parts of a body before it is parsed."""
        total, pieces = 0, []

        async def receiving() -> Any:
            nonlocal total
            message = await receive()
            # Kept for `check_parts`, which needs the whole: a text may go over the border of two.
            pieces.append(message.get("body", b""))
            total += len(pieces[-1])
            if total > self.max_bytes:
                raise too_large(self.max_bytes)
            # By what has come, not by what is stated: who states much and sends little holds little.
            held.grow_to(total)
            if not message.get("more_body", False):
                if total > COUNTED_BYTES:
                    check_parts(b"".join(pieces))
                pieces.clear()
            return message

        return receiving

    def _check_key(self, scope: Any) -> bytes | None:
        """Return the request's key, None if none is needed. Raise Refused."""
        keys = self.admin_keys if scope["path"].startswith(ADMIN) else self.keys
        if not keys:
            return None
        scheme, _, given = (_header(scope, b"authorization") or b"").partition(b" ")
        given, client = given.strip(), _client(scope)
        if scheme.lower() != b"bearer" or not given:
            text = "an API key is needed: Authorization: Bearer KEY"
            raise Refused(
                401, error(text, "invalid_request_error", code="invalid_api_key"), _ASKS_FOR_KEY
            )
        # Past the limit of wrong keys, not even a right guess is confirmed.
        if (client, given) not in self._right and (wait := self.wrong.wait_s(client, count=False)):
            text = f"too many wrong API keys: try again in {wait} s"
            raise Refused(
                429,
                error(text, "rate_limit_error", code="rate_limit_exceeded"),
                {"retry-after": str(wait)},
            )
        # All keys are compared in constant time: the duration must not tell how much of a key was
        # right.
        fits = [hmac.compare_digest(given, key) for key in keys]
        if not any(fits):
            self.wrong.wait_s(client)
            text = "the API key is wrong"
            raise Refused(
                401, error(text, "invalid_request_error", code="invalid_api_key"), _ASKS_FOR_KEY
            )
        self._right[client, given] = None
        self._right.move_to_end((client, given))
        if len(self._right) > MOST_CLIENTS:
            self._right.popitem(last=False)
        return given

    def _check_rate(self, client: bytes) -> None:
        """Raise Refused if the client, a key or an address, has used up its requests per minute."""
        if self.rate is None:
            return
        if wait := self.rate.wait_s(client):
            text = f"more than {self.rate.per_minute} requests a minute: try again in {wait} s"
            headers = {"retry-after": str(wait)}
            raise Refused(429, error(text, "rate_limit_error", code="rate_limit_exceeded"), headers)


def check_parts(body: bytes) -> None:
    """Raise Refused for JSON with so many parts that parsing it would delay others."""
    # The cheap count comes first: only a body that passes it is worth the regular expression.
    structure, num_texts = b"", (body.count(b'"') - body.count(b'\\"')) // 2  # or more
    if num_texts <= MOST_TEXTS:
        structure, num_texts = _TEXT.subn(b"", body)
    counts = [
        (sum(structure.count(mark) for mark in marks), most, what)
        for marks, most, what in MOST_PARTS
    ]
    for count, most, what in [(num_texts, MOST_TEXTS, "texts"), *counts]:
        if count > most:
            raise Refused(
                400, error(f"the body has more than {most:,} {what}", "invalid_request_error")
            )


# Possessive quantifiers: no backtracking, so that even an unterminated text is scanned only once.
_TEXT = re.compile(rb'"[^"\\]*+(?:\\.?[^"\\]*+)*+(?:"|\Z)', re.DOTALL)


class Held:
    """Counts the memory that one request's body takes of the share for large bodies."""

    def __init__(self, guards: Guards):
        self._guards, self._bytes = guards, 0

    def grow_to(self, num_bytes: int) -> None:
        """Record that the body has `num_bytes` so far. Raise Refused if the share for large bodies
        is used up."""
        # Small ones are not counted, so that large ones never keep them out.
        if num_bytes <= max(SMALL_BYTES, self._bytes):
            return
        more = num_bytes - self._bytes
        if self._guards._held + more > LARGE_AT_ONCE * self._guards.max_bytes:
            text = "too many large requests are under way: try again later"
            raise Refused(503, error(text, "server_error", code="overloaded"), {"retry-after": "1"})
        self._guards._held += more
        self._bytes = num_bytes

    def release(self) -> None:
        """Give the memory back."""
        self._guards._held -= self._bytes
        self._bytes = 0


class Rate:
    """Limits requests by a token bucket per client, which holds the requests of a minute and
    refills steadily."""

    def __init__(self, per_minute: int):
        self.per_minute = per_minute
        self._buckets: OrderedDict[bytes, tuple[float, float]] = OrderedDict()
        """Requests left, and when that was computed."""

    def wait_s(self, client: bytes, count: bool = True) -> int:
        """Return 0 if `client` may ask now, and count the request if `count`; otherwise the seconds
        until it may."""
        now = time.monotonic()
        left, then = self._buckets.pop(client, (float(self.per_minute), now))
        # Rounded, or a client that waited exactly as told could be refused for a rounding error.
        left = round(min(left + (now - then) * self.per_minute / 60, self.per_minute), 6)
        self._buckets[client] = (left - 1 if count and left >= 1 else left, now)
        if len(self._buckets) > MOST_CLIENTS:
            self._buckets.popitem(last=False)
        return 0 if left >= 1 else math.ceil(round((1 - left) * 60 / self.per_minute, 3))


_ASKS_FOR_KEY = {"www-authenticate": "Bearer"}


def _client(scope: Any) -> bytes:
    """Return the client's address; for IPv6 its /64 network, in which one machine has any number of
    addresses."""
    address = str((scope.get("client") or ("",))[0])
    if ":" in address and "." not in address:
        network = ipaddress.ip_network((address.partition("%")[0], 64), strict=False)
        return str(network).encode()
    return address.encode()


def _header(scope: Any, name: bytes) -> bytes | None:
    """Return the first header of this name, None if there is none."""
    return next((value for key, value in scope["headers"] if key == name), None)


async def _refuse(refused: Refused, receive: Any, send: Any) -> None:
    """Send the error, and read on for a while."""
    body = orjson.dumps(refused.body)
    headers = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        **(refused.headers or {}),
    }
    coded = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refused.status_code, "headers": coded})
    await send({"type": "http.response.body", "body": body, "more_body": True})
    # Closing the connection while the client still sends would discard the answer.
    total, more = 0, True
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DISCARDED_S):
            while more and total < DISCARDED_BYTES:
                message = await receive()
                total, more = total + len(message.get("body", b"")), message.get("more_body", False)
    await send({"type": "http.response.body", "body": b""})
