"""CUDA kernels compile for every GPU that the build names, on machines without one."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = sorted((Path(__file__).parents[2] / "csrc" / "ops" / "cuda").glob("*.cu"))
GPUS = ("80", "90a", "100")


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc on the PATH")
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_compiles_without_warnings(source: Path, tmp_path: Path) -> None:
    targets = [f"-gencode=arch=compute_{gpu},code=sm_{gpu}" for gpu in GPUS]
    command = ["nvcc", "-std=c++17", "-O3", "-Werror", "all-warnings", *targets, "-c", source, "-o", tmp_path / "out.o"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
