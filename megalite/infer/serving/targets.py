"""The HTTP API of encoder-decoders: OpenAI's completions, whose prompts are sources."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response

from megalite.infer.sampling import Sampling
from megalite.infer.seq2seq import TargetGenerator
from megalite.infer.serving.app import Events, add_pages, check_model
from megalite.infer.serving.encoders import EncoderEngine, make_serial_app, within_time
from megalite.infer.serving.errors import Trouble, as_event, as_json, told
from megalite.infer.serving.metrics import Metrics
from megalite.infer.serving.protocol import CompletionBody, Reply, usage, wrap
from megalite.infer.serving.request_log import note
from megalite.infer.serving.settings import Settings


def make_target_app(
    generator: TargetGenerator, settings: Settings, metrics: Metrics, version: str
) -> FastAPI:
    """Return the ASGI app that answers sources with `generator`."""
    app = make_serial_app(settings, metrics)
    service = TargetService(generator, app.state.engine, settings, version)
    app.state.holders.append(service)

    @app.post("/v1/completions")
    async def completions(body: CompletionBody, request: Request) -> Response:
        return await service.complete(body, request)

    add_pages(app, settings, generator.folder, chat=False, answers_sources=True)
    return app


class Deadline:
    """Ends work that nobody waits for any more."""

    def __init__(self, seconds: float):
        self.ends = time.monotonic() + seconds

    def check(self) -> None:
        """Raise TimeoutError where it is over."""
        if time.monotonic() > self.ends:
            raise TimeoutError


class TargetService:
    """Turns bodies of completions into sources, and their targets into responses."""

    def __init__(
        self,
        generator: TargetGenerator,
        engine: EncoderEngine,
        settings: Settings,
        version: str,
    ):
        self.generator, self.engine, self.settings = generator, engine, settings
        self.version = version

    async def complete(self, body: CompletionBody, request: Request) -> Response:
        """Answer a completion request. Choice n of all draws with the seed and n. A stream has each
        target in one piece."""
        check_model(body.model, self.settings)
        count = len(body.prompts) * body.n
        if count > self.settings.max_waiting:
            raise self._wrong(
                f"{count} answers are asked for at once; this server gives at most {self.settings.max_waiting}",
                "n",
            )
        if body.logprobs is not None:
            raise self._wrong(
                "an encoder-decoder's completions have no logprobs: leave it out", "logprobs"
            )
        deadline = Deadline(self.settings.timeout_s)

        def work() -> tuple[int, list[list[int]]]:
            sources = [
                self.generator.source_ids(x) if isinstance(x, str) else x for x in body.prompts
            ]
            sampling, most = self._sampling(body), body.max_tokens
            found = self.generator.generate(
                sources, most, sampling, body.beams, body.n, deadline.check
            )
            return sum(map(len, sources)), found

        try:
            with told("prompt"):
                num_prompt, targets = await within_time(request, self.engine, self.settings, work)
        finally:
            # Work under way finds at its next token that nobody waits any more.
            deadline.ends = 0.0
        reply = Reply("cmpl", self.settings.name, str, self.version, body.tells_usage)
        num_said = sum(map(len, targets))
        note(id=reply.head["id"], prompt_tokens=num_prompt, completion_tokens=num_said)
        choices = [self._choice(reply, body, *each) for each in enumerate(targets)]
        counts = usage(num_prompt, num_said)
        if not body.stream:
            return as_json(reply.whole(choices, counts))
        return Events(_stream(reply, body, choices, counts), lambda: None)

    def _sampling(self, body: CompletionBody) -> Sampling:
        """Return how the model chooses tokens: as the body says, else as its folder does."""
        seed = secrets.randbits(62) if body.seed is None else body.seed
        [first, *_] = body.requests([], 1, self.generator.habits.sampling, None)
        return replace(first.sampling, seed=wrap(seed))

    def _choice(
        self, reply: Reply, body: CompletionBody, index: int, ids: list[int]
    ) -> dict[str, Any]:
        """Return the entry of a target, which ends before the first of the stop strings."""
        text = self.generator.tokenizer.decode_plain(ids)
        stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
        ends = [at for stop in stops if (at := text.find(stop)) >= 0]
        is_cut = len(ids) == min(body.max_tokens, self.generator.max_positions) and not ends
        finish = "length" if is_cut else "stop"
        return reply.choice(
            index, text[: min(ends, default=None)], None, finish, streamed=body.stream
        )

    def _wrong(self, text: str, param: str) -> Trouble:
        return Trouble(400, text, "invalid_request_error", param)


async def _stream(
    reply: Reply, body: CompletionBody, choices: list[dict[str, Any]], counts: dict[str, int]
) -> AsyncIterator[bytes]:
    """Yield the server-sent events of a response."""
    for choice in choices:
        yield as_event(reply.piece([choice]))
    if body.tells_usage:
        yield as_event(reply.piece([], counts))
    yield b"data: [DONE]\n\n"
