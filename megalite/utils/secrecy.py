"""Hide keys, tokens and passwords, which must not be written down, in whatever text they turn
up."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

_NAME = re.compile(
    r"(?i)(^|[_.-])(api_?key|\w*key|key_id|token|secret|password|passwd|credentials?|connection_string|webhook(_url)?)$"
)
_SHORTEST = 6
"""Least characters of a secret. Shorter ones are found in innocent words."""
_PASSWORD = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://[^\s/@:]*):([^\s/@]+)@")
_SIGNED = re.compile(
    r"(?i)\b(x-amz-\w[\w-]*|x-goog-\w[\w-]*|sig|signature|access_token|token)=[^&\s'\"<>]+"
)

_TOKEN = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    r"hf_[A-Za-z0-9]{16,}"  # Hugging Face
    r"|(?:AKIA|ASIA)[A-Z0-9]{16}"  # Amazon
    r"|(?:sk|rk|pk)[-_](?:[A-Za-z0-9]+[-_])*[A-Za-z0-9]{16,}(?:[-_][A-Za-z0-9]*)*"  # OpenAI, Anthropic, Stripe
    r"|gh[opsur]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,}|glpat-[A-Za-z0-9_-]{16,}"
    r"|hooks\.slack\.com/(?:services|workflows)/[A-Za-z0-9/_-]+"
    r"|xox[a-z]-[A-Za-z0-9-]{8,}|xapp-[A-Za-z0-9-]{8,}"  # Slack
    r"|AIza[A-Za-z0-9_-]{30,}|ya29\.[A-Za-z0-9_-]{20,}"  # Google
    r"|nvapi-[A-Za-z0-9_-]{20,}|gsk_[A-Za-z0-9]{20,}|npm_[A-Za-z0-9]{30,}|pypi-[A-Za-z0-9_-]{40,}"
    r"|wandb_v1_[A-Za-z0-9_]{20,}"
    r"|eyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}(?:\.[A-Za-z0-9_-]*)?"  # JSON web tokens
    r")|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
"""Tokens of well-known services begin with a mark of their own, so that they are recognised
anywhere."""


def names_a_secret(name: str) -> bool:
    """Return whether a setting or an environment variable of that name holds a secret."""
    return _NAME.search(name) is not None


def hide_secrets(text: str) -> str:
    """Return the text without the secrets of this process's environment, those of any URL, and the
    tokens of well-known services."""
    for value, name in sorted(_secrets(), key=lambda found: -len(found[0])):
        text = text.replace(value, f"<{name}>")
    return _TOKEN.sub(
        "<token>", _SIGNED.sub(r"\1=<hidden>", _PASSWORD.sub(r"\1:<password>@", text))
    )


def _secrets() -> Iterator[tuple[str, str]]:
    """Yield the secrets of this process's environment, each with the name of its variable."""
    for name, value in os.environ.items():
        found = [match[2] for match in _PASSWORD.finditer(value)]  # of a proxy
        found += [value] if names_a_secret(name) else []
        yield from ((secret, name) for secret in found if len(secret) >= _SHORTEST)
