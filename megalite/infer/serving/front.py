"""What stands at a server's address: guards and log, and behind them the app of the model that is
loaded now. The model is swapped while it serves: each request ends with the model it began with."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import logging
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any, Protocol

from fastapi import FastAPI
from fastapi.responses import Response
from starlette.concurrency import run_in_threadpool

from megalite.errors import CheckpointError, ConfigError, DataError, NotFinite
from megalite.infer.generate import Generator
from megalite.infer.seq2seq import TargetGenerator
from megalite.infer.serving.app import Noted, make_app
from megalite.infer.serving.encoders import make_encoder_app
from megalite.infer.serving.errors import Trouble, as_json, explain_errors
from megalite.infer.serving.guards import RELOAD, Guards
from megalite.infer.serving.loading import Model, Open, Opened
from megalite.infer.serving.metrics import Metrics
from megalite.infer.serving.request_log import RequestLog, note
from megalite.infer.serving.review import add_review
from megalite.infer.serving.settings import Settings
from megalite.infer.serving.targets import make_target_app

LOG = logging.getLogger("megalite.serve")


def make_model_app(model: Model, settings: Settings, metrics: Metrics, version: str) -> FastAPI:
    """Return the ASGI app that answers with `model`, unguarded."""
    if isinstance(model, Generator):
        return make_app(model, settings, metrics, version)
    if isinstance(model, TargetGenerator):
        return make_target_app(model, settings, metrics, version)
    return make_encoder_app(model, settings, metrics)


class Loaded:
    """Holds a loaded model's app, and counts the requests that it answers."""

    def __init__(self, opened: Opened, settings: Settings, metrics: Metrics):
        self.kind, self.folder, self.version = type(opened.model), opened.folder, opened.version
        self.app = make_model_app(opened.model, settings, metrics, opened.version)
        self.engine: Any = self.app.state.engine
        self._lifespan = self.app.router.lifespan_context(self.app)
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        # Nothing is awaited before the count: a swap in between would end the engine under it.
        note(version=self.version)
        self._running += 1
        self._idle.clear()
        try:
            await self.app(scope, receive, send)
        finally:
            self._running -= 1
            if not self._running:
                self._idle.set()

    async def start(self) -> None:
        """Start the engine."""
        await self._lifespan.__aenter__()

    async def retire(self) -> None:
        """Wait until the last request has ended, then end the engine and let go of the model."""
        await self._idle.wait()
        await self.end()
        # FastAPI keeps the functions of its routes for as long as the process lives, and these what
        # they refer to: without this each reload would leave a model behind.
        for holder in self.app.state.holders:
            vars(holder).clear()

    async def end(self) -> None:
        """End the engine, with all that it still answers."""
        await self._lifespan.__aexit__(None, None, None)


class Host:
    """ASGI app that passes requests on to the model that is loaded now."""

    def __init__(
        self,
        opened: Opened,
        settings: Settings,
        open_again: Open | None = None,
        metrics: Metrics | None = None,
    ):
        """Host the model `opened`. `open_again` opens the one that shall take its place; None: none
        can. It reports to `metrics`, by default to ones of its own."""
        self.settings, self.metrics, self._open = settings, metrics or Metrics(), open_again
        folder = settings.request_log
        self.log = RequestLog(folder, settings.keep_days) if folder else None
        self.current = Loaded(opened, settings, self.metrics)
        self._live = [self.current]
        """The current model and those before it that still answer."""
        self._leaving: set[asyncio.Task[None]] = set()
        self._one_at_a_time = asyncio.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_closed = False

    @property
    def kind(self) -> type[Model]:
        return self.current.kind

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self.current(scope, receive, send)

    @contextlib.asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """Run the engines while the server runs."""
        self._loop = asyncio.get_running_loop()
        await self.current.start()
        self._name(self.current)
        yield
        self._is_closed = True
        # They wait for last answers, which `end` now cuts off.
        for task in self._leaving:
            task.cancel()
        for loaded in self._live:
            await loaded.end()
        if self.log:
            self.log.close()

    def close(self, within_s: float) -> None:
        """Accept no more requests. Answers that have not ended after `within_s` seconds are cut
        off. May be called from any thread."""
        self._is_closed = True
        for loaded in list(self._live):
            loaded.engine.close(within_s)

    def reload_soon(self) -> None:
        """Reload the model without waiting for it, from a signal's handler or any thread. The log
        and the metrics tell how it went."""

        async def reload() -> None:
            with contextlib.suppress(Trouble):  # it is in the log
                await self.reload()

        def start() -> None:
            # Kept: a task that nobody refers to may be collected before it ends.
            task = asyncio.ensure_future(reload())
            self._leaving.add(task)
            task.add_done_callback(self._leaving.discard)

        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(start)

    async def reload(self) -> Loaded:
        """Load what the path leads to now, and let all further requests go there. Raise Trouble
        where that cannot be served: the model stays what it was."""
        # Two at once would be three models in memory.
        async with self._one_at_a_time:
            try:
                fresh = await self._load()
            except Exception as problem:
                self.metrics.reloads.labels("refused").inc()
                is_mistake = isinstance(
                    problem, ConfigError | DataError | CheckpointError | NotFinite
                )
                name = self.settings.name
                LOG.error(
                    "the model %s stays what it was: %s", name, problem, exc_info=not is_mistake
                )
                text = f"the model {name!r} stays what it was: {problem}"
                raise Trouble(409, text, "invalid_request_error", code="reload_refused") from None
            old, self.current = self.current, fresh
            self.metrics.reloads.labels("done").inc()
            self._forget(old)
            self._name(fresh)
            task = asyncio.ensure_future(self._retire(old))
            self._leaving.add(task)
            task.add_done_callback(self._leaving.discard)
            LOG.info("reloaded: %s (version %s)", fresh.folder, fresh.version)
            return fresh

    async def _load(self) -> Loaded:
        """Open the model beside the one that serves, and start its engine."""
        if self._open is None:
            raise ConfigError("this server was started with a model, not with a path to one")
        # Checked against checksums, unlike at the start: a copy may still be under way.
        opened = await run_in_threadpool(self._open, True)
        if type(opened.model) is not self.kind:
            raise ConfigError(
                f"{opened.folder} holds another kind of model ({type(opened.model).__name__}) than is served "
                f"({self.kind.__name__}), which answers at other addresses; start a server for it"
            )
        if self._is_closed:
            raise ConfigError("the server is about to end")
        fresh = Loaded(opened, self.settings, self.metrics)
        await fresh.start()
        self._live.append(fresh)
        return fresh

    async def _retire(self, old: Loaded) -> None:
        """End a model that gets no more requests when its last answer has ended."""
        version = old.version
        await old.retire()
        self._live.remove(old)
        # Its app and engine refer to each other: the memory is free when they have been looked for.
        del old
        gc.collect()
        # glibc keeps what threads have freed, up to several models of matrices below 32 MiB.
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL(None).malloc_trim(0)
        LOG.info("version %s has answered its last request", version)

    def _name(self, loaded: Loaded) -> None:
        self.metrics.model.labels(loaded.version, loaded.folder.name).set(1)

    def _forget(self, loaded: Loaded) -> None:
        with contextlib.suppress(KeyError):  # another arm may have had the same model
            self.metrics.model.remove(loaded.version, loaded.folder.name)


async def reload_all(hosts: Iterable[Host]) -> Loaded:
    """Reload each of several hosts, also behind one that cannot; return what the first has loaded.
    Raise the first Trouble when all were tried."""
    found, refused = [], []
    for host in hosts:
        try:
            found.append(await host.reload())
        except Trouble as problem:
            refused.append(problem)
    if refused:
        raise refused[0]
    return found[0]


class Hosting(Protocol):
    """Describes what stands behind the guards: a `Host`, or what stands in its place."""

    settings: Settings
    metrics: Metrics
    log: RequestLog | None

    @property
    def kind(self) -> type[Model]:
        """What answers: a generator, an encoder, a classifier."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None: ...

    def lifespan(self, app: FastAPI) -> contextlib.AbstractAsyncContextManager[None]: ...

    def close(self, within_s: float) -> None: ...

    def reload_soon(self) -> None: ...

    async def reload(self) -> Loaded: ...


def make_front(host: Hosting) -> FastAPI:
    """Return the app at the server's address, which guards, counts and logs what goes to `host`."""
    settings = host.settings
    app = FastAPI(
        title="megalite", lifespan=host.lifespan, docs_url=None, redoc_url=None, openapi_url=None
    )
    app.state.engine = host
    app.add_middleware(
        Guards, keys=settings.keys, max_bytes=settings.max_bytes, requests_per_minute=settings.requests_per_minute,
        host=settings.host, admin_key=settings.admin_key,
    )  # fmt: skip
    # Starlette runs what is added last first: what Guards refuses is counted and logged, too.
    app.add_middleware(Noted, metrics=host.metrics, log=host.log)
    explain_errors(app)
    if settings.admin_key:

        @app.post(RELOAD)
        async def reload() -> Response:
            fresh = await host.reload()
            return as_json({"version": fresh.version, "folder": str(fresh.folder)})

        if settings.request_log and settings.log_prompts and host.kind is Generator:
            add_review(app, settings.request_log, host)
    app.mount("", host)
    return app


def host_of(model: Model, settings: Settings) -> Host:
    """Return a host of a model that is in memory already and is never swapped."""
    return Host(Opened(model, Path(settings.name), ""), settings)
