"""Turning the link to the served model, and having the server read it."""

from __future__ import annotations

import json
import os
import secrets
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path

from megalite.errors import ConfigError

ADMIN_KEY_VARIABLE = "MEGALITE_ADMIN_KEY"
PATIENCE_S = 900.0
"""Time for the server to load a model."""


class Refused(Exception):
    """Raised where the server goes on with the model that it has."""


def target_of(link: Path) -> Path:
    """Return what the link to the served model leads to. Raise ConfigError where it is none."""
    if not link.is_symlink():
        raise ConfigError(
            f"served = {link}: must be a link to a model, which is turned when there is a better one: "
            f"ln -s MODEL {link}"
        )
    folder = link.resolve()
    if not folder.is_dir():
        raise ConfigError(f"served = {link} leads to {folder}, which is no folder")
    return folder


def turn(link: Path, folder: Path) -> None:
    """Let a link lead to a folder, from one moment to the next."""
    # A link cannot be changed, only replaced. The rename is atomic: a server that opens the path
    # just then finds the one model or the other.
    fresh = link.with_name(f".{link.name}.{secrets.token_hex(6)}")
    fresh.symlink_to(folder.resolve())
    try:
        os.replace(fresh, link)
    finally:
        fresh.unlink(missing_ok=True)


def admin_key(url: str) -> str:
    """Return the key by which the server at `url` is told. Raise ConfigError where there is none."""
    if key := os.environ.get(ADMIN_KEY_VARIABLE, "").strip():
        return key
    raise ConfigError(
        f"reload = {url} needs the variable {ADMIN_KEY_VARIABLE}, as the server has it"
    )


def reload(url: str) -> str:
    """Have the server at `url` read its model anew; return its version. Raise Refused where it says
    that it cannot, and ConfigError where nothing can be said of it: without a key, or an answer."""
    headers = {"authorization": f"Bearer {admin_key(url)}"}
    request = urllib.request.Request(f"{url.rstrip('/')}/admin/reload", b"", headers, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as response:
            return str(json.load(response)["version"])
    except urllib.error.HTTPError as error:
        text = error.read().decode(errors="replace")[:500]
        if error.code == 409:  # it has tried the model, and goes on with its own
            raise Refused(text) from None
        raise ConfigError(f"reload = {url}: status {error.code}: {text}") from None
    except (OSError, HTTPException, ValueError, TypeError, KeyError) as error:
        # Also what is no answer of ours: a proxy's page, or a connection that breaks off.
        why = getattr(error, "reason", None) or f"{type(error).__name__}: {error}"
        raise ConfigError(f"reload = {url}: {why}") from None
