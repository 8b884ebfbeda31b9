"""Keys, tokens and passwords, which must not be written down, in whatever text they turn up."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

_NAME = re.compile(
    r"(?i)(^|[_.-])(api_?key|\w*key|key_id|token|secret|password|passwd|credentials?|connection_string)$"
)
_SHORTEST = 6
"""Characters. What is shorter is found in innocent words."""
_PASSWORD = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://[^\s/@:]*):([^\s/@]+)@")
_SIGNED = re.compile(r"(?i)\b(x-amz-\w[\w-]*|x-goog-\w[\w-]*|sig|signature|access_token|token)=[^&\s'\"<>]+")


def names_a_secret(name: str) -> bool:
    """Whether a setting or an environment variable of that name holds one."""
    return _NAME.search(name) is not None


def hide_secrets(text: str) -> str:
    """The text without the secrets of this process's environment, and without those of any URL."""
    for value, name in sorted(_secrets(), key=lambda found: -len(found[0])):
        text = text.replace(value, f"<{name}>")
    return _SIGNED.sub(r"\1=<hidden>", _PASSWORD.sub(r"\1:<password>@", text))


def _secrets() -> Iterator[tuple[str, str]]:
    for name, value in os.environ.items():
        found = [match[2] for match in _PASSWORD.finditer(value)]  # of a proxy
        found += [value] if names_a_secret(name) else []
        yield from ((secret, name) for secret in found if len(secret) >= _SHORTEST)
