"""Messages between the threads that write a checkpoint, through the store at which the ranks met
(torchrun's).

The threads must not use collectives, because the training loop has its own in flight; nor the disk,
which may be what fails.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from megalite.comm.mesh import Mesh

LONGEST_PAUSE_S = 1.0
"""Longest pause in seconds between two looks. Pauses grow up to it while nothing comes."""


class Abandoned(RuntimeError):
    """Raised when training has failed, so that no other rank may be left to answer."""


class Board:
    """Lets every rank read what any rank puts up, as JSON under a key."""

    def __init__(self, mesh: Mesh, number: int, abandoned: threading.Event):
        """Make the board of one save. `number` is the same on all ranks and unique among all saves.

        `read` gives up once `abandoned` is set."""
        # Keys of saves do not mix: a late rank's message of an earlier save is under another
        # prefix.
        store = dist.HashStore() if mesh.world.size == 1 else _get_default_store()
        self._store = dist.PrefixStore(f"checkpoint-{number}", store)
        self._abandoned = abandoned

    def put(self, key: str, value: Any) -> None:
        """Put up a value."""
        self._store.set(key, json.dumps(value))

    def read(
        self,
        keys: Sequence[str],
        patience_s: float,
        late: Callable[[list[int]], str],
    ) -> list[Any]:
        """Wait until there is a value under each of `keys`, and return them.

        Raises TimeoutError after `patience_s`, with what `late` says of the indices of missing
        keys, and Abandoned."""
        deadline = time.monotonic() + patience_s
        pause = 0.005
        # Polled, because a blocking wait of the store could not be abandoned.
        while not self._store.check(list(keys)):
            if self._abandoned.is_set():
                raise Abandoned("training ended before every rank had written its part")
            if time.monotonic() > deadline:
                # Only now one by one: `check` of all at once does not say which are missing.
                missing = [
                    number for number, key in enumerate(keys) if not self._store.check([key])
                ]
                raise TimeoutError(late(missing))
            time.sleep(pause)
            pause = min(1.5 * pause, LONGEST_PAUSE_S)
        return [json.loads(self._store.get(key)) for key in keys]

    def take(
        self,
        keys: Sequence[str],
        patience_s: float,
        late: Callable[[list[int]], str],
    ) -> list[Any]:
        """Read `keys` as `read` does, with `patience_s` and `late`, and delete them: the store
        keeps all in memory."""
        found = self.read(keys, patience_s, late)
        for key in keys:
            self._store.delete_key(key)
        return found
