"""The page in Chromium, with a server of canned answers: Markdown, what a hostile text can do, turns
that are edited and answered again, what a reload keeps, several models, the keyboard alone, two
widths and two schemes."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sync_api = pytest.importorskip("playwright.sync_api")
pytest.importorskip("fastapi")
from megalite.infer.serving.pages import FOLDER, origin_of, page  # noqa: E402

URL = "http://localhost:9"
READY = ".turn:last-child [aria-label='Answer again']"


class Canned:
    """Answers the page's requests: the n-th to a model with the n-th text of its script."""

    def __init__(self) -> None:
        self.about: dict[str, Any] = {
            "model": "tiny",
            "chat": True,
            "key": False,
            "sources": False,
            "step": 12345,
            "prompts": [],
        }
        self.scripts: dict[str, list[str]] = {"tiny": []}
        self.asked: list[dict[str, Any]] = []

    def __call__(self, route: Any) -> None:
        path = route.request.url.removeprefix(URL)
        if path == "/":
            made = page("page.html")
            route.fulfill(body=bytes(made.body), headers=dict(made.headers))
        elif path == "/v1/about":
            route.fulfill(json=self.about)
        elif path == "/v1/models":
            route.fulfill(json={"data": [{"id": name} for name in self.scripts]})
        elif path == "/v1/ratings":
            self.asked.append(json.loads(route.request.post_data))
            route.fulfill(status=201, json={})
        else:
            body = json.loads(route.request.post_data)
            self.asked.append(body)
            route.fulfill(
                headers={"content-type": "text/event-stream"}, body=self.answer(body["model"])
            )

    def answer(self, model: str) -> str:
        text = self.scripts[model].pop(0)
        events: list[Any] = [
            {
                "id": f"chatcmpl-{text}",
                "system_fingerprint": f"v{self.about['step']}",
                "choices": [{"delta": {"content": text[at : at + 5]}, "finish_reason": None}],
            }
            for at in range(0, len(text), 5)
        ]
        last = {"id": f"chatcmpl-{text}", "system_fingerprint": f"v{self.about['step']}"}
        events.append(last | {"choices": [{"delta": {}, "finish_reason": "stop"}]})
        events.append(last | {"choices": [], "usage": {"completion_tokens": 7}})
        lines = [f"data: {json.dumps(event)}\n\n" for event in events]
        return "".join([*lines, "data: [DONE]\n\n"])


Open = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if path is None:
        pytest.skip("no Chromium on this machine")
    with sync_api.sync_playwright() as tool:
        chromium = tool.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def canned() -> Canned:
    return Canned()


@pytest.fixture
def opened(browser: Any, canned: Canned) -> Iterator[Open]:
    """Opens the page in a window of its own. No test may leave an error on it."""
    contexts, problems = [], []

    def opens(**options: Any) -> Any:
        context = browser.new_context(**options)
        contexts.append(context)
        made = context.new_page()
        made.set_default_timeout(20_000)
        made.on("pageerror", lambda error: problems.append(str(error)))
        made.on("dialog", lambda dialog: problems.append(dialog.message))
        made.route("**/*", canned)
        made.goto(URL + "/")
        made.wait_for_selector(".samples, .turn")
        return made

    yield opens
    for context in contexts:
        context.close()
    assert not problems


def says(window: Any, text: str) -> None:
    window.fill("#prompt", text)
    window.keyboard.press("Enter")
    window.wait_for_selector(READY)


def html_of(window: Any, text: str) -> str:
    """What a text becomes."""
    script = "text => { const box = document.createElement('div'); box.append(markdown(text)); return box.innerHTML; }"
    made = window.evaluate(script, text)
    return re.sub(r' (target|rel|title|type|aria-label|class)="[^"]*"', "", made)


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("# A\n## B ##\nC", "<h1>A</h1><h2>B</h2><p>C</p>"),
        ("one\ntwo\n\nthree", "<p>one\ntwo</p><p>three</p>"),
        ("**a *b***", "<p><strong>a <em>b</em></strong></p>"),
        ("***a*** ~~b~~ `c*d*`", "<p><strong><em>a</em></strong> <del>b</del> <code>c*d*</code></p>"),
        ("snake_case_name 2*3*4 * x * \\*y\\*", "<p>snake_case_name 2*3*4 * x * *y*</p>"),
        ("**open and `open", "<p>**open and `open</p>"),
        (
            "- a\n- b\n  - c\n\n  d\n- e",
            "<ul><li><p>a</p></li><li><p>b</p><ul><li><p>c</p></li></ul><p>d</p></li>"
            "<li><p>e</p></li></ul>",
        ),
        ("3. a\n4. b", '<ol start="3"><li><p>a</p></li><li><p>b</p></li></ol>'),
        ("> a\n> > b", "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote>"),
        (
            "a | b\n--|-:\n1 | `2`\n3",
            "<div><table><thead><tr><th>a</th><th>b</th></tr></thead>"
            "<tbody><tr><td>1</td><td><code>2</code></td></tr></tbody></table></div><p>3</p>",
        ),
        (
            "```py\nx < 1\n\n  y\n```\n---",
            "<div><div><span>py</span><button>Copy</button></div>"
            "<pre><code>x &lt; 1\n\n  y</code></pre></div><hr>",
        ),
        (
            "```\nnot closed",
            "<div><div><span></span><button>Copy</button></div><pre><code>not closed</code></pre></div>",
        ),
        ("[a](https://b.c/d_(e) \"t\"), https://f.g/h.", '<p><a href="https://b.c/d_(e)">a</a>, <a href="https://f.g/h">https://f.g/h</a>.</p>'),
        ("![a](https://b.c/d.png)", '<p><a href="https://b.c/d.png">a</a></p>'),
        ("<b onclick=x>a</b> &lt;", "<p>&lt;b onclick=x&gt;a&lt;/b&gt; &amp;lt;</p>"),
        (
            "[a](javascript:alert(1)) [b](data:text/html,c) [d](/v1/models)",
            "<p>[a](javascript:alert(1)) [b](data:text/html,c) [d](/v1/models)</p>",
        ),
    ],
)  # fmt: skip
def test_markdown_becomes_elements(window: Any, text: str, html: str) -> None:
    assert html_of(window, text) == html


@pytest.fixture(scope="module")
def window(browser: Any) -> Iterator[Any]:
    """The page, for tests that only have texts made to elements."""
    made = browser.new_page()
    made.route("**/*", Canned())
    made.goto(URL + "/")
    yield made
    made.close()


@pytest.mark.parametrize(
    "text", ["[", "**a ", "*a _b ", "`" * 3 + "a` ", "> ", "- ", "![a](", "|-\n", "1. "]
)
def test_no_text_stops_the_page(window: Any, text: str) -> None:
    """Where time grows with the square of a text, these take minutes."""
    window.set_default_timeout(20_000)
    script = "text => { const began = performance.now(); markdown(text); return performance.now() - began; }"
    assert window.evaluate(script, text * 30_000) < 5_000


def test_what_a_model_says_cannot_act(opened: Open, canned: Canned) -> None:
    """No text is parsed as HTML, and were one, its scripts would not run."""
    attack = (
        "<script>alert(1)</script><img src=x onerror=alert(2)><a href='javascript:alert(3)'>x</a>"
    )
    canned.scripts["tiny"] = [attack, f"```{attack}\n{attack}\n```"]
    window = opened()
    says(window, attack)
    says(window, "more")
    assert window.locator("#talk script, #talk img, #talk [href^=javascript]").count() == 0
    assert window.inner_text(".answer .text >> nth=0") == attack
    parsed = "() => { document.querySelector('#talk').innerHTML = '<i>x</i>'; }"
    script = (
        "() => { const made = document.createElement('script'); made.text = 'window.ran = 1'; "
        "document.body.append(made); }"
    )
    for forbidden in (parsed, script):
        with pytest.raises(sync_api.Error, match=r"TrustedHTML|TrustedScript"):
            window.evaluate(forbidden)
    for file in ("page.js", "markdown.js"):
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function",
            (FOLDER / file).read_text(),
        )


def test_a_talk_is_edited_answered_again_and_kept_over_a_reload(
    opened: Open, canned: Canned
) -> None:
    canned.scripts["tiny"] = ["First.", "Second.", "Another second.", "Edited.", "Last."]
    window = opened()
    assert "step 12,345" in window.inner_text("header")
    window.click("#gear")
    window.fill("#system", "Be brief.")
    says(window, "One?")
    says(window, "Two?")
    assert "7 tokens" in window.inner_text(".pace >> nth=0")
    window.click(READY)
    window.wait_for_selector("text=2/2")
    assert window.inner_text(".answer .text >> nth=1") == "Another second."
    window.click("[aria-label='The version before']")
    assert window.inner_text(".answer .text >> nth=1") == "Second."
    window.click("[aria-label='Good answer'] >> nth=1")
    window.wait_for_selector("text=Thank you, noted")
    rated = canned.asked[-1]
    assert (rated["answer"], rated["rating"], len(rated["messages"])) == ("Second.", "up", 4)
    assert (rated["id"], rated["model"]) == ("chatcmpl-Second.", "tiny")

    window.reload()
    window.wait_for_selector("text=1/2")
    assert window.input_value("#system") == "Be brief."
    assert window.inner_text(".turn:last-child .user .text") == "Two?"
    assert window.locator(".turn:last-child .chosen.up").count() == 1, "rated once"

    canned.about["step"] = 67890  # the server has loaded another
    window.click("[aria-label='Edit your message'] >> nth=0")
    assert "what came after it goes" in window.inner_text(".editor")
    window.fill("[aria-label='Your message']", "One, really?")
    window.click(".editor >> text=Send")
    window.wait_for_selector("text=Edited.")
    window.wait_for_selector(READY)
    window.wait_for_selector("header >> text=step 67,890")
    assert window.locator(".turn").count() == 1
    heard = [(message["role"], message["content"]) for message in canned.asked[-1]["messages"]]
    assert heard == [("system", "Be brief."), ("user", "One, really?")]

    window.click("#fresh")
    window.reload()
    window.wait_for_selector(".samples")
    window.click(".samples button >> nth=0")
    window.wait_for_selector("text=Last.")


def test_everything_by_the_keyboard(opened: Open, canned: Canned) -> None:
    canned.scripts["tiny"] = ["```\ncode\n```", "Again.", "After the edit."]
    window = opened()
    press = window.keyboard.press

    def tab_to(label: str) -> None:
        for _ in range(30):
            found = window.evaluate(
                "() => document.activeElement.getAttribute('aria-label') || document.activeElement.textContent"
            )
            if found == label:
                return
            press("Shift+Tab")
        raise AssertionError(f"no way to {label!r}")

    window.keyboard.type("Hello")
    press("Enter")
    window.wait_for_selector(READY)
    tab_to("Answer again")
    press("Enter")
    window.wait_for_selector("text=2/2")
    tab_to("The version before")
    press("Enter")
    window.wait_for_selector("text=1/2")
    tab_to("Copy the code")
    window.context.grant_permissions(["clipboard-read", "clipboard-write"])
    press("Enter")
    window.wait_for_selector(".copied")
    assert window.evaluate("navigator.clipboard.readText()") == "code"
    tab_to("Settings")
    press("Enter")
    assert window.is_visible("#temperature")
    press("Escape")
    assert not window.is_visible("#temperature")
    window.focus("#prompt")
    press("ArrowUp")
    assert window.input_value("[aria-label='Your message']") == "Hello"
    press("Escape")
    assert window.locator(".editor").count() == 0
    press("ArrowUp")
    window.focus("#prompt")
    press("ArrowUp")
    window.keyboard.type("!")
    press("Control+Enter")
    window.wait_for_selector("text=After the edit.")
    assert window.inner_text(".user .text") == "Hello!"


def test_several_models_answer_side_by_side(opened: Open, canned: Canned) -> None:
    """Each has heard its own answers."""
    canned.scripts = {"tiny": ["A one.", "A two."], "tuned": ["B one.", "B two."]}
    window = opened(viewport={"width": 1200, "height": 800})
    window.click(".models >> text=tuned")
    for text in ("One?", "Two?"):
        says(window, text)
        window.wait_for_selector(f"{READY} >> nth=1")
    boxes = [each.bounding_box() for each in window.locator(".turn:last-child .answer").all()]
    assert boxes[0]["y"] == boxes[1]["y"]
    assert boxes[0]["x"] < boxes[1]["x"]
    assert window.locator(".turn:last-child .who").all_inner_texts() == ["tiny", "tuned"]
    for body in canned.asked[-2:]:
        letter = {"tiny": "A", "tuned": "B"}[body["model"]]
        assert [message["content"] for message in body["messages"]] == [
            "One?",
            f"{letter} one.",
            "Two?",
        ]
    window.set_viewport_size({"width": 390, "height": 800})
    boxes = [each.bounding_box() for each in window.locator(".turn:last-child .answer").all()]
    assert boxes[0]["x"] == boxes[1]["x"], "one above the other on a phone"


@pytest.mark.parametrize("width", [1180, 360])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_and_can_be_read(opened: Open, canned: Canned, width: int, scheme: str) -> None:
    canned.about["model"] = "a-run-with-a-rather-long-name"
    canned.scripts = {
        canned.about["model"]: [
            "| a | b |\n|--|--|\n" + "| 1 | 2 |\n" * 3 + "\n```\n" + "x" * 300 + "\n```"
        ]
    }
    window = opened(viewport={"width": width, "height": 800}, color_scheme=scheme)
    says(window, "y" * 300)
    assert window.evaluate("document.documentElement.scrollWidth") <= width
    assert window.evaluate("document.querySelector('#scroll').scrollWidth") <= width
    columns = window.evaluate(
        "[...document.querySelectorAll('.column:not(.fields)')].map(box => box.getBoundingClientRect().width)"
    )
    assert max(columns) - min(columns) <= 16, (
        "header, talk and field are as wide, but for a bar to scroll"
    )
    assert window.is_visible("text=step 12,345")
    for ink, paper in (
        ("ink", "paper"),
        ("soft", "paper"),
        ("soft", "shade"),
        ("accent", "paper"),
        ("bad", "paper"),
        ("on-accent", "accent"),
        ("ink", "user"),
    ):
        assert contrast(window, ink, paper) >= 4.5, f"{ink} on {paper}: WCAG's AA"


def contrast(window: Any, *names: str) -> float:
    """The ratio of WCAG 2.2 between two of the page's colors."""
    found = []
    for name in names:
        digits = (
            window.evaluate(
                f"getComputedStyle(document.documentElement).getPropertyValue('--{name}')"
            )
            .strip()
            .lstrip("#")
        )
        digits = digits if len(digits) == 6 else "".join(2 * digit for digit in digits)
        parts = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
        light = [
            part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
        ]
        found.append(0.2126 * light[0] + 0.7152 * light[1] + 0.0722 * light[2])
    return (max(found) + 0.05) / (min(found) + 0.05)


def test_the_page_knows_the_step_and_the_prompts_of_the_run(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints" / "step-00000040"
    folder.mkdir(parents=True)
    assert origin_of(folder) == {"step": 40, "prompts": []}, "without a readable config"
    (tmp_path / "run" / "config.yaml").write_text(
        "observe: {samples: {prompts: [Once upon, '', " + "x" * 400 + ", b, c, d, e]}}\n"
    )
    assert origin_of(folder) == {"step": 40, "prompts": ["Once upon", "b", "c", "d"]}
    assert origin_of(tmp_path) == origin_of(None) == {"step": None, "prompts": []}
