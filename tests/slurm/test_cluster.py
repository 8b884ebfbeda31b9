"""The launcher on a real Slurm of two nodes: a job that is stopped near its limit, and then loses a node, finishes all
the same, on the very curve of a run that was never stopped."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megalite.config import Config
from small_runs import curve_of, make_config

ROOT = Path(__file__).parents[2]
NEEDED = ("munged", "slurmctld", "slurmd", "sbatch")
STEPS = 240
SETTINGS = (f"train.steps={STEPS}", "checkpoint.every=30", "observe.eval_every=0", "observe.log_every=20")


class Cluster:
    def __init__(self, folder: Path):
        # One rank a node, on the CPU.
        self.env = os.environ | {"DIR": str(folder), "SLURM_CONF": f"{folder}/slurm.conf", "RANKS": "1"}

    def run(self, *command: str | Path) -> str:
        done = subprocess.run([*map(str, command)], cwd=ROOT, env=self.env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def script(self, *arguments: str) -> str:
        return self.run("bash", ROOT / "tests" / "slurm" / "cluster.sh", *arguments)

    def state(self, job: str) -> str:
        return self.run("squeue", "--noheader", f"--jobs={job}", "--states=all", "--format=%T")


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    missing = [program for program in NEEDED if shutil.which(program) is None]
    if missing:
        pytest.skip(f"a Slurm on this machine needs {', '.join(missing)}: apt-get install slurm-wlm munge")
    if os.geteuid() != 0:
        pytest.skip("a Slurm on this machine needs root")
    cluster = Cluster(tmp_path / "slurm")
    try:
        cluster.script("up")
        yield cluster
    finally:
        cluster.script("down")


def until(true: Callable[[], object], what: str, seconds: float = 90.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.1)


def steps_done(config: Config) -> int:
    metrics = config.run.folder / "metrics.jsonl"
    return metrics.read_text().count('"loss"') if metrics.exists() else 0


def test_a_job_outlives_its_time_limit_and_a_lost_node(cluster: Cluster, tmp_path: Path) -> None:
    unbroken, config = (make_config(tmp_path, "llama", f"run.name={name}", *SETTINGS) for name in ("unbroken", "job"))
    for each in (unbroken, config):
        (tmp_path / f"{each.run.name}.yaml").write_text(each.to_yaml())
    log = tmp_path / "job.log"
    job = cluster.run(
        *("sbatch", "--parsable", "--nodes=2", "--gpus-per-node=0", "--cpus-per-task=1", f"--output={log}"),
        *("slurm/pretrain.sh", tmp_path / "job.yaml"),
    )
    try:
        until(lambda: steps_done(config) > 40, "40 steps")
        cluster.run("scancel", "--batch", "--signal=USR1", job)  # as Slurm does near the time limit
        until(lambda: cluster.state(job) == "PENDING", "the requeue")
        stopped = steps_done(config)
        with subprocess.Popen(
            ["bash", "slurm/pretrain.sh", str(tmp_path / "unbroken.yaml")],
            env=cluster.env | {"RANKS": "2"}, cwd=ROOT, stdout=subprocess.PIPE, text=True,
        ) as on_this_machine:  # fmt: skip
            until(lambda: steps_done(config) > max(stopped, 130), "130 steps, after the requeue")
            cluster.script("crash", "test1")
            crashed = steps_done(config)
            # Slurm finds out by itself, in time.
            cluster.run("scontrol", "update", "NodeName=test1", "State=DOWN", "Reason=crashed")
            until(lambda: cluster.state(job) == "PENDING", "the requeue after the crash")
            cluster.script("start", "test1")
            cluster.run("scontrol", "update", "NodeName=test1", "State=RESUME")
            said, _ = on_this_machine.communicate(timeout=120)
            assert on_this_machine.returncode == 0, said
        until(lambda: cluster.state(job) == "COMPLETED", "the end of the job")
    except AssertionError as error:
        raise AssertionError(f"{error}\n{log.read_text() if log.exists() else ''}") from None
    assert 40 < stopped < crashed < STEPS  # or nothing was interrupted
    text = log.read_text()
    assert f"resumed after step {stopped}\n" in text
    assert f"job {job}, start 0: exit status 75; requeueing" in text
    assert f"job {job}, start 2: exit status 0; done" in text
    assert text.count("test1: rank 1: exit status 75") == 1
    assert curve_of(config) == curve_of(unbroken)
    logs = sorted(path.name for path in (config.run.folder / "logs").glob("*.log"))
    assert logs == [f"{job}.{start}-test{node}.log" for start in range(3) for node in range(2)]
