"""The HTTP API: OpenAI's completions and chat completions, ratings, health, metrics and a web
page."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import orjson
from fastapi import FastAPI, Request
from fastapi.responses import Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from megalite.errors import DataError
from megalite.infer import answer as answers
from megalite.infer.batch import NOT_FINITE
from megalite.infer.generate import Generator
from megalite.infer.serving.engine import Engine, Overloaded, Ticket, Told, Update
from megalite.infer.serving.errors import (
    Trouble,
    as_event,
    as_json,
    explain_errors,
    server_mistake,
    told,
)
from megalite.infer.serving.guards import CLIENT, QUEUE
from megalite.infer.serving.lanes import BYTES_PER_TOKEN, Lanes
from megalite.infer.serving.logs import AsJson
from megalite.infer.serving.metrics import Metrics
from megalite.infer.serving.pages import origin_of, page
from megalite.infer.serving.protocol import Asked, ChatBody, CompletionBody, Reply, usage
from megalite.infer.serving.ratings import RatingBody, Ratings
from megalite.infer.serving.request_log import RequestLog, are_noted, language_of, note
from megalite.infer.serving.settings import Settings

T = TypeVar("T")
LOG = logging.getLogger("megalite.serve")


def make_app(generator: Generator, settings: Settings, metrics: Metrics, version: str) -> FastAPI:
    """Return the ASGI app that answers with `generator`, of the given `version`. Its engine thread
    runs between startup and shutdown."""
    engine, ratings = Engine(generator, metrics, settings.max_waiting), Ratings(settings.ratings)
    service = Service(engine, settings, version)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        # `Server.handle_exit` closed it before, with a grace period that is over by now; an app
        # that runs without `Server`, as in tests, has nobody else who does.
        engine.close(0.0)
        service.lanes.close()
        await run_in_threadpool(engine.join, 10.0)

    app = bare_app(engine, lifespan)
    app.state.holders.append(service)
    _add_api(app, service, ratings)
    add_pages(app, settings, generator.folder, service.chats)
    add_models(app, settings)
    add_monitoring(app, engine, settings)
    return app


def bare_app(engine: Any, lifespan: Callable[[FastAPI], Any]) -> FastAPI:
    """Return an app without routes that tells errors in OpenAI's form. `engine` is what computes or
    has others compute: it has `metrics` and `close`."""
    app = FastAPI(
        title="megalite", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None
    )
    app.state.engine = engine
    app.state.holders = [engine]
    """What refers to the model, for `front.Loaded` to empty."""
    explain_errors(app)
    return app


def add_models(app: FastAPI, settings: Settings) -> None:
    """Add what tells clients the model's name."""
    created = int(time.time())
    told = {
        name: {"id": name, "object": "model", "created": created, "owned_by": "megalite"}
        for name in (settings.name, *settings.beside)
    }

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": list(told.values())}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if name not in settings.beside:
            check_model(name, settings)
        return told[name or settings.name]


def check_model(name: str, settings: Settings) -> None:
    """Raise Trouble for the name of a model that this server does not have. An empty name is
    accepted."""
    if name not in ("", settings.name):
        names = ", ".join(map(repr, (settings.name, *settings.beside)))
        text = f"the model {name!r} does not exist; this server has {names}"
        raise Trouble(404, text, "invalid_request_error", "model", "model_not_found")


def add_monitoring(app: FastAPI, engine: Any, settings: Settings) -> None:
    """Add what monitoring looks at."""

    @app.get("/health")
    async def health() -> Response:
        trouble = engine.trouble(settings.timeout_s)  # longest step: no answer may take longer
        return as_json({"status": trouble or "ok"}, 503 if trouble else 200)

    @app.get("/metrics")
    async def prometheus() -> Response:
        return Response(generate_latest(engine.metrics.registry), media_type=CONTENT_TYPE_LATEST)


def _add_api(app: FastAPI, service: Service, ratings: Ratings) -> None:
    """Add the addresses that OpenAI's API has, and that of ratings."""

    @app.post("/v1/completions")
    async def completions(body: CompletionBody, request: Request) -> Response:
        return await service.complete(body, request)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        return await service.chat(body, request)

    @app.post("/v1/ratings", status_code=201)
    async def rate(body: RatingBody) -> dict[str, str]:
        check_model(body.model, service.settings)
        await service.check_rating(body)
        try:
            await run_in_threadpool(ratings.add, body, service.settings.name)
        except OSError as problem:
            LOG.error("a rating could not be kept in %s: %s", ratings.folder, problem)
            raise Trouble(
                500, "the rating could not be kept; the server's log says why", "server_error"
            ) from None
        service.engine.metrics.ratings.labels(body.kind).inc()
        note(rating=body.kind, of=body.id)
        return {"object": "rating", "rating": body.kind}


def add_pages(
    app: FastAPI,
    settings: Settings,
    folder: Path | None,
    chat: bool,
    answers_sources: bool = False,
) -> None:
    """Add what people look at. `folder` is the model's. A model either has chats, or goes on with
    texts; where it `answers_sources`, a text is no beginning but a source."""
    origin = origin_of(folder)
    if settings.keys:
        origin["prompts"] = []  # not for those without a key

    @app.get("/v1/about")
    async def about() -> dict[str, Any]:
        """Return what the page must know before it has a key."""
        told = {"model": settings.name, "chat": chat, "key": bool(settings.keys)}
        return told | {"sources": answers_sources} | origin

    @app.get("/")
    async def main_page() -> Response:
        return page("page.html")


class Service:
    """Turns request bodies into requests to the engine, and its updates into responses."""

    def __init__(self, engine: Engine, settings: Settings, version: str):
        self.engine, self.settings, self.generator = engine, settings, engine.generator
        self.version = version
        self.lanes = Lanes(settings.max_bytes)
        try:
            self.chats = bool(self.generator.chat_template)
            _ = self.generator.turn_end  # computed and cached now, not while clients wait
        except DataError as problem:
            # Only its text: the error itself would keep the generator, as far as handlers keep it.
            LOG.warning("no chats, only completions: %s", str(problem))
            self.chats = False

    def _check_chats(self) -> None:
        """Raise Trouble if the model has no chat template."""
        if not self.chats:
            text = f"the model {self.settings.name!r} has no chat template; use /v1/completions"
            raise Trouble(400, text, "invalid_request_error", "messages")

    async def check_rating(self, body: RatingBody) -> None:
        """Check that finetuning can learn from the rating, since one unreadable row would stop it
        for all. Raise Trouble."""
        if body.messages is None or body.good is None:
            return
        self._check_chats()
        messages = [*body.asked, {"role": "assistant", "content": body.good}]
        await self._beside(
            lambda: self.generator.check_answer(messages), _size_of(messages), "messages"
        )

    async def complete(self, body: CompletionBody, request: Request) -> Response:
        """Answer a completion request."""
        check_model(body.model, self.settings)
        self._check_count(len(body.prompts) * body.n)
        # From the cheapest check to the dearest: a count, bytes, tokens, and what the engine knows.
        sizes = [len(prompt.encode()) for prompt in body.prompts if isinstance(prompt, str)]
        self._check_fits(max(sizes, default=0), "prompt")
        prompts = await self._beside(
            lambda: [self.generator.prompt_ids(prompt) for prompt in body.prompts],
            sum(sizes),
            "prompt",
        )
        requests = [
            one
            for ids in prompts
            for one in body.requests(ids, body.max_tokens, self.generator.sampling, body.logprobs)
        ]
        return await self._answer(body, requests, sum(map(len, prompts)), "cmpl", request)

    def _check_count(self, count: int) -> None:
        """Raise Trouble if more answers are requested at once than the queue can hold, before any
        work is done for them."""
        if count > self.settings.max_waiting:
            most = self.settings.max_waiting
            text = (
                f"{count} answers are asked for at once; this server gives at most {most} answers"
            )
            raise Trouble(400, text, "invalid_request_error", "n")

    def _check_fits(self, num_bytes: int, param: str) -> None:
        """Raise Trouble for a text that cannot fit the model, judged by its bytes: tokenizing it
        only to find out would cost others time and memory."""
        capacity = self.generator.model.capacity
        if num_bytes > BYTES_PER_TOKEN * capacity:
            text = (
                f"the {param} has {num_bytes:,} bytes; prompt and answer may have {capacity:,} tokens together, and a "
                f"prompt at most {BYTES_PER_TOKEN} bytes for each of them"
            )
            raise Trouble(400, text, "invalid_request_error", param, "context_length_exceeded")

    async def _beside(self, work: Callable[[], T], num_bytes: int, param: str) -> T:
        """Run `work` on a text of `num_bytes` bytes in another thread, so that other requests are
        served meanwhile. Errors name `param`. Raise Trouble."""
        try:
            with told(param):
                return await self.lanes.run(work, num_bytes)
        except Overloaded as full:
            raise Trouble(503, str(full), "server_error", code="overloaded") from None

    async def chat(self, body: ChatBody, request: Request) -> Response:
        """Answer a chat completion request."""
        check_model(body.model, self.settings)
        if body.top_logprobs is not None and not body.logprobs:
            raise Trouble(
                400, "top_logprobs needs logprobs: true", "invalid_request_error", "top_logprobs"
            )
        self._check_chats()
        self._check_count(body.n)
        messages = [{"role": message.role, "content": message.text} for message in body.messages]
        num_bytes = _size_of(messages)
        self._check_fits(num_bytes, "messages")
        ids = await self._beside(lambda: self.generator.chat_ids(messages), num_bytes, "messages")
        # A prompt that leaves no room is refused with its numbers when the engine checks it, not
        # here.
        room = self.generator.model.capacity - len(ids)
        usual = self.generator.habits.most_tokens(len(ids), max(room, 1))
        # OpenAI renamed max_tokens for chats; clients of both ages are served.
        most = body.max_completion_tokens or body.max_tokens or usual
        # 0: those of the chosen tokens alone, without alternatives.
        num_logprobs = (body.top_logprobs or 0) if body.logprobs else None
        requests = [
            self.generator.as_chat(r)
            for r in body.requests(ids, most, self.generator.sampling, num_logprobs)
        ]
        return await self._answer(body, requests, len(ids), "chatcmpl", request)

    async def _answer(
        self,
        body: Asked,
        requests: Sequence[answers.Request],
        num_prompt: int,
        kind: Literal["cmpl", "chatcmpl"],
        request: Request,
    ) -> Response:
        """Submit the requests and return the response, streamed or whole. `num_prompt` is the
        number of prompt tokens."""
        if self.settings.log_prompts:
            LOG.info("prompt %s", AsJson(body.model_dump(exclude_none=True)))
        if are_noted():
            # Only where a line is written of it: it takes a sum over the vocabulary for each token.
            requests = [replace(each, scored=True) for each in requests]
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Told]()

        def deliver(told: Told) -> None:
            # Called in the engine's thread; an asyncio queue may only be touched in its loop.
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(queue.put_nowait, told)

        try:
            with told("prompt" if kind == "cmpl" else "messages"):
                tickets = self.engine.submit(
                    requests, self.settings.timeout_s, body.stream, deliver
                )
        except Overloaded as full:
            raise Trouble(503, str(full), "server_error", code="overloaded") from None
        reply = Reply(
            kind,
            self.settings.name,
            self.generator.token_text,
            self.version,
            body.tells_usage,
            self.generator.token_bytes,
        )
        if are_noted():
            said = partial(_facts_of, tickets, self.settings.log_prompts)
            note(said, id=reply.head["id"], prompt_tokens=num_prompt, **self._facts_asked(body))
        updates = _updates(queue, len(tickets))
        if body.stream:
            pieces = self._stream(body, reply, tickets, updates, num_prompt)
            # The engine ignores tickets that have ended.
            return Events(pieces, lambda: self.engine.cancel(tickets))
        try:
            ended = await unless_gone(request, _ends_of(updates))
        finally:
            self.engine.cancel(tickets)
        # In another thread: with logprobs a body may have a million parts, and the loop answers all.
        return await run_in_threadpool(_whole_of, reply, ended, num_prompt)

    def _facts_asked(self, body: Asked) -> dict[str, Any]:
        """Return what a request's line tells of the question: its language, and where texts may be
        logged the last message, or the prompt."""
        if isinstance(body, ChatBody):
            text = body.messages[-1].text
        else:
            prompts = body.prompts if isinstance(body, CompletionBody) else []
            text = "\n".join(each for each in prompts if isinstance(each, str))
        facts: dict[str, Any] = {"language": language_of(text)}
        if not self.settings.log_prompts:
            return facts
        # Whoever reviews the answer must see all that it answers.
        if isinstance(body, ChatBody) and len(body.messages) > 1:
            facts["messages"] = [{"role": x.role, "content": x.text} for x in body.messages]
        return facts | {"prompt": text}

    async def _stream(
        self,
        body: Asked,
        reply: Reply,
        tickets: Sequence[Ticket],
        updates: AsyncIterator[tuple[Ticket, Update]],
        num_prompt: int,
    ) -> AsyncIterator[bytes]:
        """Yield the server-sent events of a streamed response."""
        try:
            # As OpenAI's: a chat's first piece names the role and says nothing.
            if reply.chat:
                for ticket in tickets:
                    yield as_event(reply.piece([reply.opening(ticket.number)]))
            async for ticket, update in updates:
                _raise_cut(ticket, update)
                choice = reply.choice(
                    ticket.number, update.text, update.choices, update.finish, streamed=True
                )
                yield as_event(reply.piece([choice]))
            if body.tells_usage:
                num_said = sum(len(ticket.answer.tokens) for ticket in tickets)
                # As OpenAI's: the last piece has the counts and no choices.
                yield as_event(reply.piece([], usage(num_prompt, num_said)))
        except Trouble as trouble:
            # Status 200 has been sent by now, so that an error can only be one more event.
            yield as_event(trouble.body)
        yield b"data: [DONE]\n\n"


def _whole_of(reply: Reply, ended: Mapping[Ticket, Update], num_prompt: int) -> Response:
    """Return the response that is not streamed, given each ticket's last update. Raise Trouble for
    an answer that is not complete."""
    choices, num_said = [], 0
    for ticket in sorted(ended, key=lambda each: each.number):
        last, answer = ended[ticket], ticket.answer
        _raise_cut(ticket, last)
        tokens = None if answer.request.num_logprobs is None else last.choices
        choice = reply.choice(ticket.number, answer.text, tokens, last.finish, streamed=False)
        # Written one by one: with logprobs a choice's objects take several times its bytes.
        choices.append(orjson.Fragment(orjson.dumps(choice)))
        num_said += len(answer.tokens)
    return as_json(reply.whole(choices, usage(num_prompt, num_said)))


def _size_of(messages: Sequence[Mapping[str, str]]) -> int:
    """Return the bytes of the messages' texts, plus a constant for each message, since an empty one
    is work too."""
    return sum(len(message["content"].encode()) + BYTES_PER_TOKEN for message in messages)


class Events(StreamingResponse):
    """Streams events, and calls `close` at the end in any case, even if the client is gone before
    the first event."""

    def __init__(self, pieces: AsyncIterator[bytes], close: Callable[[], object]):
        # "x-accel-buffering" keeps nginx from holding events back until its buffer is full.
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(pieces, media_type="text/event-stream", headers=headers)
        self._close = close

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()


def _facts_of(tickets: Sequence[Ticket], with_texts: bool) -> dict[str, Any]:
    """Return what a request's line tells of its answers. `score` is the mean log probability of
    their tokens."""
    found = [ticket.answer for ticket in tickets]
    num_tokens = sum(len(answer.tokens) for answer in found)
    firsts = [ticket.first_token_s for ticket in tickets if ticket.first_token_s is not None]
    facts = {
        "completion_tokens": num_tokens,
        "finish": [answer.finish or "cancelled" for answer in found],
        "first_token_s": min(firsts, default=None),
        "score": sum(answer.logprob for answer in found) / num_tokens if num_tokens else None,
    }
    return facts | ({"answers": [answer.text for answer in found]} if with_texts else {})


def _raise_cut(ticket: Ticket, update: Update) -> None:
    """Raise Trouble for an answer that ended without being complete."""
    match update.finish:
        case "time":
            raise Trouble(
                504,
                "the answer took longer than this server allows",
                "server_error",
                code="timeout",
            )
        case "cancelled":
            raise Trouble(503, "the server is about to end", "server_error", code="shutting_down")
        case "not_finite":
            raise Trouble(500, NOT_FINITE, "server_error", code="not_finite")
        case "failed":
            raise Trouble(500, "the model failed; the server's log says why", "server_error")


async def _updates(
    queue: asyncio.Queue[Told], running: int
) -> AsyncIterator[tuple[Ticket, Update]]:
    """Yield the updates until all `running` answers have ended."""
    while running:
        for ticket, update in await queue.get():
            yield ticket, update
            running -= update.finish is not None


async def _ends_of(updates: AsyncIterator[tuple[Ticket, Update]]) -> dict[Ticket, Update]:
    """Return each ticket's last update."""
    return {ticket: update async for ticket, update in updates}


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """Return the result of `work`. Raise Trouble, which nobody is there to read, and cancel the work
    if the client disconnects first."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    # Whichever ends first: an answer that nobody waits for must not keep its slot.
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
    finally:
        working.cancel()
        leaving.cancel()
    # nginx's status for a client that closed the connection.
    raise Trouble(499, "the client is gone", "invalid_request_error")


class Noted:
    """ASGI middleware that counts and logs each request when it has ended. It logs no headers,
    bodies or query strings, which may hold secrets."""

    def __init__(self, app: Any, metrics: Metrics, log: RequestLog | None = None):
        self.app, self.metrics, self.log = app, metrics, log

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.monotonic(), 0
        facts = self.log.begin() if self.log and is_logged(scope) else None

        async def sending(message: Any) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self.app(scope, receive, sending)
        except asyncio.CancelledError:
            status = status or 499
            raise
        except ClientDisconnect:
            status = status or 499
        except Exception:
            LOG.exception("%s %s failed", scope["method"], scope["path"])
            # A response that has begun cannot be replaced.
            if not status:
                status = 500
                await server_mistake()(scope, receive, send)
        finally:
            seconds = time.monotonic() - began
            # The route, not the requested path: labels must be few.
            path = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(path, str(status)).inc()
            self.metrics.seconds.labels(path).observe(seconds)
            client = (scope.get("client") or ("?",))[0]
            LOG.info("%s %s %s %d %.3f s", client, scope["method"], path, status, seconds)
            if self.log and facts is not None:
                key = scope.get(CLIENT) or client.encode()
                times = {"time": time.time() - seconds, "seconds": seconds}
                self.log.end(facts, key, **times, path=path, status=status)


def is_logged(scope: Any) -> bool:
    """Return whether a request's line is written: where a model is asked, or rated."""
    return bool(scope["method"] == "POST" and scope["path"].startswith(("/v1/", QUEUE)))
