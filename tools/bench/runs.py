"""Ordinary runs of `megalite train` for benchmarks, one core each, on the data of
tools/quickstart.sh."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

DATA = Path("data/quickstart")
SPLITS = {
    "train": [{"path": str(DATA / "train_text_document")}],
    "valid": [{"path": str(DATA / "valid_text_document")}],
}


def train(name: str, config: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Train the run `name` below `folder`, or go on with it; return the lines of its metrics."""
    file = folder / f"{name}.yaml"
    file.write_text(json.dumps({"run": {"name": name, "dir": str(folder / "runs")}, **config}))
    done = subprocess.run(
        [sys.executable, "-m", "megalite", "train", str(file)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]
