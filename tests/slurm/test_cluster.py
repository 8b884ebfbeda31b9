"""The launcher on a real Slurm of three nodes: a job that is stopped near its limit, and then loses
a node, finishes all the same, on the very curve of a run that was never stopped; one goes on
without nodes that are not fit, or lost."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megalite.config import Config
from megalite.config_file import load_config
from small_runs import curve_of, make_config

ROOT = Path(__file__).parents[2]
NEEDED = ("munged", "slurmctld", "slurmd", "sbatch")
STEPS = 240
SETTINGS = (
    f"train.steps={STEPS}",
    "checkpoint.every=30",
    "observe.eval_every=0",
    "observe.log_every=20",
)


class Cluster:
    def __init__(self, folder: Path):
        # One rank a node, on the CPU.
        own = {"DIR": str(folder), "NODES": "3", "SLURM_CONF": f"{folder}/slurm.conf", "RANKS": "1"}
        self.env = os.environ | own

    def run(self, *command: str | Path, **env: str) -> str:
        done = subprocess.run(
            [*map(str, command)],
            cwd=ROOT,
            env=self.env | env,
            capture_output=True,
            text=True,
            timeout=180,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def script(self, *arguments: str) -> str:
        return self.run("bash", ROOT / "tests" / "slurm" / "cluster.sh", *arguments)

    def submit(self, config: Config, folder: Path, nodes: str, **env: str) -> str:
        """Returns the job's id. What it says goes to job.log, in the folder."""
        (folder / "job.yaml").write_text(config.to_yaml())
        return self.run(
            *("sbatch", "--parsable", f"--nodes={nodes}", "--gpus-per-node=0", "--cpus-per-task=1"),
            *(f"--output={folder / 'job.log'}", "slurm/pretrain.sh", folder / "job.yaml"),
            **env,
        )

    def lose(self, node: str) -> None:
        self.script("crash", node)
        # Slurm finds out by itself, in time.
        self.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=crashed")

    def state(self, job: str) -> str:
        return self.run("squeue", "--noheader", f"--jobs={job}", "--states=all", "--format=%T")


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    missing = [program for program in NEEDED if shutil.which(program) is None]
    if missing:
        pytest.skip(
            f"a Slurm on this machine needs {', '.join(missing)}: apt-get install slurm-wlm munge"
        )
    if os.geteuid() != 0:
        pytest.skip("a Slurm on this machine needs root")
    # Not in pytest's folder: slurmd's sockets have names of at most 108 bytes.
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    cluster = Cluster(folder)
    try:
        cluster.script("up")
        yield cluster
    finally:
        cluster.script("down")
        shutil.rmtree(folder, ignore_errors=True)  # of what `down` has left


def until(true: Callable[[], object], what: str, seconds: float = 180.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.1)


def steps_done(config: Config) -> int:
    metrics = config.run.folder / "metrics.jsonl"
    return metrics.read_text().count('"loss"') if metrics.exists() else 0


@contextmanager
def told_by(log: Path) -> Iterator[None]:
    """What the job said, where something failed."""
    try:
        yield
    except AssertionError as error:
        raise AssertionError(f"{error}\n{log.read_text() if log.exists() else ''}") from None


@contextmanager
def on_this_machine(config: Config, folder: Path, ranks: int) -> Iterator[None]:
    """A run without Slurm and without interruptions, meanwhile."""
    path = folder / f"{config.run.name}.yaml"
    path.write_text(config.to_yaml())
    command, env = ["bash", "slurm/pretrain.sh", str(path)], os.environ | {"RANKS": str(ranks)}
    with subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, text=True) as run:
        yield
        said, _ = run.communicate(timeout=120)
        assert run.returncode == 0, said


def test_a_job_outlives_its_time_limit_and_a_lost_node(cluster: Cluster, tmp_path: Path) -> None:
    unbroken, config = (
        make_config(tmp_path, "llama", f"run.name={name}", *SETTINGS)
        for name in ("unbroken", "job")
    )
    log = tmp_path / "job.log"
    job = cluster.submit(config, tmp_path, nodes="2", PREFLIGHT="no")
    with told_by(log):
        until(lambda: steps_done(config) > 40, "40 steps")
        cluster.run("scancel", "--batch", "--signal=USR1", job)  # as Slurm does near the time limit
        until(lambda: cluster.state(job) == "PENDING", "the requeue")
        stopped = steps_done(config)
        with on_this_machine(unbroken, tmp_path, ranks=2):
            until(lambda: steps_done(config) > max(stopped, 130), "130 steps, after the requeue")
            cluster.lose("test1")
            crashed = steps_done(config)
        until(lambda: cluster.state(job) == "COMPLETED", "the end of the job, on another node")
    assert 40 < stopped < crashed < STEPS  # or nothing was interrupted
    text = log.read_text()
    assert f"resumed after step {stopped}\n" in text
    assert f"job {job}, start 0: exit status 75; requeueing" in text
    assert re.search(rf"job {job}, start [23]: exit status 0; done", text)
    assert text.count("test1: rank 1: exit status 75") == 1
    # In the order of the switches: at first the two of one, then that of another comes first.
    assert re.findall(r"--rdzv-endpoint=(\w+)", text) == [
        *["test0"] * (text.count("-m megalite train") - 1),
        "test2",
    ]
    assert curve_of(config) == curve_of(unbroken)
    logs = {path.name for path in (config.run.folder / "logs").glob("*.log")}
    assert {f"{job}.{start}-test{node}.log" for start in range(2) for node in range(2)} < logs


def test_a_job_goes_on_without_nodes_that_are_not_fit_or_lost(
    cluster: Cluster, tmp_path: Path
) -> None:
    settings = (*SETTINGS, "parallel.elastic=true", "train.steps=120")
    alone, config = (
        make_config(tmp_path, "llama", f"run.name={name}", *settings) for name in ("alone", "job")
    )
    # One node has another config than the rest.
    sick = tmp_path / "sick.sh"
    python = f'exec {sys.executable} "${{@:2}}"'
    sick.write_text(
        f"if [[ $SLURMD_NODENAME == test1 ]]; then {python} train.seed=99; fi\n{python}"
    )
    log = tmp_path / "job.log"
    once = {"SBATCH_PARTITION": "other", "SBATCH_EXCLUSIVE": "exclusive"}  # as in a profile
    job = cluster.submit(config, tmp_path, nodes="1-2", WITHIN=f"bash {sick}", **once)
    with told_by(log):
        show = ("squeue", "--noheader", f"--jobs={job}", "--states=all", "--format=%P %h")
        assert cluster.run(*show) == "other NO"  # its nodes are shared with nobody
        until(lambda: steps_done(config) > 40, "40 steps, on the nodes that are fit")
        with on_this_machine(alone, tmp_path, ranks=1):
            cluster.lose("test2")
            lost = steps_done(config)
        until(lambda: cluster.state(job) == "COMPLETED", "the end of the job, on the last node")
        text = log.read_text()
        assert f"job {job}, start 0: exit status 77; requeueing without test1" in text
        assert lost < 120
        assert "2 nodes are fit" in text
        assert "1 node is fit" in text
        assert re.findall(r"× CPU.*  (data \d)", text) == ["data 2", "data 1"]
    # Over one rank the same sums are added up otherwise.
    for mine, theirs in zip(curve_of(config), curve_of(alone), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3)


def test_two_runs_in_one_allocation(
    cluster: Cluster, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if not request.config.getoption("--whole"):
        pytest.skip("one of the cases of --whole; test_launch.py has it without Slurm")
    configs = [
        make_config(tmp_path, "llama", f"run.name={name}", *SETTINGS, "train.steps=20")
        for name in "ab"
    ]
    for config in configs:
        (tmp_path / f"{config.run.name}.yaml").write_text(config.to_yaml())
    both = " & ".join(f"bash slurm/pretrain.sh {tmp_path / name}.yaml" for name in "ab")
    log = tmp_path / "job.log"
    job = cluster.run(
        *(
            "sbatch",
            "--parsable",
            "--nodes=2",
            "--cpus-per-task=1",
            f"--output={log}",
            f"--wrap={both} & wait",
        ),
        PREFLIGHT="no",
        SLURM_OVERLAP="1",
    )
    with told_by(log):
        until(lambda: cluster.state(job) == "COMPLETED", "the end of the job")
        assert log.read_text().count("exit status 0; done") == 2
    assert curve_of(configs[0]) == curve_of(configs[1])
    assert len(curve_of(configs[0])) == 20


def test_the_tasks_of_an_array_share_a_sweep(
    cluster: Cluster, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if not request.config.getoption("--whole"):
        pytest.skip("one of the cases of --whole; test_sweep.py has two workers without Slurm")
    base = make_config(tmp_path, "llama", *SETTINGS, "train.steps=60", "checkpoint.every=10")
    (tmp_path / "base.yaml").write_text(base.to_yaml())
    rates = [1e-3, 3e-3, 1e-2, 3e-2]
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(
        f"{{name: shared, dir: {tmp_path}, config: {tmp_path / 'base.yaml'}, sampler: grid, "
        f"objective: valid_loss, space: {{optimizer.lr: {rates}}}}}"
    )
    folder, logs = tmp_path / "shared", [tmp_path / f"job-{task}.log" for task in range(2)]
    job = cluster.run(
        *("sbatch", "--parsable", "--array=0-1", "--gpus-per-node=0", "--cpus-per-task=1", "--exclusive"),
        *(f"--output={tmp_path / 'job-%a.log'}", "slurm/sweep.sh", sweep),
    )  # fmt: skip

    def states() -> list[str]:
        return cluster.state(job).split()

    with told_by(logs[1]):
        until(lambda: len(list(folder.glob("trial-*/checkpoints/step-*"))) >= 2, "two checkpoints")
        cluster.run("scancel", "--batch", "--signal=USR1", f"{job}_1")  # as near its time limit
        until(lambda: "PENDING" in states(), "the requeue of one task")
        until(lambda: states() == ["COMPLETED"] * 2, "the end of both tasks")
    trials = [path.parent for path in folder.glob("trial-*/config.yaml")]
    assert sorted(load_config(trial / "config.yaml").optimizer.lr for trial in trials) == rates
    for trial in trials:
        lines = (trial / "metrics.jsonl").read_text().splitlines()
        steps = [line["step"] for line in map(json.loads, lines) if "loss" in line]
        assert steps == list(range(1, 61)), trial
    assert load_config(folder / "best.yaml").optimizer.lr in rates
    took = [
        set(re.findall(r"trial-\d{4}", log.read_text().split("the best is")[0])) for log in logs
    ]
    assert all(took), "each task trained some of them"
