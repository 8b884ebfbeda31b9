"""Several models behind one address, each asked by its name, as `model` of OpenAI's API has it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import orjson
from fastapi import FastAPI

from megalite.errors import ConfigError
from megalite.infer.serving.front import Host, Loaded, reload_all
from megalite.infer.serving.loading import Model, Open
from megalite.infer.serving.settings import Settings


def make_by_name(settings: Settings, open_it: Open, others: Sequence[tuple[str, Open]]) -> ByName:
    """Return the host of the model that `open_it` opens, and of the `others` with their names. The
    settings are those of the first. Raise as these do, and ConfigError for a name that is given
    twice."""
    names = [settings.name, *(name for name, _ in others)]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(
                f"--also: two models are called {name!r}, by which clients could ask for neither; link a folder under "
                "another name, or give --name for the first"
            )
    first = Host(open_it(False), replace(settings, beside=tuple(names[1:])), open_it)
    hosts = {settings.name: first}
    for name, open_other in others:
        # A line a request is the front's, and the first's settings are what it goes by.
        own = replace(settings, name=name, request_log=None)
        hosts[name] = Host(open_other(False), own, open_other, first.metrics)
    return ByName(hosts)


class ByName:
    """ASGI app that passes each request on to the host of the model that it names; it stands in the
    place of one. What names none, or one that there is not, is the first's."""

    def __init__(self, hosts: Mapping[str, Host]):
        self.hosts = hosts
        self._first = next(iter(hosts.values()))
        self.settings, self.metrics = self._first.settings, self._first.metrics
        self.log = self._first.log

    @property
    def kind(self) -> type[Model]:
        """Return the kind of the first model, which the page and the review are about."""
        return self._first.kind

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        host = self._first
        if scope["type"] == "http" and scope["method"] == "POST":
            name, receive = await _name_in(receive)
            host = self.hosts.get(name, host)
        elif scope["type"] == "http" and scope["path"] == "/health":
            timeout_s = self.settings.timeout_s
            ill = (one for one in self.hosts.values() if one.current.engine.trouble(timeout_s))
            host = next(ill, host)
        await host(scope, receive, send)

    @contextlib.asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """Run the engines of all while the server runs."""
        async with contextlib.AsyncExitStack() as stack:
            for host in self.hosts.values():  # the first ends last: the log is its
                await stack.enter_async_context(host.lifespan(app))
            yield

    def close(self, within_s: float) -> None:
        """Accept no more requests; see `Host`."""
        for host in self.hosts.values():
            host.close(within_s)

    def reload_soon(self) -> None:
        """Reload all models without waiting for it."""
        for host in self.hosts.values():
            host.reload_soon()

    async def reload(self) -> Loaded:
        """Reload all models; return the first. Raise Trouble where one cannot be served."""
        return await reload_all(self.hosts.values())


async def _name_in(receive: Any) -> tuple[str, Any]:
    """Read a request's body. Return the model that it names, empty where it names none, and what
    gives the body again. Guards has limited its size and its parts by now."""
    pieces: list[Any] = []
    while not pieces or (pieces[-1]["type"] == "http.request" and pieces[-1].get("more_body")):
        pieces.append(await receive())
    try:
        name = orjson.loads(b"".join(piece.get("body", b"") for piece in pieces))["model"]
    except (orjson.JSONDecodeError, LookupError, TypeError):  # which the app explains
        name = ""
    messages = iter(pieces)

    async def again() -> Any:
        message = next(messages, None)
        return await receive() if message is None else message

    return name if isinstance(name, str) else "", again
