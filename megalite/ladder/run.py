"""Runs `megalite ladder`: trains the rungs that are missing, fits the law, and writes a report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megalite.ladder.config import load_ladder_config
from megalite.ladder.fit import Runs
from megalite.ladder.report import write_report
from megalite.plan import smallest_world
from megalite.runtime.exit_codes import Exit
from megalite.sweep.side_by_side import Job, SideBySide, check_same


def run_ladder(path: Path, overrides: Sequence[str] = ()) -> Exit:
    """Train the ladder that a YAML file describes, or go on with it, and say what was found.

    Raises ConfigError for a mistake, before the first run, and for a run that fails."""
    ladder = load_ladder_config(path, overrides)
    rungs = {rung.name: rung for rung in ladder.rungs()}
    jobs = []
    for name, rung in rungs.items():
        check_same(ladder.folder / name, rung.values, "give the ladder another name")
        jobs.append(Job(name, rung.values, ladder.ranks or smallest_world(rung.config)))

    def tell(job: Job, loss: float) -> None:
        rung = rungs[job.name]
        size = f"{rung.parameters:,.0f} parameters, {rung.tokens:,} tokens"
        print(f"{job.name}: {size}: {loss:.4f}", flush=True)

    losses = SideBySide(ladder.folder, jobs, ladder.parallel).losses(tell)
    runs = Runs(
        np.array([rung.parameters for rung in rungs.values()], float),
        np.array([rung.tokens for rung in rungs.values()], float),
        np.array(losses, float),
    )
    for line in write_report(ladder, list(rungs.values()), runs):
        print(line, flush=True)
    return Exit.DONE
