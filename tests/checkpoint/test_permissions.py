"""A team opens what one of it has trained."""

from __future__ import annotations

import os
from pathlib import Path

from megalite.cli import main
from megalite.infer.generate import find_model
from megalite.train import train
from small_runs import make_config


def test_weights_may_be_read_by_whom_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        config = make_config(tmp_path, "llama", "train.steps=1", "checkpoint.every=0")
        train(config)
        assert main(["convert", str(config.run.folder), str(tmp_path / "out")]) == 0
    finally:
        os.umask(before)
    files = [*find_model(config.run.folder).rglob("*"), *(tmp_path / "out").iterdir()]
    modes = {path.name: path.stat().st_mode & 0o777 for path in files if path.is_file()}
    assert {*modes.values()} == {0o640}, modes
