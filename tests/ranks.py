"""Real ranks for tests: `run_ranks(world_size, function, *arguments)` spawns processes joined over gloo."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `function(rank, world_size, *arguments)` returned on each rank. It must be importable (not a local
    function).

    A failing rank fails the test with its own traceback."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = mp.spawn(_rank, (world_size, folder, function, arguments), nprocs=world_size, join=False)
        try:
            while not ranks.join():
                pass
        except BaseException:  # a test out of time, or stopped by hand: its ranks would hold up pytest's end for ever
            for process in ranks.processes:
                process.kill()
            raise
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def _rank(rank: int, world_size: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world_size)
    try:
        torch.save(function(rank, world_size, *arguments), Path(folder) / f"{rank}.pt")
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads of gloo live on, and now and then abort a process that takes down Python around them.
    os._exit(0)
