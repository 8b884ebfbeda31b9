"""Tells a webhook when a run has ended or died, in the form that Slack, Mattermost and Rocket.Chat
take: {"text": ...}.

The first rank tells how a run ended. That one has died, its launcher tells, which sees it also where
the first rank itself was killed. What cannot be sent costs one warning, without the address, which
may be a secret."""

from __future__ import annotations

import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from megalite.config import Config
from megalite.observe.console import clock
from megalite.runtime.error_file import LAUNCHER
from megalite.utils.secrecy import hide_secrets

SECONDS = 10.0
LONGEST_TEXT = 2000


class NotTold(Exception):
    """Raised where a webhook could not be told. The text does not name its address."""


class WebhookSink:
    """Sink that tells the webhook how the run ended."""

    name = "webhook"

    def __init__(self, config: Config, start_step: int):
        """Raise NotTold where no address is to be found, rather than at the end of the run."""
        self._address = address_of(config.observe.webhook)
        self._name, self._total = config.run.name, config.train.steps
        self._began, self._step = time.monotonic(), start_step
        self._losses: dict[str, float] = {}

    def step(self, record: dict[str, float]) -> None:
        """Note how far the run is."""
        self._step = int(record["step"])
        self._losses["loss"] = record["loss"]

    def evaluation(self, record: dict[str, float]) -> None:
        """Note the losses."""
        for key, name in (("valid_loss", "valid"), ("test_loss", "test")):
            if key in record:
                self._losses[name] = record[key]

    def tasks(self, record: dict[str, float]) -> None:
        """Leave tasks to the other sinks."""

    def samples(self, step: int, prompts: Sequence[str], answers: Sequence[str]) -> None:
        """Leave samples to the other sinks."""

    def close(self, status: str) -> None:
        """Tell how the run ended. Raise NotTold. A run that was sent back to a checkpoint goes on;
        that it failed, a launcher tells, where there is one."""
        if status == "sent back" or (status == "failed" and os.environ.get(LAUNCHER)):
            return
        text = f"{self._name} {status} at step {self._step:,} of {self._total:,}"
        text += f" after {clock(time.monotonic() - self._began)}"
        text += "".join(f", {name} {loss:.4f}" for name, loss in self._losses.items())
        if status == "stopped":
            text += "; it goes on when started again"
        tell(self._address, text)


def address_of(webhook: str) -> str:
    """Return the address that `observe.webhook` names. Raise NotTold for a variable that is not
    set."""
    if not webhook.startswith("$"):
        return webhook
    address = os.environ.get(webhook[1:], "").strip()
    if not address.startswith(("http://", "https://")):
        raise NotTold(
            f"observe.webhook: the environment variable {webhook[1:]} holds no http(s):// URL"
        )
    return address


def tell(address: str, text: str) -> None:
    """Send a text, within SECONDS. Raise NotTold, which does not name the address."""
    text = hide_secrets(text)[:LONGEST_TEXT]
    # Slack reads these three as markup: no name may become a link or call everybody.
    for letter, escaped in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;")):
        text = text.replace(letter, escaped)
    request = urllib.request.Request(
        address,
        json.dumps({"text": text}).encode(),
        {"Content-Type": "application/json", "User-Agent": "megalite"},
    )
    found: list[str] = []

    def send() -> None:
        try:
            with urllib.request.urlopen(request, timeout=SECONDS):
                found.append("")
        except urllib.error.HTTPError as error:
            found.append(f"it answered {error.code}")
        except Exception as error:
            reason = getattr(error, "reason", error)
            # A socket's time ends with ours: whichever is first, there was no answer.
            if not isinstance(reason, TimeoutError):
                found.append(getattr(reason, "strerror", None) or type(reason).__name__)

    # On a thread: looking up a name has no time limit.
    thread = threading.Thread(target=send, name="webhook", daemon=True)
    thread.start()
    thread.join(SECONDS)
    why = found[0] if found else f"no answer in {SECONDS:g} s"
    if why:
        raise NotTold(why)


def claim(folder: Path, start: str) -> bool:
    """Return whether this launcher is the first of a start's launchers, one a node, to tell of its
    failure. `folder` is the run's, `start` names the start."""
    path = folder / "health" / f"told-{start.replace('/', '-')}"
    with suppress(FileExistsError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(exist_ok=False)
        return True
    return False
