"""Ranks that die, or never start, before there is a process group: named in minutes, not waited for
half an hour."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from megalite.comm.mesh import Launch
from megalite.errors import Unreachable
from megalite.runtime.exit_codes import Exit
from ranks import SERVER, become

SILENCE_S = 3.0


def on_its_way(rank: int, way: str, environment: dict[str, str], log: str) -> None:
    """`way`: what becomes of this rank."""
    become(rank, 3, environment)
    file = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    launch = Launch.from_environment()
    try:
        meeting = launch.arrive(SILENCE_S)
        if way == "dies":
            os._exit(9)
        if way == "is slow":  # longer than silence may be, but it goes on saying that it is there
            time.sleep(2 * SILENCE_S)
        launch.join(60.0, meeting)
    except Unreachable as error:
        print(f"error: {error}", flush=True)
        os._exit(Exit.FAILED)
    numbers: list[None] = [None] * 3
    dist.all_gather_object(numbers, rank)
    print(f"met {numbers}", flush=True)
    os._exit(0)


def meet(folder: Path, ways: list[str]) -> tuple[list[int | None], list[str], float]:
    """Exit statuses, what each rank has said, and how long all of it took."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    began, processes = time.monotonic(), {}
    for rank, way in enumerate(ways):
        if way != "never starts":
            arguments = (rank, way, environment, str(folder / f"{rank}.log"))
            processes[rank] = SERVER.Process(target=on_its_way, args=arguments)
            processes[rank].start()
    try:
        for process in processes.values():
            process.join(90)
    finally:
        for process in processes.values():
            process.kill()
    logs = [(folder / f"{rank}.log").read_text() if rank in processes else "" for rank in range(3)]
    statuses = [processes[rank].exitcode if rank in processes else None for rank in range(3)]
    return statuses, logs, time.monotonic() - began


@pytest.mark.parametrize(
    ("ways", "statuses", "said"),
    [
        (["comes", "comes", "is slow"], [0, 0, 0], "met [0, 1, 2]"),
        (
            ["comes", "dies", "comes"],
            [76, 9, 76],
            "error: not heard of for 3 s, before the ranks met: rank 1 on ",
        ),
        (
            ["comes", "comes", "never starts"],
            [76, 76, None],
            "the ranks met: rank 2, which never came",
        ),
    ],
)
def test_who_is_missing_is_named(
    tmp_path: Path, ways: list[str], statuses: list[int | None], said: str
) -> None:
    found, logs, seconds = meet(tmp_path, ways)
    assert found == statuses, logs
    assert said in logs[0]
    assert seconds < 60  # of a loaded machine; a process group would wait for its whole timeout


@pytest.mark.parametrize("way", ["dies", "never starts"])
def test_rank_0_is_missed_by_the_others(tmp_path: Path, way: str) -> None:
    found, logs, _ = meet(tmp_path, [way, "comes", "is slow"])
    assert found[1:] == [Exit.FAILED, Exit.FAILED], logs
    for log in logs[1:]:
        assert log.splitlines()[-1].startswith("error: rank 0")
