"""Two models behind one address: an A/B test, in which each client is always answered by the same one,
or a shadow, which is asked as well and answers nobody."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import random
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from fastapi import FastAPI

from megalite.errors import ConfigError
from megalite.infer.serving.app import is_logged
from megalite.infer.serving.front import Host, Hosting, Loaded, reload_all
from megalite.infer.serving.guards import CLIENT
from megalite.infer.serving.loading import Open
from megalite.infer.serving.request_log import note, noted
from megalite.infer.serving.settings import Settings

LOG = logging.getLogger("megalite.serve")
HEADER = b"x-split-key"
"""Header by which a service that asks for many users with one API key tells them apart."""
MOST_SHADOWS = 8
"""Shadows under way; more are left out, for nobody waits for them."""


def make_hosting(
    settings: Settings, open_it: Open, open_other: Open | None, share: float, shadow: bool
) -> Hosting:
    """Return a host of the model that `open_it` opens, now and again; beside one of `open_other`
    the split between them, see `Split`. Raise as these do, and ConfigError."""
    champion = Host(open_it(False), settings, open_it)
    if open_other is None:
        return champion
    # A shadow's answers are nobody's, and its times must not be among those of what clients get.
    metrics = None if shadow else champion.metrics
    other = replace(settings, request_log=None)
    return Split(champion, Host(open_other(False), other, open_other, metrics), share, shadow)


def falls_to_challenger(key: bytes, share: float) -> bool:
    """Return whether who asks by `key` belongs to the `share` that the challenger answers. Who does
    still does where the share grows."""
    # A prefix of its own: no other share that is drawn by hashes of keys falls together with it.
    digest = hashlib.sha256(b"split:" + key).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


class Split:
    """ASGI app that passes requests on to one of two hosts; it stands in the place of one."""

    def __init__(self, champion: Host, challenger: Host, share: float, shadow: bool):
        """Let `challenger` answer the `share` of clients, or with `shadow` be asked a share of
        requests beside `champion`, whose answers count alone. Raise ConfigError."""
        if not 0 < share <= 1:
            raise ConfigError(f"--share {share:g}: give a number above 0, of at most 1")
        # Of the same kind, for both have one set of addresses.
        if champion.kind is not challenger.kind:
            raise ConfigError(
                f"--challenger {challenger.current.folder} holds another kind of model "
                f"({challenger.kind.__name__}) than is served ({champion.kind.__name__})"
            )
        if shadow and champion.log is None:
            raise ConfigError(
                "--shadow is for its lines in a log alone: give --request-log DIR, too"
            )
        self.champion, self.challenger, self.share, self.shadow = (
            champion,
            challenger,
            share,
            shadow,
        )
        self.kind = champion.kind
        self.settings, self.metrics, self.log = champion.settings, champion.metrics, champion.log
        self._shadows: set[asyncio.Task[None]] = set()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        # Guards has said who asks by now, of all that is asked of a model.
        asks = scope["type"] == "http" and is_logged(scope)
        if self.shadow:
            rating = scope["path"] == "/v1/ratings"
            if asks and not rating and random.random() < self.share:
                await self._both(scope, receive, send)
            else:
                await self._by(self.champion, "a", scope, receive, send)
            return
        timeout_s, ill = self.settings.timeout_s, self.challenger.current.engine.trouble
        if asks and falls_to_challenger(_key_of(scope), self.share):
            await self._by(self.challenger, "b", scope, receive, send)
        elif scope["path"] == "/health" and ill(timeout_s):
            await self.challenger(scope, receive, send)
        else:
            await self._by(self.champion, "a", scope, receive, send)

    async def _by(self, host: Host, arm: str, scope: Any, receive: Any, send: Any) -> None:
        note(arm=arm)
        await host(scope, receive, send)

    async def _both(self, scope: Any, receive: Any, send: Any) -> None:
        """Let the champion answer, and then ask the challenger the same."""
        pieces: list[bytes] = []
        before = dict(scope)  # apps add to a scope what they find

        async def recording() -> Any:
            message = await receive()
            pieces.append(message.get("body", b""))
            return message

        await self._by(self.champion, "a", scope, recording, send)
        # After the champion has answered, who must not wait for the one that answers nobody.
        if len(self._shadows) < MOST_SHADOWS:
            of = noted("id")
            task = asyncio.ensure_future(self._ask_shadow(before, b"".join(pieces), of))
            self._shadows.add(task)
            task.add_done_callback(self._shadows.discard)

    async def _ask_shadow(self, scope: Any, body: bytes, of: Any) -> None:
        """Ask the challenger what was asked before, and log what it comes to. `of` is the id of the
        answer that the client got."""
        assert self.log is not None
        facts, began, status, is_read = self.log.begin(), time.monotonic(), 500, False

        async def receive() -> Any:
            nonlocal is_read
            if is_read:  # no client is there that could go
                await asyncio.Event().wait()
            is_read = True
            return {"type": "http.request", "body": body}

        async def send(message: Any) -> None:
            nonlocal status
            status = message.get("status", status)

        try:
            await self.challenger(scope, receive, send)
        except Exception:
            LOG.exception("a shadow failed")
        seconds = time.monotonic() - began
        path = getattr(scope.get("route"), "path", "other")
        times = {"time": time.time() - seconds, "seconds": seconds}
        told = {"path": path, "status": status, "arm": "shadow", "of": of}
        self.log.end(facts, scope[CLIENT], **times, **told)

    @contextlib.asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """Run the engines of both while the server runs."""
        # The champion's ends last: the log is its.
        async with self.champion.lifespan(app), self.challenger.lifespan(app):
            yield
            for task in self._shadows:
                task.cancel()

    def close(self, within_s: float) -> None:
        """Accept no more requests; see `Host`."""
        self.champion.close(within_s)
        self.challenger.close(within_s)

    def reload_soon(self) -> None:
        """Reload both models without waiting for it."""
        self.champion.reload_soon()
        self.challenger.reload_soon()

    async def reload(self) -> Loaded:
        """Reload both models; return the champion. Raise Trouble where one cannot be served."""
        return await reload_all((self.champion, self.challenger))


def _key_of(scope: Any) -> bytes:
    """Return what a client is told by: its header, or else its API key, or address."""
    named = next((value for name, value in scope["headers"] if name == HEADER), b"")
    key: bytes = named or scope[CLIENT]
    return key
