"""csrc/data under AddressSanitizer and UndefinedBehaviorSanitizer: `bash tools/sanitize.sh`."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_sanitizers_find_nothing_in_csrc_data(pytestconfig: pytest.Config) -> None:
    if not pytestconfig.getoption("--whole"):
        pytest.skip("it builds for a minute; --whole")
    if shutil.which("g++") is None:
        pytest.skip("there is no g++")
    done = subprocess.run(["bash", ROOT / "tools" / "sanitize.sh"], capture_output=True, text=True)
    assert done.stdout.endswith("sanitize.sh: nothing found\n"), (done.stdout + done.stderr)[-5000:]
