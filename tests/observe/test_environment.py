"""environment.json: what a start ran on, kept over resumes and without secrets."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megalite.observe import environment
from megalite.observe.environment import (
    NAME,
    EnvironmentSink,
    commit_of,
    hardware_of,
    read_starts,
    unused_gpus,
)
from megalite.train import train
from small_runs import make_config


def test_a_run_records_what_it_ran_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node[1-4]")
    monkeypatch.setenv("NCCL_API_KEY", "abcdefgh1234")
    monkeypatch.setattr(sys, "argv", ["megalite", "train", "run.name=hf_aaaaaaaaaaaaaaaaaaaa"])
    config = make_config(tmp_path, "llama", "train.stop_at=4")
    train(config)
    assert "1 × CPU  data 1" in capsys.readouterr().out
    train(make_config(tmp_path, "llama", "train.stop_at=8"))
    first, second = read_starts(config.run.folder)
    assert first["hardware"] == "1 × CPU"
    assert first["layout"]["data"] == 1
    assert first["packages"]["torch"] == torch.__version__
    assert first["variables"]["SLURM_JOB_NODELIST"] == "node[1-4]"
    written = (config.run.folder / NAME).read_text()
    assert first["command"][:2] == ["megalite", "train"]
    assert "abcdefgh1234" not in written
    assert "hf_aaaa" not in written
    ends = [
        (each["after_step"], each["ended"]["status"], each["ended"]["step"])
        for each in (first, second)
    ]
    assert ends == [(0, "stopped", 4), (4, "stopped", 8)]


def test_a_start_that_was_killed_has_no_end_and_a_damaged_record_stops_nothing(
    tmp_path: Path,
) -> None:
    EnvironmentSink(tmp_path, 0, {}, "1 × CPU").step({"step": 3})
    assert "ended" not in read_starts(tmp_path)[0]
    for text in ("{", "[]", '{"starts": 3}', '{"starts": [3]}'):
        (tmp_path / NAME).write_text(text)
        assert read_starts(tmp_path) == []
        EnvironmentSink(tmp_path, 3, {}, "1 × CPU").close("failed")
        assert json.loads((tmp_path / NAME).read_text())["starts"][0]["ended"]["status"] == "failed"


def test_the_commit_and_what_has_changed_since(tmp_path: Path) -> None:
    assert commit_of(tmp_path) is None
    (tmp_path / "a.py").write_text("1")
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init", "-q"], ["add", "a.py"], [*author, "commit", "-qm", "x"]):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True)
    found = commit_of(tmp_path)
    assert found is not None
    assert len(found["commit"]) == 40
    assert found["changed"] == []
    (tmp_path / "a.py").write_text("2")
    changed = commit_of(tmp_path)
    assert changed is not None
    patch = changed.pop("patch")
    assert changed == found | {"changed": ["a.py"]}
    # It leads from the commit to what was run.
    (tmp_path / "a.py").write_text("1")
    subprocess.run(["git", "apply"], cwd=tmp_path, input=patch, text=True, check=True)
    assert (tmp_path / "a.py").read_text() == "2"


def test_changes_are_kept_once_without_secrets_and_the_driver_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = tmp_path / "version"
    version.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu\n")
    monkeypatch.setattr(environment, "DRIVER", version)
    patch = "+key = hf_aaaaaaaaaaaaaaaaaaaa\n"
    monkeypatch.setattr(environment, "commit_of", lambda _: {"commit": "c", "patch": patch})
    for step in (0, 3):
        EnvironmentSink(tmp_path, step, {}, "1 × CPU")
    [file] = (tmp_path / "changes").iterdir()
    assert file.read_text() == "+key = <token>\n"
    for start in read_starts(tmp_path):
        assert start["driver"] == "570.86.15"
        assert start["git"]["folder"] == {"commit": "c", "patch": f"changes/{file.name}"}
    monkeypatch.setattr(environment, "LONGEST_CHANGES", 5)
    EnvironmentSink(tmp_path, 6, {}, "1 × CPU")
    assert read_starts(tmp_path)[-1]["git"]["folder"] == {"commit": "c"}


def test_hardware_is_named_and_gpus_that_are_not_seen_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert hardware_of("cpu", 2) == "2 × CPU (gloo)"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    assert hardware_of("cuda", 8) == "8 × NVIDIA H100 (nccl)"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(environment, "GPUS", tmp_path)
    assert unused_gpus("cpu") is None
    (tmp_path / "0000:01:00.0").mkdir()
    assert "this machine has 1 GPUs, of which torch sees none" in str(unused_gpus("cpu"))
    assert unused_gpus("cuda") is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert unused_gpus("cpu") is None, "hidden on purpose"
