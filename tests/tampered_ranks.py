"""Ranks that are tampered with, as processes of their own that may hang, be stopped, or leave."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megalite.config import Config
from megalite.train import train
from ranks import SERVER, become


@dataclass
class Ranks:
    folder: Path
    processes: list[BaseProcess]

    def exit_codes(self, of: Sequence[int] = (), patience_s: float = 420.0) -> list[int | None]:
        """Of all ranks, when those `of` (all, where none is given) have left; None of one that has
        not."""
        deadline = time.monotonic() + patience_s
        for rank in of or range(len(self.processes)):
            self.processes[rank].join(max(0.0, deadline - time.monotonic()))
        return [process.exitcode for process in self.processes]

    def said(self, rank: int) -> str:
        return (self.folder / f"said-{rank}").read_text()


@contextmanager
def started(
    world_size: int, folder: Path, function: Callable[..., Any], *arguments: Any
) -> Iterator[Ranks]:
    """`function(rank, world_size, folder, *arguments)`, which is importable, on every rank; what it
    returns is the rank's exit status. What it prints goes to files in the folder."""
    task = (world_size, folder, dict(os.environ), function, arguments)
    processes: list[BaseProcess] = [
        SERVER.Process(target=_rank, args=(rank, *task), daemon=True) for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    try:
        yield Ranks(folder, processes)
    finally:
        for process in processes:
            process.kill()
            process.join()


def training(
    world_size: int, folder: Path, config: Config, tamper: Callable[[int], None]
) -> AbstractContextManager[Ranks]:
    """Ranks that train; `tamper(rank)` is called on each before."""
    return started(world_size, folder, _train, config, tamper)


def _train(
    rank: int, world_size: int, folder: Path, config: Config, tamper: Callable[[int], None]
) -> int:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world_size
    )
    tamper(rank)
    status = train(config)
    dist.destroy_process_group()
    return status


class Clock:
    """An event whose time is set by hand."""

    now = 0.0

    def record(self) -> None:
        self.at = Clock.now

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Clock) -> float:
        return (end.at - self.at) * 1e3


def _rank(
    rank: int,
    world_size: int,
    folder: Path,
    environment: dict[str, str],
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    said = os.open(folder / f"said-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(said, stream)
    become(rank, world_size, environment)
    sys.exit(function(rank, world_size, folder, *arguments))
