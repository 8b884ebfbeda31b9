"""Times an all-reduce between some ranks: `python -m megalite.health.link`, a process of its own
for each rank.

NCCL does not raise where a link is dead, it ends the process. A rank that starts one for the link
lives on, and names it."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist

from megalite.health.node import best_time

COMMAND = (sys.executable, "-m", "megalite.health.link")
CHECK_S = 0.1


@dataclass(frozen=True)
class Ranks:
    """Describes the ranks that time an all-reduce, as one of them sees it."""

    name: str
    """Prefix of their keys in the store."""
    rank: int
    world_size: int
    backend: str
    device: str
    numel: int
    """Number of fp32 elements."""
    timeout_s: float


def time_all_reduce(store: dist.Store, ranks: Ranks) -> float | None:
    """Return the seconds of an all-reduce between all processes that call it with one `store`, or
    None on failure."""
    timeout, device = datetime.timedelta(seconds=ranks.timeout_s), torch.device(ranks.device)
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        # Process groups of several pairs are made at the same time.
        own = dist.PrefixStore(ranks.name, store)
        dist.init_process_group(
            ranks.backend, store=own, rank=ranks.rank, world_size=ranks.world_size, timeout=timeout
        )
        numbers = torch.zeros(ranks.numel, device=device)
        return best_time(lambda: dist.all_reduce(numbers), device, repeats=8)
    except RuntimeError:
        return None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def time_apart(store: dist.Store, ranks: Ranks) -> float | None:
    """Do the same in a process of its own, which need not survive. All give up as soon as one of
    them has."""
    # The child connects by host and port, and these only the innermost store knows.
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    assert isinstance(store, dist.TCPStore)
    failed, deadline = f"{ranks.name} failed", time.monotonic() + ranks.timeout_s
    told = json.dumps({"host": store.host, "port": store.port, **asdict(ranks)})
    child = subprocess.Popen(
        [*COMMAND, told], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    while child.poll() is None and time.monotonic() < deadline and not store.check([failed]):
        time.sleep(CHECK_S)
    if child.poll() != 0:
        # Also after a timeout: the others of the link need not wait out theirs.
        store.set(failed, "")
        child.kill()
    said = child.communicate()[0]
    return json.loads(said) if child.returncode == 0 and said else None


def main(told: str) -> int:
    """Print the seconds, or null, for the process that waits for them."""
    # NCCL writes to the standard output what NCCL_DEBUG asks for: it goes to that of errors, so that
    # the answer is alone there, and no full pipe stops this process.
    answer = os.dup(1)
    os.dup2(2, 1)
    values = json.loads(told)
    host, port = values.pop("host"), values.pop("port")
    store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False)
    os.write(answer, json.dumps(time_all_reduce(store, Ranks(**values))).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
