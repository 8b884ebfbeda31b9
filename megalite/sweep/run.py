"""Runs `megalite sweep`: workers of this machine take trials until the budget is used up, then a
report is written."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from megalite.plan import smallest_world
from megalite.runtime.exit_codes import Exit
from megalite.sweep.config import SweepConfig, load_sweep_config
from megalite.sweep.machine import gpus_for, share
from megalite.sweep.report import write_report
from megalite.sweep.study import RUN, Journal
from megalite.sweep.trial import GOES_ON, TrialRun

if TYPE_CHECKING:
    from optuna.trial import Trial

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
POLL_S = 0.5
SHARE_OF_TIME = 0.05
"""Share of its time that a worker may read metrics."""
GRACE_S = 120.0
"""Seconds that a run has to save and leave where it is ended early."""
TRIES = 3
"""Starts of a run that ends with a status after which it goes on."""


def run_sweep(path: Path, overrides: Sequence[str] = ()) -> Exit:
    """Run the sweep that a YAML file describes, or go on with it. Return DONE, or STOPPED after a
    signal.

    Raises ConfigError for a mistake, before the first trial."""
    sweep = load_sweep_config(path, overrides)
    config = sweep.check()
    ranks = sweep.ranks or smallest_world(config)
    devices = gpus_for(sweep.parallel, ranks)
    journal = Journal(sweep, config)
    workers = Workers(sweep, journal, ranks, devices)
    try:
        stopped = workers.run()
        with journal.alone():
            for line in write_report(sweep, journal.study):
                print(line, flush=True)
    finally:
        journal.close()
    return Exit.STOPPED if stopped else Exit.DONE


class Workers:
    """The workers of this process, a thread each."""

    def __init__(self, sweep: SweepConfig, journal: Journal, ranks: int, devices: Sequence[str]):
        """Run trials of `sweep` on so many `ranks` each, and on `devices` if there are any."""
        self._sweep, self._journal, self._ranks, self._devices = sweep, journal, ranks, devices
        self._stop = threading.Event()
        self._runs: dict[int, TrialRun] = {}
        self._failed: BaseException | None = None

    def run(self) -> bool:
        """Work until the budget is used up; return whether a signal came before. Raises what a
        worker raised."""
        handlers = {number: signal.signal(number, self._leave) for number in SIGNALS}
        threads = [
            threading.Thread(target=self._work, args=(number,), name=f"worker-{number}")
            for number in range(self._sweep.parallel)
        ]
        try:
            for thread in threads:
                thread.start()
            # Python handles signals in the main thread alone, between its own steps: it must not
            # wait for a thread without an end.
            while any(thread.is_alive() for thread in threads):
                for thread in threads:
                    thread.join(POLL_S)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        if self._failed:
            raise self._failed
        return self._stop.is_set()

    def _leave(self, number: int, frame: FrameType | None) -> None:
        """Have runs save and leave; a second signal ends them."""
        if self._stop.is_set():
            for run in list(self._runs.values()):
                run.kill()
            return
        print(
            "asked to stop: trials that run are saved, and go on when the same command is started again",
            flush=True,
        )
        self._stop.set()

    def _work(self, number: int) -> None:
        try:
            while not self._stop.is_set() and (found := self._journal.next_trial()):
                self._try(*found, number)
        except BaseException as error:  # raised by `run`: a thread's own would only be printed
            self._failed = error
            self._stop.set()

    def _try(self, trial: Trial, chosen: dict[str, Any], number: int) -> None:
        """Run a trial with the settings `chosen` to its end, on the devices of the worker of this
        number, and note what became of it."""
        folder = self._sweep.folder / trial.user_attrs[RUN]
        print(
            f"{folder.name}: {', '.join(f'{key}={shown(value)}' for key, value in chosen.items())}",
            flush=True,
        )
        values = self._sweep.trial_values(chosen, folder)
        own = share(number, self._sweep.parallel, self._ranks, self._devices)
        run = TrialRun(folder, values, self._ranks, own)
        status, pruned = None, False
        for _ in range(TRIES):
            run.start()
            self._runs[number] = run
            status, pruned = self._watch(run, trial)
            del self._runs[number]
            if status not in GOES_ON or self._stop.is_set():
                break
        # A run that ended by itself just then has a result, which is kept.
        if self._stop.is_set() and status != Exit.DONE and not pruned:
            self._journal.give_back([trial])
            return
        self._conclude(trial, run, int(status or 0), pruned)

    def _conclude(self, trial: Trial, run: TrialRun, status: int, pruned: bool) -> None:
        if pruned:
            return self._note(trial, run, "behind others", pruned=True)
        if status != Exit.DONE:
            why, by_settings = run.why(status)
            return self._note(trial, run, why, pruned=by_settings)
        found = [run.value(each) for each in self._sweep.objective]
        wrong = [each for each in found if isinstance(each, str)]
        if wrong:
            return self._note(trial, run, wrong[0])
        values = [each for each in found if isinstance(each, float)]
        return self._note(trial, run, "complete", values)

    def _note(
        self,
        trial: Trial,
        run: TrialRun,
        outcome: str,
        values: Sequence[float] | None = None,
        pruned: bool = False,
    ) -> None:
        told = ", ".join(
            f"{each.metric} {value:.6g}"
            for each, value in zip(self._sweep.objective, values or (), strict=False)
        )
        print(f"{run.folder.name}: {told or outcome}", flush=True)
        self._journal.tell(trial, outcome, values, pruned)

    def _watch(self, run: TrialRun, trial: Trial) -> tuple[int, bool]:
        """Wait for the end of a run: return its exit status, and whether it was ended for being
        behind others."""
        pause, asked_at, pruned = POLL_S, None, False
        while (status := run.wait(pause)) is None:
            began = time.monotonic()
            if asked_at is None and not self._stop.is_set():
                pruned = self._is_behind(run, trial)
            if asked_at is None and (pruned or self._stop.is_set()):
                run.stop()
                asked_at = began
            elif asked_at is not None and began - asked_at > GRACE_S:
                run.kill()
            # The whole metrics.jsonl is read each time: the longer it is, the rarer.
            pause = max(POLL_S, (time.monotonic() - began) / SHARE_OF_TIME)
        self._is_behind(run, trial)  # what the last validations said is part of the record
        return status, pruned

    def _is_behind(self, run: TrialRun, trial: Trial) -> bool:
        """Report what validations have found since the last call, and ask the pruner."""
        if len(self._sweep.objective) > 1:
            return False
        behind = False
        # Several may have come since the last call: each is a step for the pruner.
        for step, value in run.reports(self._sweep.objective[0].metric):
            trial.report(value, step)
            behind = behind or trial.should_prune()
        return behind


def shown(value: object) -> str:
    """Return a setting's value, short."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
