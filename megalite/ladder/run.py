"""Runs `megalite ladder`: trains the rungs that are missing, fits the law, and writes a report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import yaml

from megalite.errors import ConfigError
from megalite.ladder.config import LadderConfig, Rung, load_ladder_config
from megalite.ladder.fit import Runs
from megalite.ladder.report import write_report
from megalite.plan import smallest_world
from megalite.runtime.exit_codes import Exit
from megalite.sweep.config import Metric
from megalite.sweep.machine import gpus_for, share
from megalite.sweep.trial import TrialRun
from megalite.utils.files import replacing

LOSS = Metric(metric="valid_loss")
DONE = "valid_loss.json"
"""Beside a run: what it ended with."""


def run_ladder(path: Path, overrides: Sequence[str] = ()) -> Exit:
    """Train the ladder that a YAML file describes, or go on with it, and say what was found.

    Raises ConfigError for a mistake, before the first run, and for a run that fails."""
    ladder = load_ladder_config(path, overrides)
    rungs = list(ladder.rungs())
    for rung in rungs:
        _check_same(ladder.folder / rung.name, rung)
    losses = Training(ladder, rungs).losses()
    runs = Runs(
        np.array([rung.parameters for rung in rungs], float),
        np.array([rung.tokens for rung in rungs], float),
        np.array(losses, float),
    )
    for line in write_report(ladder, rungs, runs):
        print(line, flush=True)
    return Exit.DONE


def _check_same(folder: Path, rung: Rung) -> None:
    """Raise ConfigError where a run of other settings is in its folder."""
    try:
        before = yaml.safe_load((folder / "trial.yaml").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return
    if before != rung.values:
        raise ConfigError(
            f"{folder} has a run of other settings; remove it, or give the ladder another name"
        )


class Training:
    """Trains the runs of a ladder, `ladder.parallel` at a time on this machine."""

    def __init__(self, ladder: LadderConfig, rungs: Sequence[Rung]):
        """Take a place on the machine for each run at a time. Raises ConfigError where it has too few
        GPUs for them."""
        self._ladder, self._rungs = ladder, rungs
        # A place must do for the largest of them.
        self._ranks = max(self._ranks_of(rung) for rung in rungs)
        self._gpus = gpus_for(ladder.parallel, self._ranks)
        self._free: SimpleQueue[int] = SimpleQueue()
        """Places on the machine, of which a run takes one."""
        for place in range(ladder.parallel):
            self._free.put(place)
        self._started: list[TrialRun] = []
        self._interrupted = False

    def _ranks_of(self, rung: Rung) -> int:
        return self._ladder.ranks or smallest_world(rung.config)

    def losses(self) -> list[float]:
        """Return the last validation loss of each run. Raises ConfigError where one of them fails;
        those that run by then go on to their end, so that the next start has them."""
        with ThreadPoolExecutor(self._ladder.parallel) as pool:
            pending = [pool.submit(self._loss_of, rung) for rung in self._rungs]
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

    def _loss_of(self, rung: Rung) -> float:
        """Return the last validation loss of a run, which is trained, or gone on with, where it has
        not come to its end. Raises ConfigError where it fails."""
        folder = self._ladder.folder / rung.name
        done = folder / DONE
        if done.exists():
            return float(json.loads(done.read_text(encoding="utf-8")))
        place = self._free.get()
        try:
            own = share(place, self._ladder.parallel, self._ranks, self._gpus)
            run = TrialRun(folder, rung.values, self._ranks_of(rung), own)
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
        print(
            f"{rung.name}: {rung.parameters:,.0f} parameters, {rung.tokens:,} tokens: {found:.4f}",
            flush=True,
        )
        return found
