"""Real ranks for tests: `run_ranks(world_size, function, *arguments)` starts processes joined over
gloo."""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from dies_with_parent import end_with_parent

PRELOADED = [
    "dies_with_parent",
    "tampered_ranks",
    "undrawn",
    "megalite.train",
    "megalite.parallel.pipeline",
    "matplotlib.figure",
    "pytest",
]


class RankServer(multiprocessing.forkserver.ForkServer):
    """A process that has imported `modules`, which takes long, and of which ranks are forked: they
    start within a tenth of a second."""

    def __init__(self, modules: list[str]):
        super().__init__()
        self.set_forkserver_preload(modules)

    def ensure_running(self) -> None:
        # Python 3.11 starts it without this process's sys.path, and it passes over in silence what
        # it does not find: the modules of this folder.
        paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, paths))):
            super().ensure_running()


SERVER = multiprocessing.get_context("forkserver")
multiprocessing.forkserver.connect_to_new_process = RankServer(PRELOADED).connect_to_new_process
# Not by the one server of all ranks: DeepSpeed replaces functions of torch.
OF_DEEPSPEED = RankServer([*PRELOADED, "with_deepspeed"])


def run_ranks(
    world_size: int, function: Callable[..., Any], *arguments: Any, deepspeed: bool = False
) -> list[Any]:
    """What `function(rank, world_size, *arguments)` returned on each rank. It must be importable
    (not a local function).

    A failing rank fails the test with its own traceback. `deepspeed` has ranks begin with DeepSpeed
    imported, which takes longer than what they do with it."""
    with tempfile.TemporaryDirectory() as folder:
        task = (world_size, folder, dict(os.environ), function, arguments)
        with _server(deepspeed):
            ranks = mp.start_processes(
                _rank, task, world_size, join=False, start_method="forkserver"
            )
        try:
            while not ranks.join():
                pass
        except BaseException:
            # A test out of time, or stopped by hand: its ranks would hold up pytest's end for ever.
            for process in ranks.processes:
                process.kill()
            raise
        return [
            torch.load(Path(folder) / f"{rank}.pt", weights_only=False)
            for rank in range(world_size)
        ]


@contextmanager
def _server(deepspeed: bool) -> Iterator[None]:
    """The server of which multiprocessing starts processes meanwhile."""
    if not deepspeed:
        yield
        return
    connect = OF_DEEPSPEED.connect_to_new_process
    with patch.object(multiprocessing.forkserver, "connect_to_new_process", connect):
        yield


def cases_asked_for(
    request: pytest.FixtureRequest, test: Callable[..., Any]
) -> list[dict[str, Any]]:
    """Parameters of the cases of a test that pytest was asked for, by -k or by name: what many
    cases share one spawn for need not do the others."""
    asked = [item for item in request.session.items if isinstance(item, pytest.Function)]
    return [item.callspec.params for item in asked if item.function is test]


def become(rank: int, world_size: int, environment: dict[str, str]) -> None:
    """In a process of the server, whose environment is that of the test at which it began."""
    end_with_parent()
    torch.set_num_threads(1)
    os.environ.clear()
    os.environ |= environment | {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
    }


def _rank(
    rank: int,
    world_size: int,
    folder: str,
    environment: dict[str, str],
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    become(rank, world_size, environment)
    if world_size > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world_size
        )
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
