"""The journal of a sweep: which trials there are, which comes next, and what became of each, in
optuna's words.

Workers share it by a file on a shared disk, or by a database. A worker asks for a trial under a
lock: what is left of the budget is counted, and trials of workers that died are given to others,
before anything new is chosen."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import uuid
import warnings
from collections.abc import Iterator, Sequence
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megalite.config import Config
from megalite.errors import ConfigError
from megalite.sweep.config import Dimension, SweepConfig, encoded
from megalite.utils.locks import NoLocks, lock

if TYPE_CHECKING:
    from optuna import Study
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial, Trial

PAUSE_S = 0.02
"""Seconds between attempts to get a lock."""
MOST_DEATHS = 3
"""Workers that may die of one trial before it is left alone."""
RUN, WORKER, GOES_ON, OUTCOME, DEATHS = "run", "worker", "goes_on", "outcome", "deaths"
"""Names under which a trial notes its run's folder, its worker, the trial whose run it goes on
with, what became of it, and how many workers have died of it."""


class FileLock:
    """A lock among threads and processes on a shared disk, in the form that optuna's journal takes
    one. The system releases it when its holder dies, where optuna's own stay for half a minute."""

    def __init__(self, path: Path):
        self._path, self._threads = path, threading.Lock()

    def try_once(self) -> bool:
        """Take the lock if it is free; return whether it was."""
        file = FileIO(self._path, "a+")
        try:
            is_mine = lock(file, self._path)
        except NoLocks as problem:  # who asked again would ask forever
            file.close()
            raise NoLocks(
                f"{problem}; the workers of a sweep need them: give another dir"
            ) from None
        if not is_mine:
            file.close()
            return False
        self._file = file
        return True

    def acquire(self) -> bool:
        self._threads.acquire()
        try:
            # Not by waiting in the system, which sees a dead-lock where threads of two processes
            # wait for two files.
            while not self.try_once():
                time.sleep(PAUSE_S)
        except BaseException:  # also Ctrl-C: other threads must not wait for who gave up
            self._threads.release()
            raise
        return True

    def let_go(self) -> None:
        """Give back what `try_once` has taken."""
        self._file.close()

    def release(self) -> None:
        self.let_go()
        self._threads.release()

    def __enter__(self) -> FileLock:
        self.acquire()
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


class Journal:
    """A worker's view of a sweep. Its threads share one."""

    def __init__(self, sweep: SweepConfig, config: Config):
        """Open the journal of `sweep`, or begin it. `config` is that of any trial. Raises
        ConfigError where it is of another objective, and where optuna is not installed."""
        self.sweep, self.folder = sweep, sweep.folder
        self._steps, self._first_report = config.train.steps, config.observe.eval_every
        optuna = _optuna()
        (self.folder / "workers").mkdir(parents=True, exist_ok=True)
        self._asking = FileLock(self.folder / "workers" / "asking")
        self.worker = f"{os.uname().nodename}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
        self._alive = FileLock(self._path_of(self.worker))
        self._alive.acquire()  # as long as this process lives
        try:
            with self._asking, _told(sweep.storage):
                self.study: Study = self._open(optuna)
        except BaseException:
            self.close()
            raise

    def _open(self, optuna: Any) -> Study:
        """Return the study, a new one where there is none. Raises ConfigError where it is of
        another objective."""
        directions = ["maximize" if each.grows else "minimize" for each in self.sweep.objective]
        study = optuna.create_study(
            storage=self._storage(), study_name=self.sweep.name, directions=directions, load_if_exists=True,
            pruner=self._pruner(),
        )  # fmt: skip
        names = [each.metric for each in self.sweep.objective]
        known = study.user_attrs.get("objective", names)
        stored = [each.name.lower() for each in study.directions]
        if known != names or stored != directions:
            raise ConfigError(
                f"objective: {', '.join(names)}, but {self.folder} is a sweep for {', '.join(known)}; take another "
                "name for this one"
            )
        study.set_user_attr("objective", names)
        return study

    def _storage(self) -> Any:
        if self.sweep.storage != "journal":
            return self.sweep.storage
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        lock: Any = FileLock(self.folder / "workers" / "journal")
        return JournalStorage(JournalFileBackend(str(self.folder / "journal.log"), lock_obj=lock))

    def _sampler(self, number: int) -> BaseSampler:
        """Return the sampler of the trial that is asked for after `number` others, by any
        worker."""
        from optuna import samplers

        seed = self.sweep.seed + number
        if self.sweep.sampler == "tpe":
            # `group` for spaces with conditions; `constant_liar` keeps workers that ask at the same
            # time from trying the same place.
            return samplers.TPESampler(seed=seed, multivariate=True, group=True, constant_liar=True)
        if self.sweep.sampler == "gp":
            return samplers.GPSampler(seed=seed)
        return samplers.RandomSampler(seed=seed)  # a grid's points are given to it

    def _pruner(self) -> BasePruner:
        from optuna import pruners

        if self.sweep.pruner == "median":
            return pruners.MedianPruner()
        if self.sweep.pruner == "hyperband":
            # Resources are steps: from the first validation to the last step.
            return pruners.HyperbandPruner(
                min_resource=max(1, min(self._first_report, self._steps or self._first_report)),
                max_resource=self._steps or "auto",
            )
        return pruners.NopPruner()

    def next_trial(self) -> tuple[Trial, dict[str, Any]] | None:
        """Return a trial to run with its settings, or None where the budget is used up."""
        from optuna.trial import TrialState

        with self._asking:
            # Before anything is counted: what they queue comes before new trials.
            self._give_away(self._dead(), died=True)
            trials = self.study.get_trials(deepcopy=False)
            waiting = [trial for trial in trials if trial.state == TrialState.WAITING]
            asked = len(own_trials(trials))
            if not waiting and asked >= self.sweep.budget:
                return None
            if not waiting and self.sweep.sampler == "grid":
                point = self.sweep.grid_points[asked]
                self.study.enqueue_trial({key: encoded(value) for key, value in point.items()})
            # A sampler anew for each trial, seeded by their number: whichever worker asks, the same
            # trials so far lead to the same next one.
            self.study.sampler = self._sampler(len(trials))
            trial = self.study.ask()
            trial.set_user_attr(WORKER, self.worker)
            # One that goes on with another's run has its name already.
            if RUN not in trial.user_attrs:
                trial.set_user_attr(RUN, f"trial-{trial.number:04d}")
            return trial, self._choose(trial)

    def _choose(self, trial: Trial) -> dict[str, Any]:
        """Return the settings of a trial, which the sampler chooses where they are not given
        already."""

        def suggest(key: str, dimension: Dimension) -> Any:
            if dimension.values is not None:
                spelled = [encoded(value) for value in dimension.values]
                chosen = trial.suggest_categorical(key, spelled)
                return dimension.values[spelled.index(chosen)]
            assert dimension.between is not None
            low, high = dimension.between
            if dimension.is_whole:
                return trial.suggest_int(
                    key, int(low), int(high), step=int(dimension.step or 1), log=dimension.log
                )
            return trial.suggest_float(key, low, high, step=dimension.step, log=dimension.log)

        return self.sweep.choose(suggest)

    def tell(
        self, trial: Trial, outcome: str, values: Sequence[float] | None, pruned: bool = False
    ) -> None:
        """Note what became of a trial: its `values`, or else whether it was `pruned` or failed, and
        why in words."""
        from optuna.trial import TrialState

        with self._asking:
            trial.set_user_attr(OUTCOME, outcome)
            if values is not None:
                self.study.tell(trial, list(values))
            else:
                # What is far from good is told to the sampler, which passes over failures; of
                # several objectives it cannot be told.
                is_told = pruned and len(self.sweep.objective) == 1
                self.study.tell(trial, state=TrialState.PRUNED if is_told else TrialState.FAIL)

    def give_back(self, trials: Sequence[Trial], died: bool = False) -> None:
        """Let another worker, or the next start, go on with the runs of `trials`, which stopped
        when they were asked to, or `died`."""
        numbers = {trial.number for trial in trials}
        with self._asking:
            given = [
                each for each in self.study.get_trials(deepcopy=False) if each.number in numbers
            ]
            self._give_away(given, died)

    def _give_away(self, trials: Sequence[FrozenTrial], died: bool) -> None:
        """Fail trials whose workers are gone, and queue others that go on with the same runs."""
        from optuna.trial import TrialState

        for trial in trials:
            deaths = trial.user_attrs.get(DEATHS, 0) + died
            run = trial.user_attrs.get(RUN, f"trial-{trial.number:04d}")
            self.study.tell(trial.number, state=TrialState.FAIL)
            if deaths < MOST_DEATHS:
                attributes = {RUN: run, GOES_ON: trial.number, DEATHS: deaths}
                self.study.enqueue_trial(trial.params, user_attrs=attributes)

    def _dead(self) -> list[FrozenTrial]:
        """Return the trials that run on workers which are no more."""
        from optuna.trial import TrialState

        running = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        return [trial for trial in running if not self._lives(trial.user_attrs.get(WORKER))]

    def _lives(self, worker: str | None) -> bool:
        """Return whether a worker holds its lock still. One that died before it noted its name does
        not."""
        if worker is None or not self._path_of(worker).exists():
            return False
        lock = FileLock(self._path_of(worker))
        # A process's own worker file is locked as well: a second open file does not get the lock.
        if not lock.try_once():
            return True
        lock.let_go()
        return False

    def _path_of(self, worker: str) -> Path:
        return self.folder / "workers" / worker

    def alone(self) -> FileLock:
        """Return the lock under which trials are counted, chosen and finished, for writing a
        report."""
        return self._asking

    def close(self) -> None:
        """Let others know that this worker has left."""
        self._path_of(self.worker).unlink(missing_ok=True)
        self._alive.release()


def own_trials(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Return the trials without those whose runs later ones went on with."""
    gone = {trial.user_attrs.get(GOES_ON) for trial in trials}
    return [trial for trial in trials if trial.number not in gone]


def _optuna() -> Any:
    """Import optuna, and keep it quiet. Raises ConfigError where it is not installed."""
    try:
        import optuna
    except ImportError:
        raise ConfigError("a sweep needs optuna: pip install 'megalite[sweep]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    return optuna


@contextlib.contextmanager
def _told(storage: str) -> Iterator[None]:
    """Turn whatever opening a database raises into a ConfigError."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"storage: {storage} cannot be opened: {type(error).__name__}: {error}"
        ) from None
