"""URLs: names of files that are not on this machine."""

from __future__ import annotations

import re

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def is_url(path: str) -> bool:
    """Return whether a path names something in a store, as `s3://bucket/data/a` does."""
    return _URL.match(path) is not None


_VARIABLE = re.compile(r"\$[A-Za-z_][A-Za-z0-9_]*")
_SECRET_PATH = re.compile(
    r"https?://([^/]*\.)?(hooks\.slack\.com|discord(app)?\.com|webhook\.office\.com|logic\.azure\.com|chat\.googleapis\.com)(:\d+)?/"
    r"|https?://[^/]+/([^?#]*/)?(web)?hooks?/\w{10,}",
    re.IGNORECASE,
)
"""Webhooks whose path lets anybody write who knows it."""


def check_webhook(address: str) -> None:
    """Refuse what is neither $NAME nor an http(s):// URL, and a URL that is a secret. Raises
    ValueError, which does not repeat it."""
    if not address or _VARIABLE.fullmatch(address):
        return
    if not address.startswith(("http://", "https://")):
        raise ValueError(
            "must be an http:// or https:// URL, or $NAME for that environment variable"
        )
    check_no_secret(address)
    if _SECRET_PATH.match(address):
        raise ValueError(
            "whoever knows this URL can write there, and configs and logs repeat it: put it into an environment "
            "variable, and give its name, as $SLACK_WEBHOOK"
        )


def check_no_secret(url: str) -> None:
    """Refuse a URL with a password or a signature, since configs, notes and messages repeat it.
    Raises ValueError, which does not repeat it."""
    protocol, _, rest = url.partition("://")
    user, at, _ = rest.partition("/")[0].rpartition("@")
    if (at and ":" in user) or ("?" in rest and protocol in ("http", "https")):
        raise ValueError(
            f"a {protocol}:// URL holds a password or a signature, which would be written to logs and configs; leave "
            "it out and give credentials through the environment (AWS_ACCESS_KEY_ID and so on)"
        )
