"""Runs ranks of a dry run, each in a process of its own: `python -m megalite.dryrun.server JOBS
FOLDER AT_ONCE`.

What all ranks need is imported once; then every rank is a fork. JOBS is a file of jobs, a JSON
object a line; the record of the job in line N, from 0, is written to FOLDER/N.json."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from megalite.dryrun.deepspeed import import_deepspeed
from megalite.dryrun.device import open_device
from megalite.dryrun.rank import Job, run_rank


def main(jobs: str, folder: str, at_once: str) -> None:
    """Run every job, `at_once` at a time."""
    wanted = [Job(**json.loads(line)) for line in Path(jobs).read_text().splitlines()]
    device, places = open_device(wanted[0].chip, wanted[0].gpus_per_node)
    # Before the forks, so that no rank imports it again.
    import torch._meta_registrations  # noqa: F401

    import megalite.parallel.pipeline
    import megalite.train  # noqa: F401

    if any(job.engine == "deepspeed" for job in wanted):
        import_deepspeed()

    running: set[int] = set()
    for number, job in enumerate(wanted):
        if len(running) == int(at_once):
            running.discard(os.wait()[0])
        sys.stdout.flush()
        process = os.fork()
        if process == 0:
            began = time.perf_counter()
            record = run_rank(job, device, places)
            record.seconds = time.perf_counter() - began
            path = Path(folder) / f"{number}.json"
            path.with_suffix(".tmp").write_text(json.dumps(record.as_json()))
            path.with_suffix(".tmp").replace(path)
            sys.stdout.flush()
            os._exit(0)
        running.add(process)
    for process in running:
        os.waitpid(process, 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
