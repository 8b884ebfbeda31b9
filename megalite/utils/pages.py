"""Tables for the console, and HTML pages that need no other file."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the rows of a table as lines, in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table as HTML. A header of empty names is left out."""
    cells = "".join(f"<th>{escape(name)}</th>" for name in header)
    head = f"<tr>{cells}</tr>" if any(header) else ""
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    return f"<table>{head}{body}</table>"


def html_picture(path: Path, name: str) -> str:
    """Return a PNG as HTML that holds it."""
    data = base64.b64encode(path.read_bytes()).decode()
    return (
        f'<div class="picture"><img alt="{escape(name)}" src="data:image/png;base64,{data}"></div>'
    )


STYLE = """
:root { color-scheme: light dark; --ink: #222; --soft: #667085; --line: #e6e6e6; --paper: #fff; --shade: #f6f6f6;
  --good: #2e7d4f; --warn: #8a6d1f; --bad: #c0392b }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ee; --soft: #98a2b3; --line: #2c3440; --paper: #14181f; --shade: #1b212a;
    --good: #5cc08a; --warn: #d9b44a; --bad: #f0826f }
}
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em;
  color: var(--ink); background: var(--paper); overflow-wrap: anywhere }
table { border-collapse: collapse; font-size: 13px; display: block; overflow-x: auto }
td, th { padding: .25em .7em; border-bottom: 1px solid var(--line); text-align: left; white-space: nowrap }
svg[viewBox] { max-width: 100%; height: auto } pre { background: var(--shade); padding: 1em; overflow-x: auto }
.picture { overflow-x: auto }
/* On a phone it is scrolled: its words would be too small to read. */
.picture img { display: block; max-width: max(100%, 720px); height: auto; border-radius: 4px }
"""


def html_page(title: str, body: str) -> str:
    """Return one HTML page that needs no other file. `body` is HTML."""
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{STYLE}</style>
<h1>{escape(title)}</h1>
{body}
</html>
"""
