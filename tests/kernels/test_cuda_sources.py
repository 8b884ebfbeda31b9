"""CUDA kernels compile for every GPU that the build names, on machines without one, and fit where
they are launched."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = sorted((Path(__file__).parents[2] / "csrc" / "ops" / "cuda").glob("*.cu"))
GPUS = ("80", "90a", "100")
REGISTERS, MOST_THREADS = 65536, 1024
"""Of a multiprocessor of these GPUs; and of a block, as csrc/ops/cuda/common.cuh launches them."""
KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<gpu>\w+)'.*?(?P<stack>\d+) bytes stack frame, "
    r"(?P<stores>\d+) bytes spill stores.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def too_large(report: str) -> list[str]:
    """Kernels of which ptxas says that their numbers do not fit into registers, or that a block has
    too few of them: the first are slow, the others cannot be launched. Raises AssertionError where
    it names no kernel."""
    found = [match.groupdict() for match in KERNEL.finditer(report)]
    assert len(found) == report.count("Compiling entry function") > 0, report[:2000]
    return [
        f"{kernel['name']} on {kernel['gpu']}: {kernel['registers']} registers, {kernel['stack']} bytes of stack"
        for kernel in found
        if int(kernel["stack"]) + int(kernel["stores"])
        or int(kernel["registers"]) > REGISTERS // MOST_THREADS
    ]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc on the PATH")
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_compiles_without_warnings_into_what_fits(source: Path, tmp_path: Path) -> None:
    targets = [f"-gencode=arch=compute_{gpu},code=sm_{gpu}" for gpu in GPUS]
    command = ["nvcc", "-std=c++17", "-O3", "-Werror", "all-warnings", "-Xptxas", "-v", *targets]
    done = subprocess.run(
        [*command, "-c", source, "-o", tmp_path / "out.o"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert too_large(done.stderr) == []
    assert {match["gpu"] for match in KERNEL.finditer(done.stderr)} == set(GPUS)


def test_a_report_of_registers_is_read() -> None:
    report = """ptxas info    : Compiling entry function '_Zab' for 'sm_80'
ptxas info    : Function properties for _Zab
    {stack} bytes stack frame, {spilled} bytes spill stores, {spilled} bytes spill loads
ptxas info    : Used {registers} registers, used 1 barriers, 128 bytes smem, 464 bytes cmem[0]
"""
    fine = report.format(stack=0, spilled=0, registers=64)
    assert too_large(fine) == []
    for stack, spilled, registers in ((8, 0, 64), (0, 4, 64), (0, 0, 65)):
        assert (
            len(too_large(fine + report.format(stack=stack, spilled=spilled, registers=registers)))
            == 1
        )
