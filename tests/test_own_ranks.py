"""pytest leaves no rank behind, however it is ended: it would compute on, and hold its memory,
until somebody looks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ENDLESS = """
import os, time
from pathlib import Path
from ranks import run_ranks

def endless(rank, world_size):
    Path(os.environ["READY"], str(rank)).touch()
    time.sleep(600)

def test_endless():
    run_ranks(2, endless)
"""


def members(session: int) -> list[int]:
    """Processes of a session that are no zombies."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, of, *_ = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(of) == session and state != "Z":
            found.append(int(status.parent.name))
    return found


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="it is Linux that ends processes with their parent"
)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_rank_outlives_pytest(
    tmp_path: Path, number: signal.Signals, pytestconfig: pytest.Config
) -> None:
    if number == signal.SIGKILL and not pytestconfig.getoption("--whole"):
        pytest.skip("of the two, SIGTERM is the one that jobs get")
    (tmp_path / "test_endless.py").write_text(ENDLESS)
    paths = os.pathsep.join(map(str, (tmp_path, TESTS, TESTS.parent)))
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-q", "-p", "conftest", "-p", "no:cacheprovider", "test_endless.py"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": paths, "READY": str(tmp_path)}, start_new_session=True,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while not all((tmp_path / rank).exists() for rank in "01"):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert len(members(process.pid)) >= 4, "pytest, the server of ranks, and two of these"
        process.send_signal(number)
        process.wait(120)
        deadline = time.monotonic() + 120
        while left := members(process.pid):
            assert time.monotonic() < deadline, left
            time.sleep(0.05)
    finally:
        for member in members(process.pid):
            os.kill(member, signal.SIGKILL)
