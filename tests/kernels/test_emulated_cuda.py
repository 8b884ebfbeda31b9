"""CUDA kernels pass their tests on machines without a GPU: `bash tools/emulated_cuda.sh`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from exactness import needs_kernels

ROOT = Path(__file__).parents[2]


@needs_kernels
# It compiles for a minute, and then takes another; a busy machine has less to give.
@pytest.mark.timeout(1800)
def test_cuda_kernels_pass_their_tests_on_an_emulated_device() -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = ["bash", ROOT / "tools" / "emulated_cuda.sh"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PATH": path})
    if done.returncode == 77:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    said = done.stdout + done.stderr
    first = next((line[1:].strip() for line in said.splitlines() if line.startswith("E  ")), "")
    assert done.stdout.endswith("emulated_cuda.sh: nothing found\n"), f"{first}\n{said[-5000:]}"
