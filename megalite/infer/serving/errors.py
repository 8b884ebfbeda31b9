"""Errors in OpenAI's form: what is wrong with a request, in plain words, and the JSON that is
sent."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import orjson
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from megalite.errors import ConfigError
from megalite.infer.batch import NoRoom
from megalite.infer.serving.guards import Refused
from megalite.infer.serving.protocol import error

PLAINLY = {
    "model_attributes_type": "must be a JSON object",
    "model_type": "must be a JSON object",
    "dict_type": "must be a JSON object",
    "list_type": "must be a list",
    "string_type": "must be a text",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "string_unicode": "must be a text; half of a surrogate pair is none",
    "missing": "is required",
}
"""Plain words for pydantic's errors, which speak of Python's types."""
# Pydantic's "Input should be at most 16" is sent as "must be at most 16".
SHOULD = re.compile(r"^(Input|String|List|Dictionary|Value) should")
KINDS = {400: "invalid_request_error", 404: "invalid_request_error", 405: "invalid_request_error"}


class Trouble(Exception):
    """Raised for an error that is sent to the client in OpenAI's form."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str,
        param: str | None = None,
        code: str | None = None,
    ):
        super().__init__(message)
        self.status, self.body = status, error(message, kind, param, code)


@contextlib.contextmanager
def told(param: str) -> Iterator[None]:
    """Turn a ConfigError into Trouble for the client that sent the request; `param` names the
    field."""
    try:
        yield
    except ConfigError as problem:
        code = "context_length_exceeded" if isinstance(problem, NoRoom) else None
        raise Trouble(400, str(problem), "invalid_request_error", param, code) from None


def explain_errors(app: FastAPI) -> None:
    """Register handlers that send every error in OpenAI's form."""

    @app.exception_handler(Trouble)
    async def trouble(request: Request, problem: Trouble) -> Response:
        # As `Guards` and a full server say it: clients that try again by themselves wait so long.
        headers = {"retry-after": "1"} if problem.body["error"]["code"] == "overloaded" else None
        return as_json(problem.body, problem.status, headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, problem: RequestValidationError) -> Response:
        """Report the first mistake, without the value: it may be a secret, and clients may log the
        message."""
        first = problem.errors()[0]
        place = _place(problem.body, first["loc"][1:], first["type"] == "missing")
        if first["type"] == "json_invalid":
            return as_json(error("the body is not valid JSON", "invalid_request_error"), 400)
        what = PLAINLY.get(first["type"]) or SHOULD.sub(
            "must", first["msg"].removeprefix("Value error, ")
        )
        if first["type"] == "extra_forbidden":
            what = "is not known or not supported"
        # Fields like `tools`, which protocol.py accepts empty only.
        elif first.get("ctx", {}).get("max_length") == 0:
            what = "is not supported: leave it out"
        elif not place and "json" not in request.headers.get("content-type", ""):
            what = "must be JSON, and the header Content-Type: application/json say so"
        param = ".".join(place) or None
        return as_json(error(f"{param or 'the body'}: {what}", "invalid_request_error", param), 400)

    @app.exception_handler(Exception)
    async def mistake(request: Request, problem: Exception) -> Response:
        """Answer in this form, too. The error goes on to `Noted`, which logs it."""
        return server_mistake()

    @app.exception_handler(HTTPException)
    async def http(request: Request, problem: HTTPException) -> Response:
        kind = KINDS.get(problem.status_code, "server_error")
        body = problem.body if isinstance(problem, Refused) else error(str(problem.detail), kind)
        # Such as Allow of 405, which HTTP asks for, and Retry-After.
        return as_json(body, problem.status_code, problem.headers)


def _place(body: Any, location: Sequence[str | int], is_missing: bool) -> list[str]:
    """Return the path of the faulty field in the body, without pydantic's own markers for union
    types."""
    place = []
    for number, part in enumerate(location):
        if isinstance(body, dict) and part in body:
            body = body[part]
        elif isinstance(body, list) and isinstance(part, int):
            body = body[part] if part < len(body) else None
        elif not (is_missing and number == len(location) - 1):
            continue
        place.append(str(part))
    return place


def server_mistake() -> Response:
    return as_json(error("the server made a mistake; its log says which", "server_error"), 500)


def as_json(body: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(orjson.dumps(body), status, headers, media_type="application/json")


def as_event(body: Any) -> bytes:
    return b"data: " + orjson.dumps(body) + b"\n\n"
