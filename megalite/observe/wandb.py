"""Sends records to Weights & Biases. The only module that imports wandb, and only when asked to."""

from __future__ import annotations

import netrc
import os
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from megalite.config import Config
from megalite.observe.environment import read_starts
from megalite.observe.queued import FINISH_SECONDS, QueuedSink

INIT_SECONDS = 30


class WandbSink(QueuedSink):
    """Sink for one W&B run, under the same id (`self.id`) in every resume.

    Without a key or a server an online run is recorded offline, for `wandb sync`. Never prompts."""

    name = "W&B"
    later = "; `wandb sync` can upload what is on disk later"

    def __init__(
        self,
        config: Config,
        folder: Path,
        wandb_id: str | None,
        say: Callable[[str], None],
    ):
        """Start the thread. `wandb_id` is the id of the run to resume, None for a new one.

        `config` is stored with the run, offline files go to `folder`, and `say` prints a line for
        the user."""
        # Made here and not by W&B, so that a checkpoint can name it before the server has answered.
        self.id = wandb_id or secrets.token_hex(4)
        self._config = config
        self._folder = folder
        super().__init__(say)

    def samples(self, step: int, prompts: Sequence[str], answers: Sequence[str]) -> None:
        self.put({"step": step, "samples": list(map(list, zip(prompts, answers, strict=True)))})

    def work(self) -> None:
        """Start the run, log records until the exit code comes, and finish."""
        run = self._start()
        while isinstance(item := self.get(), dict):
            record = dict(item)
            step = record.pop("step", None)
            if "samples" in record:
                record["samples"] = _table(record["samples"])
            # W&B drops what comes for an earlier step than its last: results of tasks without a step
            # join what is there.
            run.log(record, step=None if step is None else int(step))
        run.finish(exit_code=item)

    def _start(self) -> Any:
        """Start the W&B run, offline if it cannot be started online."""
        import wandb

        mode = self._config.observe.wandb.mode
        if mode == "online" and not _has_credentials(wandb.setup().settings.base_url):
            mode = "offline"
            self._say(
                "warning: W&B: no API key (WANDB_API_KEY or `wandb login`), recording offline"
            )
        try:
            run = self._init(wandb, mode)
        except Exception as error:
            if mode == "offline":
                raise
            self.warn("recording offline", error)
            wandb.teardown()  # or the id would still be in use by the run that failed to start
            mode, run = "offline", self._init(wandb, "offline")
        if mode == "offline":
            folder = self._folder / "wandb" / Path(run.dir).parent.name
            self._say(f"W&B offline, later: wandb sync {folder}")
        else:
            self._say(f"W&B {run.url}")
        return run

    def _init(self, wandb: Any, mode: str) -> Any:
        asked, starts = self._config.observe.wandb, read_starts(self._folder)
        settings = {
            "console": "off",
            "silent": True,
            "init_timeout": INIT_SECONDS,
            "finish_timeout": FINISH_SECONDS,
        }
        # finish_timeout is newer than the oldest wandb allowed.
        known = getattr(wandb.Settings, "model_fields", settings)
        settings = {key: value for key, value in settings.items() if key in known}
        return wandb.init(
            mode=mode,
            project=asked.project,
            entity=asked.entity,
            group=asked.group,
            tags=list(asked.tags),
            name=self._config.run.name,
            id=self.id,
            resume="allow",
            dir=str(self._folder),
            # With that of this start, so that runs can be found by it.
            config=self._config.model_dump(mode="json")
            | {"environment": starts[-1] if starts else None},
            settings=wandb.Settings(**settings),
        )


def _table(rows: list[list[str]]) -> Any:
    """Return answers to prompts as a table of W&B."""
    import wandb

    return wandb.Table(columns=["prompt", "answer"], data=rows)


def _has_credentials(base_url: str) -> bool:
    """Return whether wandb will find a key for `base_url`. Asked first, because wandb would prompt
    on a terminal."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    try:
        logins = netrc.netrc(os.environ.get("NETRC"))
    except (OSError, netrc.NetrcParseError):
        return False
    return logins.authenticators(urlsplit(base_url).netloc) is not None
