"""The queue of answers to be reviewed: those in the request log that nobody has rated yet, the ones
of which the model was least certain first. It shows what others asked, and opens to the admin's key
alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import orjson
from fastapi import FastAPI, Query
from fastapi.responses import Response
from starlette.concurrency import run_in_threadpool
from starlette.routing import Route

from megalite.infer.serving.guards import QUEUE
from megalite.infer.serving.pages import page

PAGE, RATINGS = "/review", "/v1/ratings"
MOST_BYTES = 64 << 20
"""How much of the log is read, the newest first: some 50,000 requests with their texts."""
MOST = 100
"""Answers that are sent at once."""
ENDED = ("stop", "length")
"""Why answers end that are whole, or as long as they were allowed to be."""


class Waiting(NamedTuple):
    """Holds an answer that nobody has rated yet."""

    id: str
    time: float
    """Seconds since 1970."""
    asked: dict[str, Any]
    """A rating's `messages` or `prompt`."""
    answer: str
    score: float | None
    """Mean log probability of its tokens, None where it is not known."""


def add_review(app: FastAPI, folder: Path, model: Any) -> None:
    """Add the page of the queue, and what it asks, of the request log in `folder`. Ratings go on to
    the ASGI app `model`, where all are stored."""

    @app.get(PAGE)
    async def review_page() -> Response:
        return page("review.html")

    @app.get(QUEUE)
    async def queue(limit: int = Query(20, ge=1, le=MOST)) -> Response:
        waiting = await run_in_threadpool(waiting_answers, folder)
        told = {
            "object": "list",
            "data": [each._asdict() for each in waiting[:limit]],
            "waiting": len(waiting),
        }
        return Response(orjson.dumps(told), media_type="application/json")

    class Rate:
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            await model({**scope, "path": RATINGS, "raw_path": RATINGS.encode()}, receive, send)

    # A class, for a function would be given the request instead of what ASGI has.
    app.router.routes.append(Route(QUEUE, Rate(), methods=["POST"]))


def waiting_answers(folder: Path) -> list[Waiting]:
    """Return the answers in a request log that have no rating, the least certain first, of equal ones
    the newest. Lines without texts, with several answers, or that are damaged are passed over."""
    rated: set[str] = set()
    found: list[Waiting] = []
    for row in _newest_lines(folder):
        if isinstance(row.get("of"), str):
            rated.add(row["of"])
        elif waiting := _answer_of(row):
            found.append(waiting)
    left = [each for each in found if each.id not in rated]
    # What has no score comes last.
    return sorted(left, key=lambda each: (each.score is None, each.score or 0.0, -each.time))


def _newest_lines(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of the last files, of MOST_BYTES at most."""
    left = MOST_BYTES
    # Names are dates: the order of the alphabet is that of time.
    for file in sorted(folder.glob("requests-????-??-??.jsonl"), reverse=True):
        try:
            with file.open("rb") as log:
                skipped = max(0, log.seek(0, 2) - left)
                log.seek(skipped)
                data = log.read(left)
        except OSError:
            continue  # it was too old, and is gone
        # Read from the middle, its first line is a part of one.
        lines = data.split(b"\n")
        for line in lines[1:] if skipped else lines:
            try:
                row = orjson.loads(line)
            except orjson.JSONDecodeError:
                continue
            if isinstance(row, dict):
                yield row
        left -= len(data)
        if left <= 0:
            return


def _answer_of(row: dict[str, Any]) -> Waiting | None:
    """Return the answer in a line, None where there is none to be reviewed."""
    said, finish, prompt = row.get("answers"), row.get("finish"), row.get("prompt")
    if not (isinstance(said, list) and isinstance(finish, list) and len(said) == len(finish) == 1):
        return None
    name, when, score = row.get("id"), row.get("time"), row.get("score")
    # Several servers write the log, of any version; one such line must not close the queue.
    if not (isinstance(name, str) and isinstance(said[0], str) and isinstance(when, int | float)):
        return None
    if not isinstance(score, int | float | None):
        return None
    if not prompt or not said[0].strip() or finish[0] not in ENDED:
        return None
    asked: dict[str, Any] = {"prompt": prompt}
    if str(row.get("path")).endswith("/chat/completions"):
        # A line has all messages where there is more than the one that was answered.
        asked = {"messages": row.get("messages") or [{"role": "user", "content": prompt}]}
    return Waiting(name, float(when), asked, said[0], score)
