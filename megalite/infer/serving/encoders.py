"""The HTTP API of encoders and of models with classes: OpenAI's embeddings, the ranking of
documents by a query, and classes of texts."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.concurrency import run_in_threadpool

from megalite.data.formats import text_tokenizer
from megalite.errors import NotFinite
from megalite.infer.batch import NOT_FINITE
from megalite.infer.classify import (
    LABEL_NAMES,
    TASKS,
    Classifier,
    Question,
    TextVerdict,
    WordsVerdict,
)
from megalite.infer.encode import Encoder
from megalite.infer.serving.app import (
    add_models,
    add_monitoring,
    bare_app,
    check_model,
    unless_gone,
)
from megalite.infer.serving.engine import Overloaded
from megalite.infer.serving.errors import Trouble, as_json, told
from megalite.infer.serving.metrics import Metrics
from megalite.infer.serving.protocol import ClassifyBody, EmbeddingsBody, RerankBody, usage
from megalite.infer.serving.request_log import are_noted, language_of, note
from megalite.infer.serving.settings import Settings

T = TypeVar("T")
MOST_INPUTS = 2048
"""Most texts of a request, as OpenAI has it."""


class EncoderEngine:
    """Computes one request after another in a thread of its own."""

    def __init__(self, metrics: Metrics, max_waiting: int):
        """Let at most `max_waiting` requests wait."""
        self.metrics, self.max_waiting = metrics, max_waiting
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="encoder")
        self._lock = threading.Lock()
        self._num_asked, self._is_closed = 0, False
        self._began: float | None = None
        metrics.engines.append(self)

    async def run(self, work: Callable[[], T]) -> T:
        """Run `work` in the thread and return its result. Raise Overloaded if too many wait, or the
        server ends."""
        with self._lock:
            if self._is_closed:
                raise Overloaded("the server is about to end")
            # More than, for the one under way does not wait.
            if self._num_asked > self.max_waiting:
                raise Overloaded(f"{self.max_waiting} requests wait already: try again later")
            self._num_asked += 1
        # A client that goes away leaves the count as it is until its work has ended, or was never
        # begun.
        future = self._pool.submit(self._timed, work)
        future.add_done_callback(lambda _: self._ended())
        return await asyncio.wrap_future(future)

    def _timed(self, work: Callable[[], T]) -> T:
        self._began = time.monotonic()
        try:
            return work()
        finally:
            self._began = None

    def _ended(self) -> None:
        with self._lock:
            self._num_asked -= 1

    @property
    def num_slots(self) -> int:
        """Return how many requests it computes at a time."""
        return 1

    @property
    def num_busy(self) -> int:
        """Return how many requests it computes now."""
        return min(self._num_asked, 1)

    @property
    def num_waiting(self) -> int:
        """Return how many requests wait."""
        return max(self._num_asked - 1, 0)

    def trouble(self, longest_s: float) -> str:
        """Return why it answers nobody, such as a request of more than `longest_s` seconds; empty
        if all is well."""
        began = self._began
        taken = 0.0 if began is None else time.monotonic() - began
        return f"a request has not ended after {taken:.0f} s" if taken > longest_s else ""

    def close(self, within_s: float) -> None:
        """Accept no more requests; what waits is answered as long as the server lets it."""
        with self._lock:
            self._is_closed = True
        self._pool.shutdown(wait=False, cancel_futures=within_s <= 0)


async def within_time(
    request: Request, engine: EncoderEngine, settings: Settings, work: Callable[[], T]
) -> T:
    """Run `work` in the engine and return its result. Raise Trouble where it must wait, or takes,
    too long, or where the client is gone before it has begun."""
    try:
        async with asyncio.timeout(settings.timeout_s):
            return await unless_gone(request, engine.run(work))
    except Overloaded as full:
        raise Trouble(503, str(full), "server_error", code="overloaded") from None
    except TimeoutError:
        text = f"it took more than the {settings.timeout_s:g} s that this server gives a request"
        raise Trouble(504, text, "server_error", code="timeout") from None
    except NotFinite:
        raise Trouble(500, NOT_FINITE, "server_error", code="not_finite") from None


def make_serial_app(settings: Settings, metrics: Metrics) -> FastAPI:
    """Return an app with an `EncoderEngine`, and the addresses that clients and monitoring look
    at."""
    engine = EncoderEngine(metrics, settings.max_waiting)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        engine.close(0.0)
        metrics.engines.remove(engine)

    app = bare_app(engine, lifespan)
    add_models(app, settings)
    add_monitoring(app, engine, settings)
    return app


def make_encoder_app(model: Encoder | Classifier, settings: Settings, metrics: Metrics) -> FastAPI:
    """Return the ASGI app that answers with an encoder, or with a decoder that has classes."""
    app = make_serial_app(settings, metrics)
    if isinstance(model, Encoder):
        vectors = EncoderService(model, app.state.engine, settings)
        app.state.holders.append(vectors)
        _add_vectors(app, vectors)
        # The same model again, whose head for classes stands on the encoder: no memory is added.
        if model.model.config.task in TASKS:
            model = Classifier(model.model, text_tokenizer(str(model.folder)))
    if isinstance(model, Classifier):
        classes = ClassService(model, app.state.engine, settings)
        app.state.holders.append(classes)

        @app.post("/v1/classify")
        async def classify(body: ClassifyBody, request: Request) -> Response:
            return await classes.classify(body, request)

    @app.get("/v1/about")
    async def about() -> dict[str, Any]:
        return {"model": settings.name, "chat": False, "key": bool(settings.keys)}

    return app


def _add_vectors(app: FastAPI, service: EncoderService) -> None:
    """Add what every encoder answers."""

    @app.post("/v1/embeddings")
    async def embeddings(body: EmbeddingsBody, request: Request) -> Response:
        return await service.embeddings(body, request)

    @app.post("/v1/rerank")
    async def rerank(body: RerankBody, request: Request) -> Response:
        return await service.rerank(body, request)


class ClassService:
    """Turns requests for classes into the classifier's work, and its verdicts into responses."""

    def __init__(self, classifier: Classifier, engine: EncoderEngine, settings: Settings):
        self.classifier, self.engine, self.settings = classifier, engine, settings

    async def classify(self, body: ClassifyBody, request: Request) -> Response:
        """Return what the model tells of each input, in their order, in vLLM's form where it tells
        one class."""
        check_model(body.model, self.settings)
        questions = [Question(x.text, x.text_pair, tuple(x.tokens)) for x in body.inputs]
        check_count(len(questions), "input")
        cut, most = body.truncate_prompt_tokens, self.classifier.max_positions
        longest = most if cut == -1 else cut

        # Tokenized in the engine's thread, too: one queue bounds all that a request costs.
        def work() -> tuple[int, list[TextVerdict | WordsVerdict]]:
            rows = [self.classifier.row(each, longest) for each in questions]
            return sum(len(row.ids) for row in rows), self.classifier.classify_rows(questions, rows)

        with told("input"):
            num_tokens, verdicts = await within_time(request, self.engine, self.settings, work)
        _note_verdicts(num_tokens, verdicts, questions)
        data = [{"index": index} | self._entry(each) for index, each in enumerate(verdicts)]
        head = {
            "id": f"classify-{secrets.token_hex(12)}",
            "object": "list",
            "created": int(time.time()),
        }
        counts = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
        named = {"model": self.settings.name, "classes": [*self.classifier.labels]}
        return as_json(head | named | {"data": data, "usage": counts})

    def _entry(self, verdict: TextVerdict | WordsVerdict) -> dict[str, Any]:
        """Return a verdict's entry in `data`; `probs` are in the order of `classes`."""
        if isinstance(verdict, WordsVerdict):
            return verdict._asdict()
        entry = {LABEL_NAMES[self.classifier.problem]: verdict.label}
        if not verdict.scores:
            return entry
        probs = [verdict.scores[name] for name in self.classifier.labels]
        return entry | {"probs": probs, "num_classes": len(probs)}


def _note_verdicts(
    num_tokens: int, verdicts: Sequence[TextVerdict | WordsVerdict], asked: Sequence[Question]
) -> None:
    """Note how sure the model is: the mean probability of the classes that it tells."""
    if not are_noted():
        return
    scores = [max(x.scores.values()) for x in verdicts if isinstance(x, TextVerdict) and x.scores]
    texts = " ".join(each.text or " ".join(each.words) for each in asked)
    note(
        prompt_tokens=num_tokens,
        score=sum(scores) / len(scores) if scores else None,
        language=language_of(texts),
    )


class EncoderService:
    """Turns request bodies into the encoder's work, and its results into responses."""

    def __init__(self, encoder: Encoder, engine: EncoderEngine, settings: Settings):
        self.encoder, self.engine, self.settings = encoder, engine, settings
        self.size: int = encoder.model.config.hidden_size
        # A folder that pools in an unknown way is refused now, not when a client asks.
        _ = encoder.pooling

    async def embeddings(self, body: EmbeddingsBody, request: Request) -> Response:
        """Return a vector for each input, in their order."""
        check_model(body.model, self.settings)
        if (body.dimensions or 0) > self.size:
            raise _wrong(
                f"the model has {self.size} dimensions, fewer than {body.dimensions}", "dimensions"
            )
        check_count(len(body.inputs), "input")

        def work() -> tuple[list[list[int]], npt.NDArray[np.float32]]:
            rows = self._rows(body)
            return rows, self.encoder.embed_rows(rows)

        rows, vectors = await within_time(request, self.engine, self.settings, work)
        note(prompt_tokens=sum(map(len, rows)))
        # In another thread: thousands of vectors are millions of numbers to write.
        return await run_in_threadpool(self._told, body, rows, vectors)

    def _told(
        self, body: EmbeddingsBody, rows: list[list[int]], vectors: npt.NDArray[np.float32]
    ) -> Response:
        """Return the response with the vectors [n, D] of rows of tokens."""
        if body.dimensions:
            vectors = vectors[:, : body.dimensions]
            if self.encoder.pooling.normalize:
                # Cut (Matryoshka: Kusupati et al. 2022) they are shorter than 1.
                vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(min=1e-12)
        data = [
            {
                "object": "embedding",
                "index": index,
                "embedding": _encoded(vector, body.encoding_format),
            }
            for index, vector in enumerate(vectors)
        ]
        counts = usage(sum(map(len, rows)), 0)
        del counts["completion_tokens"]
        return as_json(
            {"object": "list", "data": data, "model": self.settings.name, "usage": counts}
        )

    async def rerank(self, body: RerankBody, request: Request) -> Response:
        """Return the documents by how well they go with the query: what a cross-encoder tells of
        both, or the cosine of their vectors."""
        check_model(body.model, self.settings)
        texts = body.texts
        check_count(len(texts), "documents")

        def work() -> tuple[npt.NDArray[np.float32], int]:
            if self.encoder.scores_pairs:
                return self.encoder.scores(body.query, texts)
            rows = self.encoder.rows([body.query, *texts], self.encoder.longest)
            query, *documents = self.encoder.embed_rows(rows, normalize=True)
            return np.stack(documents) @ query, sum(map(len, rows))

        scores, num_tokens = await within_time(request, self.engine, self.settings, work)
        note(prompt_tokens=num_tokens)
        # Stable: of equal ones the document that came first; numpy's usual order is any.
        order = np.argsort(-scores, kind="stable")[: body.top_n]
        results = [
            {"index": int(index), "relevance_score": float(scores[index])}
            | ({"document": {"text": texts[index]}} if body.return_documents else {})
            for index in order
        ]
        head = {"id": f"rerank-{secrets.token_hex(12)}", "model": self.settings.name}
        return as_json({**head, "results": results, "usage": {"total_tokens": num_tokens}})

    def _rows(self, body: EmbeddingsBody) -> list[list[int]]:
        """Return the tokens of each input. Raise Trouble for one that is empty, too long or of
        unknown tokens."""
        encoder, cut = self.encoder, body.truncate_prompt_tokens
        longest = encoder.longest if cut in (None, -1) else min(cut or 0, encoder.longest)
        rows = [encoder.rows([each])[0] if isinstance(each, str) else each for each in body.inputs]
        for row in rows:
            if not row or not 0 <= min(row) <= max(row) < encoder.model.config.vocab_size:
                raise _wrong(
                    "a list of token ids is empty, or has an id outside of the vocabulary", "input"
                )
            if cut is None and len(row) > longest:
                text = f"an input has {len(row):,} tokens, but the model takes {longest:,}"
                raise Trouble(
                    400, text, "invalid_request_error", "input", "context_length_exceeded"
                )
        return [_cut(row, longest) for row in rows]


def _cut(row: list[int], longest: int) -> list[int]:
    """Return a row of at most `longest` tokens, with the token that ends it."""
    return row if len(row) <= longest else [*row[: longest - 1], row[-1]]


def check_count(count: int, param: str) -> None:
    """Raise Trouble for more texts than a request may have."""
    if count > MOST_INPUTS:
        raise _wrong(
            f"{count:,} texts are asked for at once; a request may have {MOST_INPUTS:,}", param
        )


def _wrong(text: str, param: str) -> Trouble:
    return Trouble(400, text, "invalid_request_error", param)


def _encoded(vector: npt.NDArray[np.float32], form: str) -> list[float] | str:
    """Return a vector as numbers, or as base64 of its little-endian fp32 bytes."""
    if form == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return vector.tolist()
