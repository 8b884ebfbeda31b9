"""What stands before the API: how large a request may be, who may ask, by which name, and how often. None of it reads a
body."""

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
OPEN_PATHS = ("/", "/health", "/metrics", "/v1/about")
MOST_CLIENTS = 10_000
"""Whose requests are counted; who has asked for nothing for longest is forgotten first."""
WRONG_KEYS_PER_MINUTE = 10
"""Of an address. It may go on with keys that were right before."""
LARGE_AT_ONCE = 32
"""Largest requests whose bodies may be in memory at once; small ones are not counted."""
MOST_PARTS = (((b"[", b"{"), 4096, "lists and objects"), ((b":",), 8192, "keys"), ((b",",), 1 << 18, "values"))
"""Of a body. Others wait while it is parsed, which goes by these: at most some 50 ms."""
MOST_TEXTS = 1 << 15
COUNTED_BYTES = 4096
"""Of a body in which there can be no more of them."""
DISCARDED_S, DISCARDED_BYTES = 10.0, 256 << 20
"""How long and how much of a refused body is read and thrown away, so that its sender hears why."""


def read_keys(file: Path | None) -> list[str]:
    """The keys that open the API, a line each in a file; else from the environment. None: it is open to all."""
    if file is None:
        return [key] if (key := os.environ.get(KEY_VARIABLE, "").strip()) else []
    keys = [line.strip() for line in read_text(file, ConfigError).splitlines() if line.strip()]
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
    """ASGI middleware. It believes no header about who asks: an address is that of the connection."""

    def __init__(self, app: Any, keys: Sequence[str], max_bytes: int, requests_per_minute: int, host: str):
        """`requests_per_minute`: of one key, or of one address where there are no keys; 0 for any number. `host`: what
        the server was asked to listen on."""
        self.app, self.max_bytes, self.host = app, max_bytes, host
        self.keys = [key.encode() for key in keys]
        self.rate = Rate(requests_per_minute) if requests_per_minute else None
        self.wrong = Rate(WRONG_KEYS_PER_MINUTE)
        self._right: OrderedDict[tuple[bytes, bytes], None] = OrderedDict()
        """Addresses, and the keys that opened the API to them."""
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
                self._check_rate(self._check_key(scope), scope)
        except Refused as refused:
            await _refuse(refused, receive, send)
            return
        held = Held(self)
        try:
            await self.app(scope, self._counted(receive, held), send)
        finally:
            held.release()

    def _check_size(self, scope: Any) -> None:
        length = _header(scope, b"content-length")
        if length is not None and (not length.isdigit() or int(length) > self.max_bytes):
            raise too_large(self.max_bytes)

    def _check_names(self, scope: Any) -> None:
        """Without a key, whoever reaches the server may ask. A page of somebody else in a browser on this machine
        reaches it too: by a name of its own, or from an origin of its own."""
        if self.keys:
            return
        host = (_header(scope, b"host") or b"").decode("latin-1")
        if not is_own_name(host, self.host, str((scope.get("server") or ("",))[0])):
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
        """For a body that does not say how large it is, and to look at it before it is parsed."""
        total, pieces = 0, []

        async def receiving() -> Any:
            nonlocal total
            message = await receive()
            pieces.append(message.get("body", b""))
            total += len(pieces[-1])
            if total > self.max_bytes:
                raise too_large(self.max_bytes)
            held.grow_to(total)
            if not message.get("more_body", False):
                if total > COUNTED_BYTES:
                    check_parts(b"".join(pieces))
                pieces.clear()
            return message

        return receiving

    def _check_key(self, scope: Any) -> bytes | None:
        """The key; None where none is asked for."""
        if not self.keys:
            return None
        scheme, _, given = (_header(scope, b"authorization") or b"").partition(b" ")
        given, client = given.strip(), _client(scope)
        if scheme.lower() != b"bearer" or not given:
            text = "an API key is needed: Authorization: Bearer KEY"
            raise Refused(401, error(text, "invalid_request_error", code="invalid_api_key"), _ASKS_FOR_KEY)
        # Who may not guess is told nothing, not even that a guess was right.
        if (client, given) not in self._right and (wait := self.wrong.wait_s(client, count=False)):
            text = f"too many wrong API keys: try again in {wait} s"
            raise Refused(429, error(text, "rate_limit_error", code="rate_limit_exceeded"), {"retry-after": str(wait)})
        # Each is compared, and whole: time must not tell how much of a key was right.
        fits = [hmac.compare_digest(given, key) for key in self.keys]
        if not any(fits):
            self.wrong.wait_s(client)
            text = "the API key is wrong"
            raise Refused(401, error(text, "invalid_request_error", code="invalid_api_key"), _ASKS_FOR_KEY)
        self._right[client, given] = None
        self._right.move_to_end((client, given))
        if len(self._right) > MOST_CLIENTS:
            self._right.popitem(last=False)
        return given

    def _check_rate(self, key: bytes | None, scope: Any) -> None:
        if self.rate is None:
            return
        if wait := self.rate.wait_s(key or _client(scope)):
            text = f"more than {self.rate.per_minute} requests a minute: try again in {wait} s"
            headers = {"retry-after": str(wait)}
            raise Refused(429, error(text, "rate_limit_error", code="rate_limit_exceeded"), headers)


def check_parts(body: bytes) -> None:
    """Raises Refused for JSON of so many parts that to parse it would hold up others."""
    structure, num_texts = b"", (body.count(b'"') - body.count(b'\\"')) // 2  # or more
    if num_texts <= MOST_TEXTS:
        structure, num_texts = _TEXT.subn(b"", body)
    counts = [(sum(structure.count(mark) for mark in marks), most, what) for marks, most, what in MOST_PARTS]
    for count, most, what in [(num_texts, MOST_TEXTS, "texts"), *counts]:
        if count > most:
            raise Refused(400, error(f"the body has more than {most:,} {what}", "invalid_request_error"))


# Nothing in it is tried a second time: also a text without an end is passed over once.
_TEXT = re.compile(rb'"[^"\\]*+(?:\\.?[^"\\]*+)*+(?:"|\Z)', re.DOTALL)


class Held:
    """What the body of one request takes of the memory for large ones."""

    def __init__(self, guards: Guards):
        self._guards, self._bytes = guards, 0

    def grow_to(self, num_bytes: int) -> None:
        """Raises Refused where all that is for large bodies is taken."""
        if num_bytes <= max(SMALL_BYTES, self._bytes):
            return
        more = num_bytes - self._bytes
        if self._guards._held + more > LARGE_AT_ONCE * self._guards.max_bytes:
            text = "too many large requests are under way: try again later"
            raise Refused(503, error(text, "server_error", code="overloaded"), {"retry-after": "1"})
        self._guards._held += more
        self._bytes = num_bytes

    def release(self) -> None:
        self._guards._held -= self._bytes
        self._bytes = 0


class Rate:
    """A bucket for each client: it holds the requests of a minute and fills up steadily."""

    def __init__(self, per_minute: int):
        self.per_minute = per_minute
        self._buckets: OrderedDict[bytes, tuple[float, float]] = OrderedDict()
        """What is left, and when it was looked at."""

    def wait_s(self, client: bytes, count: bool = True) -> int:
        """0, and the request counts where `count`; or after how many seconds the next one may come."""
        now = time.monotonic()
        left, then = self._buckets.pop(client, (float(self.per_minute), now))
        # Rounded, or who comes back in time may be refused for what rounding left.
        left = round(min(left + (now - then) * self.per_minute / 60, self.per_minute), 6)
        self._buckets[client] = (left - 1 if count and left >= 1 else left, now)
        if len(self._buckets) > MOST_CLIENTS:
            self._buckets.popitem(last=False)
        return 0 if left >= 1 else math.ceil(round((1 - left) * 60 / self.per_minute, 3))


_ASKS_FOR_KEY = {"www-authenticate": "Bearer"}


def _client(scope: Any) -> bytes:
    """The address that asks; of IPv6 the network, in which one machine has as many addresses as it likes."""
    address = str((scope.get("client") or ("",))[0])
    if ":" in address and "." not in address:
        network = ipaddress.ip_network((address.partition("%")[0], 64), strict=False)
        return str(network).encode()
    return address.encode()


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
