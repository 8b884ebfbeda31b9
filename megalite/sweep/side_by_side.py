"""Trains ordinary runs that belong together, several at a time on this machine: each is trained once,
and gone on with where it was stopped."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import yaml

from megalite.errors import ConfigError
from megalite.runtime.exit_codes import Exit
from megalite.sweep.config import Metric
from megalite.sweep.machine import gpus_for, share
from megalite.sweep.trial import TrialRun
from megalite.utils.files import replacing

LOSS = Metric(metric="valid_loss")
DONE = "valid_loss.json"
"""Beside a run: what it ended with."""


class Job(NamedTuple):
    """A run: its name, its config as YAML has it, and its ranks."""

    name: str
    values: dict[str, Any]
    ranks: int = 1


def check_same(folder: Path, values: dict[str, Any], instead: str) -> None:
    """Raise ConfigError where a run of other settings than `values` is in its folder; `instead` says
    what else can be done than to remove it."""
    try:
        before = yaml.safe_load((folder / "trial.yaml").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return
    if before != values:
        raise ConfigError(f"{folder} has a run of other settings; remove it, or {instead}")


class SideBySide:
    """Trains runs in folders below `folder`, `parallel` at a time."""

    def __init__(self, folder: Path, jobs: Sequence[Job], parallel: int):
        """Take a place on the machine for each run at a time. Raises ConfigError where it has too few
        GPUs for them."""
        self._folder, self._jobs, self._parallel = folder, jobs, parallel
        # A place must do for the largest of them.
        self._ranks = max(job.ranks for job in jobs)
        self._gpus = gpus_for(parallel, self._ranks)
        self._free: SimpleQueue[int] = SimpleQueue()
        """Places on the machine, of which a run takes one."""
        for place in range(parallel):
            self._free.put(place)
        self._started: list[TrialRun] = []
        self._interrupted = False

    def losses(self, tell: Callable[[Job, float], None]) -> list[float]:
        """Return the last validation loss of each run; `tell` is called as one ends. Raises
        ConfigError where one of them fails; those that run by then go on to their end, so that the
        next start has them."""
        with ThreadPoolExecutor(self._parallel) as pool:
            pending = [pool.submit(self._loss_of, job, tell) for job in self._jobs]
            try:
                return [each.result() for each in pending]
            except KeyboardInterrupt:
                # Runs are sessions of their own, which Ctrl-C does not reach; the pool would wait
                # for them, perhaps for hours.
                self._interrupted = True
                for run in self._started:
                    run.stop()
                raise
            finally:  # after a failure nothing new is begun
                pool.shutdown(wait=False, cancel_futures=True)

    def _loss_of(self, job: Job, tell: Callable[[Job, float], None]) -> float:
        """Return the last validation loss of a run, which is trained, or gone on with, where it has
        not come to its end. Raises ConfigError where it fails."""
        folder = self._folder / job.name
        done = folder / DONE
        if done.exists():
            return float(json.loads(done.read_text(encoding="utf-8")))
        place = self._free.get()
        try:
            own = share(place, self._parallel, self._ranks, self._gpus)
            run = TrialRun(folder, job.values, job.ranks, own)
            run.start()
            self._started.append(run)
            if self._interrupted:  # while it was started
                run.stop()
            status = run.wait(None)
        finally:
            self._free.put(place)
        if status != Exit.DONE:
            raise ConfigError(f"{folder}: {run.why(int(status or 0))[0]}; see console.log there")
        found = run.value(LOSS)
        if isinstance(found, str):
            raise ConfigError(f"{folder}: {found}")
        with replacing(done) as temporary:
            temporary.write_text(json.dumps(found), encoding="utf-8")
        tell(job, found)
        return found
