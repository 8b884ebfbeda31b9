"""Called by mkdocs for each page: what links to a file of the repository, which is no page of the site,
becomes its path, and long keys in tables may break between their words."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
KEY = re.compile(r"(?<=<td><code>)[\w.\[\]]+(?=</code></td>)")
LINK = re.compile(r"\[([^\]]*)\]\(((?!https?://|#)[^)\s#]*)(#[^)\s]*)?\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Return the page's text with links that leave docs/ as the path of what they name. Links to
    what is not there are left to mkdocs, which refuses them."""
    folder = (ROOT / "docs" / page.file.src_path).parent

    def plain(link: re.Match[str]) -> str:
        target = (folder / link[2]).resolve()
        if target.is_relative_to(ROOT / "docs") or not target.exists():
            return link[0]
        path = str(target.relative_to(ROOT))
        text = link[1].strip("`")
        return f"`{path}`" if path.endswith(text) else f"{link[1]} (`{path}`)"

    return LINK.sub(plain, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Return the page with a place to break behind each dot and underscore of a key in a table, whose
    column would be as wide as the longest key."""
    return KEY.sub(lambda key: re.sub(r"([._])(?=\w)", r"\1<wbr>", key[0]), html)
