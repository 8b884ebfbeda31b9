"""Weights & Biases. The only module that imports wandb, and only when asked to.

Everything of wandb happens on a thread of its own, fed through a queue: a slow import, a server that does not answer,
an upload that hangs or an exception costs the training loop nothing.
"""

from __future__ import annotations

import netrc
import os
import queue
import secrets
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from megalite.config import Config
from megalite.secrecy import hide_secrets

INIT_SECONDS = 30
FINISH_SECONDS = 30  # for the last upload; what is left then stays on disk for `wandb sync`
CLOSE_SECONDS = FINISH_SECONDS + 5
QUEUED_RECORDS = 10_000


class WandbSink:
    """One W&B run, under the same id (`self.id`) in every resume. `say` prints a line for the user.

    Without a key or a server an online run is recorded offline, for `wandb sync`. Never prompts."""

    name = "W&B"

    def __init__(self, config: Config, folder: Path, wandb_id: str | None, say: Callable[[str], None]):
        self.id = wandb_id or secrets.token_hex(4)
        self._config, self._folder, self._say = config, folder, say
        self._queue: queue.Queue[dict[str, float] | int] = queue.Queue(QUEUED_RECORDS)
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def step(self, record: dict[str, float]) -> None:
        self._put({key if key == "step" else f"train/{key}": value for key, value in record.items()})

    def evaluation(self, record: dict[str, float]) -> None:
        self._put({key.replace("valid_", "valid/"): value for key, value in record.items()})

    def tasks(self, record: dict[str, float]) -> None:
        """`step` may be left out: it then stands behind what was there before."""
        self._put(record)

    def close(self, status: str) -> None:
        """Waits at most CLOSE_SECONDS for the upload. Raises TimeoutError."""
        self._put(1 if status == "failed" else 0)
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            raise TimeoutError(f"no answer in {CLOSE_SECONDS} s; `wandb sync` can upload what is on disk later")

    def _put(self, item: dict[str, float] | int) -> None:
        if not self._thread.is_alive():
            return  # turned off; _work has said why
        try:
            self._queue.put_nowait(item)
        except queue.Full:
            raise TimeoutError(f"no answer for {QUEUED_RECORDS} records") from None

    def _work(self) -> None:
        try:
            run = self._start()
            while isinstance(item := self._queue.get(), dict):
                record = dict(item)
                step = record.pop("step", None)
                run.log(record, step=None if step is None else int(step))
            run.finish(exit_code=item)
        except Exception as error:  # whatever it is, it must not reach training
            self._warn("turned off, training goes on", error)

    def _start(self) -> Any:
        import wandb

        mode = self._config.observe.wandb.mode
        if mode == "online" and not _has_credentials(wandb.setup().settings.base_url):
            mode = "offline"
            self._say("warning: W&B: no API key (WANDB_API_KEY or `wandb login`), recording offline")
        try:
            run = self._init(wandb, mode)
        except Exception as error:
            if mode == "offline":
                raise
            self._warn("recording offline", error)
            wandb.teardown()  # or the id would still be in use by the run that failed to start
            mode, run = "offline", self._init(wandb, "offline")
        offline = f"offline, later: wandb sync {self._folder / 'wandb' / Path(run.dir).parent.name}"
        self._say(f"W&B {offline if mode == 'offline' else run.url}")
        return run

    def _init(self, wandb: Any, mode: str) -> Any:
        asked = self._config.observe.wandb
        settings = {"console": "off", "silent": True, "init_timeout": INIT_SECONDS, "finish_timeout": FINISH_SECONDS}
        known = getattr(
            wandb.Settings, "model_fields", settings
        )  # finish_timeout is newer than the oldest wandb allowed
        return wandb.init(
            mode=mode,
            project=asked.project,
            entity=asked.entity,
            tags=list(asked.tags),
            name=self._config.run.name,
            id=self.id,
            resume="allow",
            dir=str(self._folder),
            config=self._config.model_dump(mode="json"),
            settings=wandb.Settings(**{key: value for key, value in settings.items() if key in known}),
        )

    def _warn(self, what: str, error: Exception) -> None:
        reason = " ".join(str(error).split()) or type(error).__name__
        self._say(f"warning: W&B {what}: {hide_secrets(reason)}")


def _has_credentials(base_url: str) -> bool:
    """Whether wandb will find a key by itself. Asked first, because wandb would prompt for one on a terminal."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    try:
        logins = netrc.netrc(os.environ.get("NETRC"))
    except (OSError, netrc.NetrcParseError):
        return False
    return logins.authenticators(urlsplit(base_url).netloc) is not None
