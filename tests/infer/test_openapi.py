"""The server under requests made from its own description, valid and not: it makes no mistake."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("openai")
pytest.importorskip("fastapi")
pytest.importorskip("schemathesis")

import httpx
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from local_server import Local, serving
from schemathesis.checks import not_a_server_error

from chats import write_tokenizer
from megalite.data.tokenizer import load_tokenizer
from megalite.infer.generate import Generator
from megalite.infer.sampling import Sampling
from scripted import Scripted

OPERATIONS = (
    "POST /v1/completions", "POST /v1/chat/completions", "POST /v1/ratings", "GET /v1/models", "GET /v1/models/{name}",
    "GET /v1/about", "GET /health", "GET /metrics", "GET /",
)  # fmt: skip


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Local]:
    folder = write_tokenizer(tmp_path_factory.mktemp("model"))
    tokenizer = load_tokenizer(folder)
    model = Scripted(tokenizer.encode("hello, one two"))
    model.capacity = 32  # type: ignore[misc]
    generator = Generator(model, tokenizer, sampling=Sampling(temperature=0), folder=folder)
    with serving(generator, folder / "ratings", log_prompts=True, max_waiting=8) as found:
        yield found


def test_all_is_described(local: Local) -> None:
    described = {
        f"{verb.upper()} {path}"
        for path, verbs in local.host.current.app.openapi()["paths"].items()
        for verb in verbs
    }
    assert described == set(OPERATIONS)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_no_request_is_answered_by_500(
    local: Local, operation: str, pytestconfig: pytest.Config, caplog: pytest.LogCaptureFixture
) -> None:
    verb, path = operation.split()
    schema = schemathesis.openapi.from_dict(local.host.current.app.openapi())
    kinds = schemathesis.GenerationMode
    whole = pytestconfig.getoption("--whole")
    checked = settings(
        max_examples=(1000 if whole else 8) if verb == "POST" else 10, deadline=None, database=None,
        derandomize=not whole, phases=(Phase.explicit, Phase.generate), suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    statuses: set[int] = set()
    with httpx.Client(verify=False, base_url=local.url, timeout=60) as client:
        for mode in (kinds.POSITIVE, kinds.NEGATIVE) if verb == "POST" else (kinds.POSITIVE,):

            def check(case: Any) -> None:
                # By another name there is none, and no more of the request would be looked at.
                if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
                    case.body["model"] = "tiny"
                response = case.call(base_url=local.url, timeout=60)
                statuses.add(response.status_code)
                case.validate_response(response, checks=[not_a_server_error])
                if response.status_code >= 400 and "json" in response.headers["content-type"]:
                    assert set(response.json()["error"]) == {"message", "type", "param", "code"}

            strategy = schema[path][verb].as_strategy(generation_mode=mode)
            checked(given(case=strategy)(check))()
        assert client.get("/health").status_code == 200
    assert statuses & {200, 201} or "{name}" in path, "what is described is answered"
    assert "Traceback" not in caplog.text
