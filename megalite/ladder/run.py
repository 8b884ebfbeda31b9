"""Runs `megalite ladder`: trains the rungs that are missing, fits the law, and writes a report."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import yaml

from megalite.errors import ConfigError
from megalite.ladder.config import LadderConfig, Rung, load_ladder_config
from megalite.ladder.fit import Runs
from megalite.ladder.report import write_report
from megalite.plan import smallest_world
from megalite.runtime.exit_codes import Exit
from megalite.sweep.config import Metric
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
    with ThreadPoolExecutor(ladder.parallel) as pool:
        pending = [pool.submit(loss_of, ladder, rung) for rung in rungs]
        try:
            losses = [each.result() for each in pending]
        finally:  # after a failure nothing new is begun
            pool.shutdown(wait=False, cancel_futures=True)
    numbers = ([rung.parameters for rung in rungs], [rung.tokens for rung in rungs], losses)
    runs = Runs(*(np.array(each, float) for each in numbers))
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


def loss_of(ladder: LadderConfig, rung: Rung) -> float:
    """Return the last validation loss of a run, which is trained, or gone on with, where it has
    not come to its end. Raises ConfigError where it fails."""
    folder = ladder.folder / rung.name
    done = folder / DONE
    if done.exists():
        return float(json.loads(done.read_text(encoding="utf-8")))
    ranks = ladder.ranks or smallest_world(rung.config)
    cores = len(os.sched_getaffinity(0)) // (ladder.parallel * ranks)
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, cores)))
    run = TrialRun(folder, rung.values, ranks, {"OMP_NUM_THREADS": threads})
    run.start()
    status = run.wait(None)
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
