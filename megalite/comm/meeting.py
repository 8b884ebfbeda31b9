"""How ranks meet before there is a process group.

Every rank says that it is there as soon as it starts, goes on saying so while it reads its data,
and then that it is ready. Rank 0 listens: a rank that it has not heard of for
`health.hang_timeout_s` is named, and all leave with `Exit.HUNG`, at which a launcher starts the run
again. Without this, a rank that died on its way would be waited for as long as a collective may
take."""

from __future__ import annotations

import contextlib
import datetime
import os
import threading
import time

import torch.distributed as dist

from megalite.errors import ConfigError, Unreachable
from megalite.runtime import error_file
from megalite.runtime.exit_codes import Exit, describe, end_process

LOOK_S = 0.1
READY, GO = "ready", "go"


class Meeting:
    """Bring the ranks together: from the start of this one until all are ready. `store` is one that
    all ranks see."""

    def __init__(self, store: dist.Store, rank: int, world_size: int, name: str, silence_s: float):
        """Announce this rank. `name` is that of its node; a rank not heard of for `silence_s`
        seconds counts as missing (0: never)."""
        self.store, self._rank, self._world_size = store, rank, world_size
        self._told, self._silence_s, self._name = (
            dist.PrefixStore("meeting", store),
            silence_s,
            name,
        )
        # [rank] → (what it last said, when this process first saw that). Clocks of nodes are never
        # compared: a rank is silent when its counter stands still by rank 0's own clock.
        self._heard: dict[int, tuple[bytes, float]] = {}
        self._over = threading.Event()
        if silence_s:
            self._beat(0)
            threading.Thread(target=self._beat_on, name="meeting", daemon=True).start()

    def wait(self) -> None:
        """Wait until all ranks are ready. Raises Unreachable where the rank that holds the store is
        gone."""
        try:
            self._wait()
        except dist.DistError as error:
            raise Unreachable(
                f"rank 0, at which the ranks meet, is gone: {_first_line(error)}"
            ) from None
        finally:
            self._over.set()

    def _wait(self) -> None:
        # Only rank 0 decides, and writes it to GO: an empty text to go on, or the names of those
        # missing. All others look for GO, so that all come to the same end.
        self._told.add(READY, 1)
        while not self._told.check([GO]):
            # Adding 0 reads the counter.
            if self._rank == 0 and self._told.add(READY, 0) == self._world_size:
                self._told.set(GO, "")
            elif self._rank == 0 and self._silence_s and (missing := self._missing()):
                self._told.set(GO, missing)
            else:
                time.sleep(LOOK_S)
        if missing := self._told.get(GO).decode():
            self._leave(missing)

    def _missing(self) -> str:
        """Name the ranks that have not been heard of for too long; empty where there are none."""
        now, missing = time.monotonic(), []
        for rank in range(1, self._world_size):
            key = f"rank {rank}"
            said = self._told.get(key) if self._told.check([key]) else b""
            last, since = self._heard.setdefault(rank, (said, now))
            if said != last:
                self._heard[rank] = said, now
            elif now - since > self._silence_s:
                missing.append(
                    f"{key}{f' on {said.decode().partition(chr(32))[2]}' if said else ', which never came'}"
                )
        return ", ".join(missing)

    def _leave(self, missing: str) -> None:
        """End this process with `Exit.HUNG`; rank 0 first says which ranks are missing."""
        text = f"not heard of for {self._silence_s:.0f} s, before the ranks met: {missing} (health.hang_timeout_s)"
        if self._rank == 0:
            os.write(2, f"error: {text}\nleaving with {describe(Exit.HUNG)}\n".encode())
            error_file.leave(text)
            time.sleep(1.0)  # the store may live in this process, and others still read it
        end_process(Exit.HUNG)

    def _beat_on(self) -> None:
        number = 0
        # `wait` meets the same error, and reports it.
        with contextlib.suppress(dist.DistError, RuntimeError):
            # Twenty times as often as needed: a busy store may be slow, and a beat may be lost.
            while not self._over.wait(self._silence_s / 20):
                number += 1
                self._beat(number)

    def _beat(self, number: int) -> None:
        self._told.set(f"rank {self._rank}", f"{number} {self._name}")


def number_from(name: str, default: int | None = None) -> int:
    """Return the number that an environment variable holds; `default` where it is not set. Raise
    ConfigError where it holds none, or is missed."""
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        what = "is not set" if text is None else f"= {text!r} is no number"
        raise ConfigError(
            f"the environment variable {name} {what}; torchrun and srun set it for each rank"
        ) from None


def step_port() -> int:
    """Return the port at which the processes of a Slurm step meet. It follows from the numbers of
    the job and the step: each of two steps under way in a job has its own, and so has each of two
    jobs on a node."""
    job, step = number_from("SLURM_JOB_ID"), number_from("SLURM_STEP_ID", -1)
    # Coprime to the number of ports, so that steps differ; below the ports Linux hands out by
    # itself.
    return 10_000 + (job + 7919 * (step + 1)) % 20_000


def open_store(rank: int, world_size: int, timeout_s: float) -> dist.Store:
    """Return a store that all `world_size` ranks see: that of torchrun's agent, or one that rank 0
    holds. Waits for rank 0 alone, up to `timeout_s` seconds; `rank` is this process's.

    Raises Unreachable where rank 0 does not answer in time."""
    timeout = datetime.timedelta(seconds=timeout_s)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # torchrun's agent serves the store, and it outlives this process; a second one at its port
        # would fail.
        store, _, _ = next(dist.rendezvous("env://", rank, world_size, timeout=timeout))
        return store
    host, port = os.environ["MASTER_ADDR"], number_from("MASTER_PORT")
    try:
        return dist.TCPStore(host, port, world_size, rank == 0, timeout, wait_for_workers=False)
    except dist.DistError as error:
        if rank == 0:
            raise Unreachable(
                f"port {port}, at which the ranks were to meet, cannot be used: {_first_line(error)}"
            ) from None
        raise Unreachable(
            f"rank 0 was not heard of at {host}:{port} for {timeout_s:.0f} s: it has not started, or has ended"
        ) from None


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0][:200]
