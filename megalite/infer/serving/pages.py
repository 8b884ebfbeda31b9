"""Web pages as one file each: the stylesheet and scripts that stand beside a page are put into it."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import re
from pathlib import Path
from typing import Any

from fastapi.responses import HTMLResponse

from megalite.checkpoint.folder import step_of
from megalite.errors import ConfigError
from megalite.utils.resources import read_yaml

FOLDER = Path(__file__).parent
MOST_PROMPTS, LONGEST_PROMPT = 4, 300
_STYLES = re.compile(r'<link rel="stylesheet" href="([\w.-]+)">')
_SCRIPTS = re.compile(r'<script src="([\w.-]+)"></script>')


def page(name: str) -> HTMLResponse:
    """Return the page of the file `name` of this folder.

    Its content security policy lets it load nothing from elsewhere, be framed by no other page, and
    run no script but its own: these are named by their hashes, and no text is parsed as HTML."""
    scripts: list[str] = []

    def script(found: re.Match[str]) -> str:
        scripts.append("\n" + _text(found[1]))
        return f"<script>{scripts[-1]}</script>"

    text = _STYLES.sub(lambda found: f"<style>\n{_text(found[1])}</style>", _text(name))
    text = _SCRIPTS.sub(script, text)
    hashes = " ".join(f"'sha256-{_hash(each)}'" for each in scripts) or "'none'"
    # Hashes instead of 'unsafe-inline': text of a model that became a script would not run.
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src {hashes}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    )
    headers = {
        "content-security-policy": policy,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }
    return HTMLResponse(text, headers=headers)


def origin_of(folder: Path | None) -> dict[str, Any]:
    """Return what the page tells of where the model in `folder` comes from: the step of its
    checkpoint, None for what is none, and the prompts whose answers its run recorded."""
    step = step_of(folder) if folder else None
    prompts: list[str] = []
    if folder and step is not None:
        # A checkpoint that was copied away has no run above it.
        with contextlib.suppress(ConfigError, LookupError, TypeError):
            asked = read_yaml(folder.resolve().parents[1] / "config.yaml")
            prompts = [
                prompt
                for prompt in asked["observe"]["samples"]["prompts"]
                if isinstance(prompt, str) and 0 < len(prompt) <= LONGEST_PROMPT
            ]
    return {"step": step, "prompts": prompts[:MOST_PROMPTS]}


def _text(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
