"""Ranks killed at any moment: of the hundred trials that tools/bench/faults.py makes, one of each
layout."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

FAULTS = Path(__file__).parents[1] / "tools" / "bench" / "faults.py"


def test_a_run_whose_ranks_are_killed_ends_as_if_they_had_not_been(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(FAULTS),
        "--trials",
        "3",
        "--scenarios",
        "stopped rank",
        "--output",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        "3 ended with the same bits as a run never disturbed"
        in (tmp_path / "report.md").read_text()
    )
    trials = [json.loads(line) for line in (tmp_path / "trials.jsonl").read_text().splitlines()]
    assert [len(trial["kills"]) > 0 for trial in trials] == [True] * 3
    kills = [kill for trial in trials for kill in trial["kills"]]
    assert {kill["layout"] for kill in kills} == {"data 2, ZeRO-1", "tensor 2", "pipeline 2"}
    assert max(kill["lost_steps"] for kill in kills) <= 6, (
        "a checkpoint every 3 steps, the newest perhaps half written"
    )
    assert (tmp_path / "kills.png").stat().st_size > 10_000
