"""How the threads that write a checkpoint tell those of other ranks how far they are: in the store at which the ranks
met. They must not use collectives, of which the loop has its own under way, and the disk may be the thing that fails.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from megalite.mesh import Mesh

LONGEST_PAUSE_S = 1.0
"""Between two looks, which become rarer the longer nothing comes."""


class Abandoned(RuntimeError):
    """Training has failed, and nobody may be left to answer."""


class Board:
    """What any rank puts up, every rank can read. All ranks make one with the same number, which no other one has."""

    def __init__(self, mesh: Mesh, number: int, abandoned: threading.Event):
        store = dist.HashStore() if mesh.world.size == 1 else _get_default_store()
        self._store = dist.PrefixStore(f"checkpoint-{number}", store)
        self._abandoned = abandoned

    def put(self, key: str, value: Any) -> None:
        self._store.set(key, json.dumps(value))

    def read(self, keys: Sequence[str], patience_s: float, late: Callable[[list[int]], str]) -> list[Any]:
        """What was put up under each key, as soon as all are there. Raises TimeoutError with what `late` says of the
        numbers of those that are missing, and Abandoned."""
        deadline, pause = time.monotonic() + patience_s, 0.005
        while not self._store.check(list(keys)):
            if self._abandoned.is_set():
                raise Abandoned("training ended before every rank had written its part")
            if time.monotonic() > deadline:
                raise TimeoutError(late([n for n, key in enumerate(keys) if not self._store.check([key])]))
            time.sleep(pause)
            pause = min(1.5 * pause, LONGEST_PAUSE_S)
        return [json.loads(self._store.get(key)) for key in keys]

    def take(self, keys: Sequence[str], patience_s: float, late: Callable[[list[int]], str]) -> list[Any]:
        """`read`, after which they are gone: parts are long, and the store keeps all in memory."""
        found = self.read(keys, patience_s, late)
        for key in keys:
            self._store.delete_key(key)
        return found
