"""CPU kernels compute on aarch64, the processor of Grace hosts, what they compute here: `bash
tools/aarch64.sh --kernels`."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def load_compare() -> Any:
    path = ROOT / "tests" / "aarch64" / "compare.py"
    spec = importlib.util.spec_from_file_location("compare_processors", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.compare


# It compiles for half a minute; a busy machine has less to give.
@pytest.mark.timeout(1800)
def test_cpu_kernels_compute_the_same_on_aarch64(pytestconfig: pytest.Config) -> None:
    whole = pytestconfig.getoption("--whole")
    command = ["bash", str(ROOT / "tools" / "aarch64.sh"), *([] if whole else ["--kernels"])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    assert "aarch64.sh:" in done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ("swiglu.fp32 1 2\nrope.bf16 1 2", ""),
        ("swiglu.fp32 1 2.00001\nrope.bf16 1.0078125 2", ""),
        ("swiglu.fp32 1 2.0001\nrope.bf16 1 2", "swiglu.fp32[1] is 2.0, and 2.0001"),
        ("swiglu.fp32 1 2\nrope.bf16 1.03125 2", "rope.bf16[0]"),
        ("swiglu.fp32 1 nan\nrope.bf16 1 2", "swiglu.fp32[1]"),
        ("swiglu.fp32 1\nrope.bf16 1 2", "swiglu.fp32 of 2 numbers"),
        ("swiglu.fp32 1 2", "2 results"),
    ],
)
def test_numbers_that_differ_are_named(other: str, said: str) -> None:
    found = load_compare()("swiglu.fp32 1 2\nrope.bf16 1 2", other)
    assert bool(found) == bool(said)
    assert said in "".join(found)
