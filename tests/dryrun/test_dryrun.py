"""The training program run dry: what it needs and sends, on layouts of a cluster that is not
there."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from dry_runs import built
from megalite.cli import main
from megalite.config_file import parse_config
from megalite.dryrun import device
from megalite.dryrun.data import Start, dry_config
from megalite.dryrun.run import run_jobs

WITHIN = 0.02  # of the plan: what a GPU's allocator adds comes on top of both


@pytest.fixture
def config(tmp_path: Path) -> Path:
    values = {
        "run": {"name": "dry", "dir": str(tmp_path / "runs")},
        "model": {"preset": "llama-8b", "num_layers": 4},
        "data": {"train": [{"path": "nowhere/tokens"}], "split": [98, 2, 0], "seq_length": 4096},
        "parallel": {"tensor": 4, "pipeline": 2, "zero_stage": 1},
        "train": {"steps": 1000, "global_batch_size": 16},
        "optimizer": {"lr": 1.0e-4},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def dryrun(
    config: Path, capsys: pytest.CaptureFixture[str], *options: str, gpus: int = 16
) -> tuple[int, str]:
    status = main(["dryrun", str(config), "--gpus", str(gpus), "--gpu", "h200", *options])
    said = capsys.readouterr()
    return status, said.out + said.err


# As published speeds are planned (tests/planner/test_planner_experts_published.py), with fewer micro-batches.
EXPERTS = {
    "qwen3-30b-a3b": (16, "h100", {"expert": 16}, 32, "selective"),
}  # fmt: skip


@built
@pytest.mark.parametrize("preset", EXPERTS)
def test_mixtures_of_experts_need_what_the_plan_says(
    config: Path, capsys: pytest.CaptureFixture[str], pytestconfig: pytest.Config, preset: str
) -> None:
    if not pytestconfig.getoption("--whole"):
        pytest.skip("minutes: layers of 128 and 256 experts, micro-batch after micro-batch")
    gpus, gpu, parallel, batch, recompute = EXPERTS[preset]
    values = yaml.safe_load(config.read_text()) | {"model": {"preset": preset}}
    values["parallel"] = {"expert_tensor": 1, "zero_stage": 1, **parallel}
    values["train"] = {"steps": 5, "global_batch_size": batch, "recompute": recompute}
    values["data"]["split"] = [100, 0, 0]
    config.write_text(yaml.safe_dump(values))
    assert main(["dryrun", str(config), "--gpus", str(gpus), "--gpu", gpu]) == 0
    said = capsys.readouterr().out
    ranks = re.findall(r"^rank \d+ .* ([\d.]+) +([\d.]+)[+-][\d.]+% +[\d.]+ +[\d.]+$", said, re.M)
    assert len(ranks) == parallel.get("pipeline", 1)
    for peak, planned in ranks:
        assert float(planned) == pytest.approx(float(peak), rel=WITHIN)


def test_a_run_of_one_step_is_run_dry_for_more(config: Path, tmp_path: Path) -> None:
    """What a plan is about are the steps after the first."""
    values = yaml.safe_load(config.read_text())
    values["train"]["steps"] = 1
    train = dry_config(parse_config(values), tmp_path, Start(3)).train
    assert (train.steps, train.stop_at) == (3, 3)


@built
def test_ranks_of_a_cluster_need_what_the_plan_says(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, said = dryrun(config, capsys)
    assert status == 0, said
    ranks = re.findall(r"^rank (\d+) .* ([\d.]+) +([\d.]+)[+-][\d.]+% +[\d.]+ +[\d.]+$", said, re.M)
    assert [int(rank) for rank, *_ in ranks] == [0, 3, 8, 11], (
        "both pipeline ranks, at both ends of the tensor axis"
    )
    for _, peak, planned in ranks:
        assert float(planned) == pytest.approx(float(peak), rel=WITHIN)
    assert not (config.parent / "runs").exists(), "nothing is written where the run would be"


def test_lines_are_those_of_megalite_also_where_it_is_imported_through_a_link(
    tmp_path: Path,
) -> None:
    (tmp_path / "megalite").symlink_to(Path(device.__file__).parents[1])
    path = tmp_path / "megalite" / "dryrun" / "device.py"
    spec = importlib.util.spec_from_file_location("linked_device", path)
    assert spec is not None
    assert spec.loader is not None
    linked = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(linked)
    # A frame names the file as it was imported.
    assert linked.open_device.__code__.co_filename.startswith(linked.OWN)
    assert linked.OWN.startswith(linked.PACKAGE)


@built
def test_a_config_that_runs_out_of_memory_is_refused(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, said = dryrun(
        config, capsys, "--ranks", "0", "parallel.tensor=1", "parallel.pipeline=1", "train.micro_batch_size=8",
        "data.seq_length=8192", "--gpu", "a100-40gb", gpus=2,
    )  # fmt: skip
    assert status == 2
    (refused,) = re.findall(
        r"^rank 0 runs out of memory in `(?:first step|training)`: .*$", said, re.M
    )
    assert "a A100 has room for 36.10" in refused
    assert "the most is held at megalite/" in refused
    assert "--search" in refused


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--ranks", "0,16"), "--ranks 0,16: the ranks are 0 to 15"),
        (("--ranks", "some"), "--ranks 'some': `roles`, `all`, or numbers"),
        (
            (
                "parallel.pipeline=1",
                "parallel.engine=deepspeed",
                "parallel.offload.optimizer=cpu",
            ),
            "parallel.offload.optimizer: cpu cannot be run dry",
        ),
        (("kernels.attention=flash_attn",), "kernels.attention: flash_attn cannot be run dry"),
        (("parallel.tensor=3",), "does not divide the 16 rank(s)"),
    ],
)
@built
def test_what_cannot_be_run_dry_is_refused(
    options: tuple[str, ...], said: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, found = dryrun(config, capsys, *options)
    assert status == 2
    assert said in found


def test_beside_a_torch_for_cuda_there_is_no_dry_run(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the module may be there: a wheel for CPUs brings it."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    status, said = dryrun(config, capsys)
    assert status == 2
    assert "this torch is a build with CUDA 13.0; a dry run needs torch's CPU build" in said


def test_ranks_end_with_a_dry_run_that_is_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are forks of another process, which Ctrl-C may reach alone."""
    rank = tmp_path / "rank"
    server = tmp_path / "server"
    server.write_text(
        f"#!/bin/sh\nsleep 60 &\necho $! > {rank}.tmp\nmv {rank}.tmp {rank}\n"
        f"kill -INT {os.getpid()}\nwait\n"
    )
    server.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(server))
    with pytest.raises(KeyboardInterrupt):
        run_jobs([], tmp_path)
    pid = int(rank.read_text())
    deadline = time.monotonic() + 120
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        # One that waits to be reaped has ended.
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            break
        time.sleep(0.05)
    else:
        assert not Path(f"/proc/{pid}").exists(), "the rank goes on"
