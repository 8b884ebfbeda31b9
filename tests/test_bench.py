"""Benchmarks that are for GPUs run on a CPU as well, so that they are known to run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[1] / "tools" / "bench"


def run(script: str, *arguments: str) -> list[str]:
    command = [sys.executable, str(BENCH / script), "--device", "cpu", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_ops() -> None:
    sizes = {"tokens": 64, "hidden": 32, "inner": 48, "vocabulary": 96, "length": 32}
    options = [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
    lines = run("ops.py", "--no-compile", "--dtype", "float32", "--repeats", "1", *options)
    assert "swiglu" in {line.split()[0] for line in lines if " backward " in line}
    assert "adamw_" in {line.split()[0] for line in lines if " forward " in line}


def test_gpu_step() -> None:
    lines = run(
        "gpu_step.py",
        "--preset",
        "llama-1m",
        "--seq-length",
        "32",
        "--steps",
        "2",
        "--only",
        "megalite",
    )
    measured = json.loads(lines[-1])
    assert len(measured["seconds"]) == len(measured["ceilings"]) == 2
    assert min(measured["seconds"] + measured["ceilings"]) > 0


def test_gpu_peaks() -> None:
    *_, last = run("gpu_peaks.py")
    assert last.startswith("| toy | 0.00 | ")
    assert last.endswith(" | not measured |")


def test_gpu_step_of_a_changed_model_is_of_megalite_alone() -> None:
    options = ("--preset", "llama-1m", "--seq-length", "32", "--steps", "1", "model.num_layers=1")
    lines = run("gpu_step.py", *options)
    assert [line.split()[0] for line in lines[4:]] == ["megalite"]
