"""What families' mappings from a Hugging Face config.json share."""

from __future__ import annotations

from typing import Any

from megalite.errors import ConfigError


def require(hf: dict[str, Any], family: str, supported: dict[str, Any]) -> None:
    """Raise ConfigError where a key has another value than the one that the family computes. None and what is left out
    stand for it."""
    for key, only in supported.items():
        if hf.get(key) is not None and hf[key] != only:
            raise ConfigError(f"config.json has {key} = {hf[key]!r}; the {family} family supports {only!r}")
