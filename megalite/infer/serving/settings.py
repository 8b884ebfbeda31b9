"""The settings of a server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megalite.errors import ConfigError


@dataclass(frozen=True)
class Settings:
    """Holds the server's settings. Raises ConfigError for a value out of range."""

    name: str
    """The model's name for clients."""
    ratings: Path
    keys: Sequence[str] = ()
    max_bytes: int = 1 << 20
    """Largest request body."""
    requests_per_minute: int = 0
    timeout_s: float = 600.0
    """Time limit of an answer, including the wait for a slot."""
    max_waiting: int = 256
    log_prompts: bool = False
    host: str = "127.0.0.1"
    """Address or name that the server was asked to listen on."""
    request_log: Path | None = None
    """Folder for a line a request; None: they are not logged."""
    keep_days: int = 30
    """Days after which lines of requests are deleted."""
    admin_key: str = ""
    """Key of who may have the model reloaded; empty: nobody may over HTTP."""
    beside: tuple[str, ...] = ()
    """Names of other models at the same address, which are asked for elsewhere."""

    def __post_init__(self) -> None:
        """Raise ConfigError for a value out of range."""
        for what, value, least in (
            ("bytes of a request", self.max_bytes, 1),
            ("requests a minute", self.requests_per_minute, 0),
            ("days that requests are kept", self.keep_days, 1),
            ("seconds of an answer", self.timeout_s, 0.001),
        ):
            if not least <= value < float("inf"):
                raise ConfigError(f"{value} {what}: give a number of at least {least}")
