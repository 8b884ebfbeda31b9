"""A run folder has one run at a time: another one's lines in its metrics and files in its
checkpoints would be the end of both."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megalite.errors import ConfigError
from megalite.runtime import run_folder
from megalite.runtime.exit_codes import Exit, passes
from megalite.runtime.run_folder import KEPT_CONFIGS, write_config
from megalite.train import train
from small_runs import make_config

HOLDS = """
import sys, time
from pathlib import Path
from megalite.runtime.run_folder import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_start_waits_and_ends_without_having_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_folder, "LOCK_PATIENCE_S", 0.0)
    config = make_config(tmp_path)
    folder = config.run.folder
    command = [sys.executable, "-c", HOLDS, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        holder = f"process {other.pid} on {os.uname().nodename}"
        with pytest.raises(
            ConfigError, match=f"is being written by {re.escape(holder)}.*; end that run"
        ) as error:
            train(config)
        assert f"waiting for {holder}" in capsys.readouterr().out
        assert passes(error.value), "a launcher comes again"
        assert os.listdir(folder) == ["lock"]
        other.kill()  # which takes its lock away
    assert train(config) == Exit.DONE
    assert f"process {os.getpid()} on" in (folder / "lock").read_text()


def test_a_config_that_is_no_text_is_kept_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(b"\xff")
    kept = write_config(tmp_path, "new: 1\n", 3)
    assert kept is not None
    assert kept.read_bytes() == b"\xff"
    assert (tmp_path / "config.yaml").read_text() == "new: 1\n"


def test_the_configs_of_the_last_starts_are_kept(tmp_path: Path) -> None:
    steps = [3, 7, 7, *range(8, 40), 2]
    for number, step in enumerate(steps):
        write_config(tmp_path, f"start: {number}\n", step)
    kept = [path.read_text() for path in tmp_path.glob("config.until-step-*.yaml")]
    # What a start finds is the config of the one before it.
    assert sorted(kept) == sorted(
        f"start: {number}\n" for number in range(len(steps) - 1 - KEPT_CONFIGS, len(steps) - 1)
    )
