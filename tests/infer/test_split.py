"""Two models behind one address: who is answered by which, and a shadow that nobody notices."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai")
pytest.importorskip("fastapi")

import httpx
from local_server import PATIENCE_S, Gated, Local, opened, running

from megalite.errors import ConfigError
from megalite.infer.seq2seq import TargetGenerator
from megalite.infer.serving.front import Host
from megalite.infer.serving.settings import Settings
from megalite.infer.serving.split import Split, falls_to_challenger, make_hosting


def hosting(folder: Path, other: Gated, share: float, shadow: bool, **settings: Any) -> Any:
    one = Gated(b"one")
    one.run()
    asked = Settings("tiny", folder / "ratings", request_log=folder / "log", **settings)
    first, second = opened(one, "first"), opened(other, "second")
    return make_hosting(asked, lambda _: first, lambda _: second, share, shadow)


def say(local: Local, key: str = "", **more: Any) -> httpx.Response:
    headers = {"x-split-key": key} if key else {}
    body = {"prompt": "x", "max_tokens": 3} | more
    url = f"{local.url}/v1/completions"
    return httpx.post(url, json=body, headers=headers, verify=False, timeout=PATIENCE_S)


def lines_when(folder: Path, done: Callable[[list[dict[str, Any]]], bool]) -> list[dict[str, Any]]:
    ends = time.monotonic() + PATIENCE_S
    while time.monotonic() < ends:
        texts = [file.read_text() for file in (folder / "log").glob("*.jsonl")]
        rows = [json.loads(line) for text in texts for line in text.splitlines()]
        if done(rows):
            return rows
        time.sleep(0.01)
    raise AssertionError(rows)


def test_shares_are_kept_and_grow_by_clients_alone() -> None:
    keys = [f"client {n}".encode() for n in range(20_000)]
    tenth, third = ([falls_to_challenger(key, share) for key in keys] for share in (0.1, 0.3))
    # Four standard deviations of a binomial.
    assert abs(sum(tenth) / len(keys) - 0.1) < 0.0085
    assert abs(sum(third) / len(keys) - 0.3) < 0.013
    assert not any(was and not now for was, now in zip(tenth, third, strict=True))
    assert all(falls_to_challenger(key, 1.0) for key in keys)


def test_a_client_is_always_answered_by_the_same_model(tmp_path: Path) -> None:
    two = Gated(b"two")
    two.run()
    keys = [f"user {n}" for n in range(12)]
    with running(hosting(tmp_path, two, 0.5, False)) as local:
        said = {
            key: {say(local, key).json()["choices"][0]["text"] for _ in range(3)} for key in keys
        }
        wanted = {key: {"two" if falls_to_challenger(key.encode(), 0.5) else "one"} for key in keys}
        assert said == wanted
        assert {*map(frozenset, said.values())} == {frozenset({"one"}), frozenset({"two"})}
        # Without the header all of an address, or of an API key, are one client.
        assert len({say(local).json()["system_fingerprint"] for _ in range(4)}) == 1
        body = {"prompt": "x", "answer": "two", "rating": "up"}
        mine = next(key for key in keys if said[key] == {"two"})
        headers = {"x-split-key": mine}
        httpx.post(f"{local.url}/v1/ratings", json=body, headers=headers, verify=False)
        local.until("megalite_slots 2.0", 'megalite_model{folder="second",version="second"} 1.0')
    rows = lines_when(tmp_path, lambda rows: len(rows) == 41)
    assert {(row["arm"], row["version"]) for row in rows} == {("a", "first"), ("b", "second")}
    arms = Counter(row["arm"] for row in rows[:36])
    assert arms["b"] == 3 * sum(texts == {"two"} for texts in said.values())
    assert rows[-1]["arm"] == "b"


def test_a_shadow_is_asked_the_same_and_nobody_waits_for_it(tmp_path: Path) -> None:
    slow = Gated(b"two")
    with running(hosting(tmp_path, slow, 1.0, True)) as local:
        done = say(local)
        streamed = say(local, stream=True)
        assert done.json()["choices"][0]["text"] == "one"
        events = [json.loads(line[6:]) for line in streamed.text.split("\n\n")[:-2]]
        assert "".join(event["choices"][0]["text"] for event in events) == "one"
        rows = lines_when(tmp_path, lambda rows: len(rows) == 2)
        assert {row["arm"] for row in rows} == {"a"}
        slow.run()
        rows = lines_when(tmp_path, lambda rows: len(rows) == 4)
        local.until('megalite_answers_total{finish="length"} 2.0', "megalite_slots 1.0")
        wrong = say(local, temperature=-1)
        assert wrong.status_code == 400
        rows = lines_when(tmp_path, lambda rows: len(rows) == 6)
    shadows = [row for row in rows if row["arm"] == "shadow"]
    assert {row["of"] for row in shadows[:2]} == {row["id"] for row in rows if "id" in row} - {
        row["id"] for row in shadows[:2]
    }
    assert [(row["version"], row["status"]) for row in shadows] == [
        ("second", x) for x in (200, 200, 400)
    ]
    assert shadows[0]["completion_tokens"] == 3
    assert {row["client"] for row in rows} == {rows[0]["client"]}


def test_a_shadow_that_fails_or_is_late_harms_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("the shadow's own")

    broken = Gated(b"two")
    monkeypatch.setattr(broken, "predict", fail)
    with running(hosting(tmp_path, broken, 1.0, True)) as local:
        assert say(local).json()["choices"][0]["text"] == "one"
        rows = lines_when(tmp_path, lambda rows: len(rows) == 2)
        assert rows[1]["status"] == 500
        assert httpx.get(f"{local.url}/health", verify=False).status_code == 200
    late = Gated(b"two")
    with running(hosting(tmp_path / "late", late, 1.0, True)) as local:
        # More than may be under way: the others are not asked.
        said = [say(local).json()["choices"][0]["text"] for _ in range(10)]
        assert said == ["one"] * 10


def test_mistakes_are_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--share 0: give a number above 0"):
        hosting(tmp_path, Gated(b"two"), 0.0, False)
    asked = Settings("tiny", tmp_path)
    first = opened(Gated(b"one"))
    with pytest.raises(ConfigError, match="give --request-log DIR, too"):
        make_hosting(asked, lambda _: first, lambda _: first, 0.1, True)
    one, other = (Host(opened(Gated(b"x"), name), asked) for name in ("first", "t5"))
    other.current.kind = TargetGenerator
    with pytest.raises(ConfigError, match=r"--challenger t5 holds another kind of model \(Target"):
        Split(one, other, 0.1, False)
