"""Pages that commands write, on a desktop and on a phone, light and dark: nothing sticks out, and what is
in a picture can be read."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sync_api = pytest.importorskip("playwright.sync_api")
plt = pytest.importorskip("matplotlib.pyplot")
from megalite.bias.intervals import Estimate  # noqa: E402
from megalite.bias.page import STYLE, Scale, _legend, _table  # noqa: E402
from megalite.retrain.page import scale  # noqa: E402
from megalite.utils.pages import html_page, html_picture, html_table  # noqa: E402


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("there is no Chromium")
    with sync_api.sync_playwright() as tool:
        chromium = tool.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def report(tmp_path: Path) -> Path:
    """A page of all kinds of parts, each wider than a phone."""
    figure = plt.figure(figsize=(13, 5))
    figure.savefig(tmp_path / "wide.png")
    plt.close(figure)
    gain: Any = SimpleNamespace(gain=SimpleNamespace(value=0.1, low=-0.1, high=0.3))
    found = Estimate(0.5, 0.2, 0.8, 0, 0)
    parts = [
        html_picture(tmp_path / "wide.png", "losses"),
        html_table(["setting", *"abcdefghijkl"], [["model.hidden_size", *(["1.0e-4"] * 12)]]),
        scale(gain),
        STYLE + _legend() + _table(["", "items"], [("age", "7", found, 0.0)], Scale(-1, 1, 0.0)),
        f"<ul><li>{'/a-long-folder' * 20}</li></ul>",
    ]
    page = tmp_path / "page.html"
    page.write_text(html_page("a-run-of-a-long-name" * 5, "\n".join(parts)), encoding="utf-8")
    return page


@pytest.mark.parametrize(
    ("width", "scheme", "paper"),
    [(1280, "light", "rgb(255, 255, 255)"), (390, "dark", "rgb(20, 24, 31)")],
)
def test_nothing_sticks_out(
    browser: Any, report: Path, width: int, scheme: str, paper: str
) -> None:
    window = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    window.goto(report.as_uri())
    root = "document.documentElement"
    assert window.evaluate(f"{root}.scrollWidth - {root}.clientWidth") == 0
    assert window.evaluate("getComputedStyle(document.body).backgroundColor") == paper
    assert window.evaluate("document.querySelector('img').clientWidth") >= 720
    # What is drawn in a table keeps its size, within a table that is scrolled.
    assert window.evaluate("document.querySelector('td.drawn svg').clientWidth") == 420
    window.close()
