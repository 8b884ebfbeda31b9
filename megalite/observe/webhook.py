"""Tells a webhook when a run has ended or died.

The first rank tells how a run ended. That one has died, its launcher tells, which sees it also where
the first rank itself was killed. What cannot be sent costs one warning, without the address, which
may be a secret."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from megalite.config import Config
from megalite.observe.console import clock
from megalite.runtime.error_file import LAUNCHER
from megalite.utils.webhooks import NotTold, post


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
        # The launcher also knows which rank it was and what it said last, which this one does not.
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
    """Send a text. Raise NotTold, which does not name the address."""
    post(address, {"text": text})


def claim(folder: Path, start: str) -> bool:
    """Return whether this launcher is the first of a start's launchers, one a node, to tell of its
    failure. `folder` is the run's, `start` names the start."""
    # A file that only one of them can make: launchers of nodes that fell apart have no other way to
    # agree.
    path = folder / "health" / f"told-{start.replace('/', '-')}"
    with suppress(FileExistsError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(exist_ok=False)
        return True
    return False
