"""Runs phases of tasks with datatrove's executors: on this machine, or submitted to Slurm."""

from __future__ import annotations

import copy
import multiprocessing
import os
import resource
from collections.abc import Iterator
from concurrent.futures import Executor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor
from datatrove.executor.base import PipelineExecutor
from datatrove.pipeline.dedup import minhash
from loguru import logger
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from tqdm import tqdm

from megalite.corpus.config import SlurmConfig
from megalite.errors import DataError
from megalite.runtime.processes import start_worker, worker_pool
from megalite.utils.progress import ProgressMeter


@dataclass(frozen=True)
class Phase:
    """A pipeline of steps, run once for each task (shard)."""

    name: str
    pipeline: list[Any]
    tasks: int


def run_here(phases: list[Phase], logs: Path, workers: int | None, console: Console | None) -> None:
    """Run every task of `phases` that has not finished yet, in `workers` processes (default: one a
    core).

    datatrove's notes go to `logs`, the progress to `console`. Raises what a task raises, and
    DataError when a worker was killed."""
    most_tasks = max(phase.tasks for phase in phases)
    workers = min(workers or len(os.sched_getaffinity(0)), most_tasks)
    # What is killed below are workers of this pool alone.
    before = set(multiprocessing.active_children())
    # datatrove's own pool would wait for ever for a worker that was killed.
    with worker_pool(workers, _start) as pool:
        try:
            for phase in phases:
                # Only for its record of finished tasks; the pool here runs them.
                executor = LocalPipelineExecutor(
                    phase.pipeline, phase.tasks, logging_dir=str(logs / phase.name)
                )
                with _Meter(phase, console) as meter:
                    for num_done in _finished(executor, pool, phase.tasks):
                        meter.update(num_done)
        except BrokenProcessPool:
            raise DataError(
                f"one of {workers} workers was killed, most likely for memory; use fewer workers"
            ) from None
        except BaseException:
            # Do not wait for running tasks: one may take minutes, and will be done anew anyway.
            for child in set(multiprocessing.active_children()) - before:
                child.kill()
            raise


def _finished(executor: PipelineExecutor, pool: Executor | None, tasks: int) -> Iterator[int]:
    """Run the tasks that are left, and yield how many have finished after each."""
    ranks = executor.get_incomplete_ranks()
    yield tasks - len(ranks)
    if pool is None:
        _quiet()
        for number, rank in enumerate(ranks, 1):
            _run_task(copy.deepcopy(executor), rank)
            yield tasks - len(ranks) + number
        return
    # Each submission pickles the executor, and so copies it.
    futures = [pool.submit(_run_task, executor, rank) for rank in ranks]
    # As they end: a task that fails is known at once, not when its turn comes.
    for number, future in enumerate(as_completed(futures), 1):
        future.result()
        yield tasks - len(ranks) + number


def _run_task(executor: PipelineExecutor, rank: int) -> None:
    """Run one task. `executor` must be a copy, so that its steps count this task alone."""
    executor._run_for_rank(rank)


def _start() -> None:
    """Prepare a worker process."""
    start_worker()
    _quiet()
    # MinHash opens a file for every shard at once: raise the soft limit of open files.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _quiet() -> None:
    """Silence datatrove, which prints every step of every task. What matters is in the report, or
    raised."""
    logger.disable("datatrove")
    minhash.tqdm = partial(tqdm, disable=True)


def submit(phases: list[Phase], logs: Path, config: SlurmConfig, workers: int | None) -> None:
    """Submit a job array for each of `phases`, each waiting for the one before. Finished tasks are
    left out.

    At most `workers` tasks run at a time (default: all). `config` holds the jobs' settings;
    datatrove's notes go to `logs`."""
    _quiet()
    executor = None
    for phase in phases:
        executor = SlurmPipelineExecutor(
            phase.pipeline,
            phase.tasks,
            time=config.time,
            partition=config.partition,
            mem_per_cpu_gb=config.mem_per_cpu_gb,
            workers=workers or -1,
            job_name=f"corpus-{phase.name}",
            qos="",  # datatrove asks for `normal`, which a cluster need not have
            env_command=config.setup,
            sbatch_args=config.sbatch,
            max_array_size=config.max_array_size,
            depends=executor,
            logging_dir=str(logs / phase.name),
        )
    assert executor is not None
    executor.run()  # submits the phases it depends on first


class _Meter(ProgressMeter):
    def __init__(self, phase: Phase, console: Console | None) -> None:
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("tasks"), TimeElapsedColumn())
        super().__init__(f"{phase.name:<10}", phase.tasks, columns, console)
        self._name = phase.name

    def update(self, num_done: int) -> None:
        line = f"{self._name}: {num_done} of {self.total} tasks, {self.elapsed:.1f} s"
        self.show(num_done, line, due=num_done == self.total)
