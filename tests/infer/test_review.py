"""The queue of answers to be reviewed: what nobody has rated, the least certain first, for the admin
alone."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("openai")
pytest.importorskip("fastapi")

import httpx
from local_server import PATIENCE_S, Gated, Local, serving

from megalite.infer.serving import review
from megalite.infer.serving.app import Service
from megalite.infer.serving.protocol import ChatBody
from megalite.infer.serving.review import waiting_answers

ADMIN, KEY = "the-admins-key", "a-clients-key"
OPTIONS: dict[str, Any] = {"keys": [KEY], "admin_key": ADMIN, "log_prompts": True}


@pytest.fixture
def local(tmp_path: Path) -> Iterator[Local]:
    model = Gated(b"said")
    model.run()
    with serving(model, tmp_path / "ratings", **OPTIONS, request_log=tmp_path / "log") as found:
        yield found


def line(number: int, score: float | None, **more: Any) -> dict[str, Any]:
    return {
        "path": "/v1/completions", "time": 100.0 + number, "id": f"r{number}", "prompt": f"asked {number}",
        "answers": [f"said {number}"], "finish": ["stop"], "score": score,
    } | more  # fmt: skip


def write(folder: Path, day: int, *rows: Any, end: str = "\n") -> None:
    folder.mkdir(exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / f"requests-2026-01-{day:02}.jsonl").write_text("\n".join(lines) + end)


def test_what_nobody_has_rated_waits_the_least_certain_first(tmp_path: Path) -> None:
    write(tmp_path, 1, line(1, -0.5), line(2, -2.0), line(3, -1.0), line(4, None))
    write(
        tmp_path, 2,
        line(5, -3.0), {"path": "/v1/ratings", "rating": "up", "of": "r2"}, line(6, -1.0),
        line(7, -9.0, answers=["a", "b"], finish=["stop"] * 2), line(8, -9.0, finish=["cancelled"]),
        line(9, -9.0, answers=[" "]), {"path": "/v1/embeddings", "id": "e", "status": 200},
        {"path": "/v1/completions", "id": "r10", "score": -9.0, "finish": ["stop"]},  # without texts
        line(11, -9.0, time="x"), line(12, None) | {"score": "x"}, line(13, -9.0, answers=[5]), line(14, -9.0, id=None),
        '{"id": "r11", "answ', "[]",
    )  # fmt: skip
    (tmp_path / "salt").write_text("x")
    found = waiting_answers(tmp_path)
    assert [each.id for each in found] == ["r5", "r6", "r3", "r1", "r4"]
    assert found[0] == ("r5", 105.0, {"prompt": "asked 5"}, "said 5", -3.0)


def test_of_a_long_log_the_newest_lines_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 1, *(line(number, -1.0) for number in range(50)))
    write(tmp_path, 2, *(line(number, -1.0) for number in range(50, 60)))
    whole = (tmp_path / "requests-2026-01-02.jsonl").stat().st_size
    monkeypatch.setattr(review, "MOST_BYTES", whole + 500)
    found = {each.id for each in waiting_answers(tmp_path)}
    assert {f"r{number}" for number in range(50, 60)} < found
    assert 11 <= len(found) <= 13  # and what whole lines 500 bytes of the file before have


def test_a_chats_messages_are_all_there(tmp_path: Path) -> None:
    """Rated without them, an answer would be learned as one to another question."""
    messages = [{"role": role, "content": role} for role in ("system", "user", "assistant", "user")]
    body = ChatBody(model="tiny", messages=messages)
    service = SimpleNamespace(settings=SimpleNamespace(log_prompts=True))
    facts = Service._facts_asked(service, body)  # type: ignore[arg-type]
    path = "/v1/chat/completions"
    write(tmp_path, 1, line(1, -1.0, path=path) | facts, line(2, -0.5, path=path))
    found = [each.asked for each in waiting_answers(tmp_path)]
    assert found == [{"messages": messages}, {"messages": [{"role": "user", "content": "asked 2"}]}]
    service.settings.log_prompts = False
    assert not {"prompt", "messages"} & Service._facts_asked(service, body).keys()  # type: ignore[arg-type]


def test_the_queue_opens_to_the_admin_alone(local: Local, tmp_path: Path) -> None:
    local.client(KEY).completions.create(model="tiny", prompt="asked", max_tokens=4)
    asked = {
        key: httpx.get(
            f"{local.url}/admin/review", headers={"authorization": f"Bearer {key}"}, verify=False
        )
        for key in (ADMIN, KEY, "wrong")
    }
    assert [answer.status_code for answer in asked.values()] == [200, 401, 401]
    assert all("asked" not in asked[key].text for key in (KEY, "wrong"))
    options = (
        OPTIONS | {"admin_key": ""},
        OPTIONS | {"log_prompts": False},
        {"admin_key": ADMIN, "log_prompts": True, "request_log": None},
    )
    for number, more in enumerate(options):
        given = {"request_log": tmp_path / "other"} | more
        with serving(Gated(b"said"), tmp_path / f"ratings{number}", **given) as other:
            headers = {"authorization": f"Bearer {ADMIN if more['admin_key'] else KEY}"}
            for path in ("/admin/review", "/review"):
                answer = httpx.get(f"{other.url}{path}", headers=headers, verify=False)
                assert answer.status_code == 404


def test_the_queue_in_a_browser(local: Local, tmp_path: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api")
    browser = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if browser is None:
        pytest.skip("no Chromium on this machine")
    rows = [line(number, score) for number, score in enumerate((-1.0, -4.0, -2.0, -3.0))]
    rows[1]["answers"] = ["<b>bold</b>\n  said"]
    today = time.strftime("requests-%Y-%m-%d.jsonl", time.gmtime())  # an older one would be deleted
    (tmp_path / "log" / today).write_text("".join(json.dumps(row) + "\n" for row in rows))
    with playwright.sync_playwright() as tool:
        page = tool.chromium.launch(executable_path=browser, args=["--no-sandbox"]).new_page()
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(f"{local.url}/review")
        page.fill("#key", ADMIN)
        page.click("text=Open")
        page.wait_for_selector(".said")
        page.set_viewport_size({"width": 390, "height": 844})
        clip = "getComputedStyle(document.querySelector('h1')).clipPath"
        assert page.evaluate(clip) == "none", "a phone shows what waits"
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        assert page.inner_text("#count") == "4 wait"
        assert page.text_content(".said") == "<b>bold</b>\n  said", "it is text, not markup"
        assert page.is_hidden("#entry")
        page.click("text=Good")
        page.wait_for_selector(".said:has-text('said 3')")
        page.fill("[aria-label=Correction]", "better said")
        page.click("text=Bad")
        page.wait_for_selector("text=There is a correction")
        page.click("text=Take the correction")
        page.wait_for_selector(".said:has-text('said 2')")
        page.click("text=Skip")
        page.wait_for_selector(".said:has-text('said 0')")
        page.click("text=Bad")
        page.wait_for_selector("text=Nothing waits")
        assert page.inner_text("#count") == "1 waits"
        ends = time.monotonic() + PATIENCE_S
        while (tmp_path / "log" / today).read_text().count('"of"') < 3 and time.monotonic() < ends:
            time.sleep(0.01)
        page.reload()
        page.wait_for_selector(".said:has-text('said 2')")
        assert page.inner_text("#count") == "1 waits"
        assert not problems
    good = [json.loads(each) for each in (tmp_path / "ratings" / "completion.jsonl").open()]
    assert [(row["prompt"], row["completion"]) for row in good] == [
        ("asked 1", "<b>bold</b>\n  said"), ("asked 3", "better said")
    ]  # fmt: skip
    [pair] = map(json.loads, (tmp_path / "ratings" / "preference.jsonl").open())
    assert (pair["chosen"], pair["rejected"]) == ("better said", "said 3")
    [bad] = map(json.loads, (tmp_path / "ratings" / "rejected.jsonl").open())
    assert bad["rejected"] == "said 0"
