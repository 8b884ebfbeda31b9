"""environment.json: on what and with what each start of a run was computed, and how it ended.

Rank 0 writes it, for its own machine; Slurm's variables name the other nodes of a job."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from megalite import __version__
from megalite.errors import DataError
from megalite.utils.files import replacing
from megalite.utils.outside import read_object
from megalite.utils.secrecy import hide_secrets

NAME = "environment.json"
KEPT = 50
"""Starts that are kept, the newest."""
PACKAGES = (
    "torch", "numpy", "pydantic", "safetensors", "tokenizers", "transformers", "gigatoken", "sentencepiece",
    "deepspeed", "flash_attn", "apex", "triton", "wandb", "lm_eval",
)  # fmt: skip
VARIABLES = (
    "SLURM_",
    "SLURMD_NODENAME",
    "NCCL_",
    "GLOO_",
    "TORCH_",
    "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
)
"""How the names of environment variables begin that are recorded."""
GPUS = Path("/proc/driver/nvidia/gpus")
"""Has a folder for each GPU that NVIDIA's driver knows."""
DRIVER = Path("/proc/driver/nvidia/version")
CHANGES, LONGEST_CHANGES = "changes", 2_000_000
"""Folder of the run's with what was changed and not committed, as `git apply` takes it, and the bytes
of a change above which it is left out."""


class EnvironmentSink:
    """Sink that records the environment of a start, and, when the run ends, how."""

    name = NAME

    def __init__(self, folder: Path, start_step: int, layout: Mapping[str, object], hardware: str):
        """Write the record of a start after `start_step`. `folder` is the run's."""
        self._path, self._step = folder / NAME, start_step
        start = {"time": _now(), "after_step": start_step, "hardware": hardware}
        self._changes = folder / CHANGES
        found = environment()
        for git in found.get("git", {}).values():
            self._keep_changes(git)
        self._starts = [*read_starts(folder), start | {"layout": dict(layout)} | found]
        self._write()

    def step(self, record: dict[str, float]) -> None:
        """Note how far the run is."""
        self._step = int(record["step"])

    def evaluation(self, record: dict[str, float]) -> None:
        """Leave evaluations to the other sinks."""

    tasks = evaluation

    def samples(self, step: int, prompts: Sequence[str], answers: Sequence[str]) -> None:
        """Leave samples to the other sinks."""

    def close(self, status: str) -> None:
        """Write how the run ended: `status` is that of `Recorder.close`."""
        self._starts[-1]["ended"] = {"time": _now(), "status": status, "step": self._step}
        self._write()

    def _keep_changes(self, git: dict[str, Any]) -> None:
        """Write what was changed since a commit to a file named by its content, so that starts with
        the same changes share it; the record has the name in place of the text."""
        text = hide_secrets(git.pop("patch", ""))
        if not text or len(text) > LONGEST_CHANGES:
            return
        name = f"{hashlib.sha256(text.encode()).hexdigest()[:12]}.patch"
        self._changes.mkdir(exist_ok=True)
        with replacing(self._changes / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
        git["patch"] = f"{CHANGES}/{name}"

    def _write(self) -> None:
        text = json.dumps({"starts": self._starts[-KEPT:]}, indent=1, ensure_ascii=False)
        with replacing(self._path) as temporary:
            temporary.write_text(hide_secrets(text), encoding="utf-8")


def read_starts(folder: Path) -> list[dict[str, Any]]:
    """Return the recorded starts of a run, oldest first; none where there is no record, or a damaged
    one."""
    with contextlib.suppress(DataError):
        starts = read_object(folder / NAME, DataError).get("starts")
        if isinstance(starts, list) and all(isinstance(start, dict) for start in starts):
            return starts
    return []


def environment() -> dict[str, Any]:
    """Return this process's command, machine, packages, commits and variables, as JSON can hold
    them."""
    import torch

    found: dict[str, Any] = {
        "command": sys.argv,
        "folder": os.getcwd(),
        "host": os.uname().nodename,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, {platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "driver": _driver(),
        "packages": {"megalite": __version__} | _packages(),
    }
    # Of the code, and of what is being worked on, where that is another repository.
    for name, folder in (("megalite", Path(__file__).parents[2]), ("folder", Path.cwd())):
        if git := commit_of(folder):
            found.setdefault("git", {})[name] = git
    found["variables"] = {
        name: value for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)
    }
    return found


def _driver() -> str | None:
    """Return the version of NVIDIA's driver; None where there is none."""
    with contextlib.suppress(OSError):
        if found := re.search(r"Kernel Module.*?(\d+(?:\.\d+)+)", DRIVER.read_text()):
            return found[1]
    return None


def _packages() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def commit_of(folder: Path) -> dict[str, Any] | None:
    """Return the commit that is checked out in `folder`, the files changed since, and the changes as
    a patch, where there are any; None where there is no commit."""

    def git(*arguments: str) -> str:
        # A repository's own settings could name programs to run.
        plain = ["git", "-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null"]
        return subprocess.run(
            [*plain, "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout

    try:
        commit = git("rev-parse", "HEAD").strip()
        # Without untracked files: listing a folder of data takes minutes, and a patch has none of them.
        changed = git("status", "--porcelain", "--untracked-files=no").splitlines()
    except (OSError, subprocess.SubprocessError):
        return None
    found = {"commit": commit, "changed": [line[3:] for line in changed[:100]]}
    # What takes too long, or is no text, is worth less than the rest.
    with contextlib.suppress(OSError, UnicodeDecodeError, subprocess.SubprocessError):
        if changed and (patch := git("diff", "--no-ext-diff", "--no-textconv", "HEAD")):
            found["patch"] = patch
    return found


def hardware_of(device_type: str, world_size: int) -> str:
    """Return what a run computes on, such as `2 × CPU (gloo)` or `8 × NVIDIA H100 80GB HBM3
    (nccl)`. `device_type` is torch's: "cpu" or "cuda"."""
    import torch

    name = torch.cuda.get_device_name() if device_type == "cuda" else "CPU"
    backend = {"cuda": "nccl"}.get(device_type, "gloo")
    return f"{world_size} × {name}" + (f" ({backend})" if world_size > 1 else "")


def unused_gpus(device_type: str) -> str | None:
    """Return a warning where this machine has GPUs that a run on the CPU does not see, and that
    nobody has hidden from it; else None."""
    import torch

    if device_type != "cpu" or os.environ.get("CUDA_VISIBLE_DEVICES") is not None:
        return None
    count = len(list(GPUS.glob("*"))) if GPUS.is_dir() else 0
    if not count:
        return None
    why = (
        f"the driver is older than CUDA {torch.version.cuda} asks for, or cannot be reached"
        if torch.version.cuda
        else "this torch is built for CPUs only; install one for CUDA"
    )
    return (
        f"warning: this machine has {count} GPUs, of which torch sees none: {why} "
        "(CUDA_VISIBLE_DEVICES= says that CPUs are meant)"
    )


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
