"""URLs: names of files that are not on this machine."""

from __future__ import annotations

import re

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def is_url(path: str) -> bool:
    """Return whether a path names something in a store, as `s3://bucket/data/a` does."""
    return _URL.match(path) is not None


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
