"""How runs beside each other share a machine: its GPUs, and the threads of its CPU."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence

from megalite.errors import ConfigError


def gpus_for(parallel: int, ranks: int) -> list[str]:
    """Return this machine's GPUs by the names that CUDA_VISIBLE_DEVICES gives them; none without
    any. Raises ConfigError where they are too few for `parallel` runs of so many `ranks` each."""
    found = _visible_gpus()
    if found and len(found) < parallel * ranks:
        raise ConfigError(
            f"parallel: {parallel} runs of {ranks} ranks each need {parallel * ranks} GPUs, and this machine has "
            f"{len(found)}; lower parallel, or ranks"
        )
    return found


def _visible_gpus() -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name]
    if not shutil.which("nvidia-smi"):
        return []
    # Asked of the driver: torch would make a CUDA context in this process, which only waits.
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    lines = listed.stdout.splitlines()
    # The parts of a GPU (MIG) stand below it, indented.
    return [str(number) for number, line in enumerate(lines) if line.startswith("GPU ")]


def share(number: int, parallel: int, ranks: int, gpus: Sequence[str]) -> dict[str, str]:
    """Return the variables that give the run in place `number`, of `parallel` at a time with so many
    `ranks` each, its share of the machine. `gpus` are those of `gpus_for`."""
    found = {}
    if "OMP_NUM_THREADS" not in os.environ:
        # What the process may use, which a batch system or a container limits.
        cores = len(os.sched_getaffinity(0)) // (parallel * ranks)
        found["OMP_NUM_THREADS"] = str(max(1, cores))
    if gpus:
        found["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[number * ranks : (number + 1) * ranks])
    return found
