"""megalite.launch: what people read when a rank fails."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from listening import Heard, listening
from megalite import launch
from megalite.config import Config
from megalite.launch import _children
from small_runs import make_config

FAILS_ON_RANK_1 = """
import sys
import megalite.training.parts
from megalite.runtime.activity import NOW
from megalite.cli import main

all_reduce = megalite.training.parts.all_reduce

def fail(*given):
    import os
    if os.environ["RANK"] == "1" and NOW.step == 2:
        raise ValueError("the planted error")
    return all_reduce(*given)

megalite.training.parts.all_reduce = fail
sys.exit(main(sys.argv[1:]))
"""


def test_the_error_of_the_rank_that_failed_is_what_stands_last(tmp_path: Path) -> None:
    """The other rank's, that it lost the connection, comes within the same second."""
    with listening() as heard:
        config = make_config(
            tmp_path, "llama", "train.steps=100000", "observe.eval_every=0", "checkpoint.every=0",
            f"observe.webhook={heard.url}/run",
        )  # fmt: skip
        done = _fails(tmp_path, config)
    _judge(done, heard, config.run.name)


def _fails(tmp_path: Path, config: Config) -> subprocess.CompletedProcess[str]:
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    (tmp_path / "fails.py").write_text(FAILS_ON_RANK_1)
    launcher = [
        "-m",
        "megalite.launch",
        "--standalone",
        "--local-addr=127.0.0.1",
        "--nproc-per-node=2",
    ]
    command = [
        sys.executable,
        *launcher,
        str(tmp_path / "fails.py"),
        "train",
        str(tmp_path / "config.yaml"),
    ]
    return subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120
    )


def _judge(done: subprocess.CompletedProcess[str], heard: Heard, name: str) -> None:
    assert done.returncode == 1
    [(path, body)] = heard.said
    assert path == "/run"
    assert re.fullmatch(
        rf"{name} failed on \S+: rank 1: exit status 1 \(.*\): ValueError: the planted error",
        body["text"],
    ), "the webhook is told once, by the launcher"
    # It left by itself, and at once.
    assert re.search(r"\[rank0\]: RuntimeError: .*(closed|reset) by peer", done.stdout)
    *_, words, last = re.split(r"what rank 1 said first:|\n(?==== )|\n(?=== )", done.stdout)
    assert 'raise ValueError("the planted error")' in words
    assert re.match(
        r"== .*: rank 1: exit status 1 \(failed: .*\): ValueError: the planted error\n$", last
    )


ONE_OF_TWO = """
import pathlib, sys, time
(pathlib.Path(sys.argv[1]) / sys.argv[2]).touch()
while len(list(pathlib.Path(sys.argv[1]).glob("step-*"))) < 2:
    time.sleep(0.05)
"""


def test_two_steps_of_a_job_meet_apart(tmp_path: Path) -> None:
    """Each of one process, though both are given the same place and the same name to meet at."""
    (tmp_path / "task.py").write_text(ONE_OF_TWO)
    launcher = [
        sys.executable,
        "-m",
        "megalite.launch",
        "--nnodes=1",
        "--nproc-per-node=1",
        "--rdzv-backend=c10d",
    ]
    command = [
        *launcher,
        "--rdzv-id=7.0-train",
        "--rdzv-endpoint=127.0.0.1",
        str(tmp_path / "task.py"),
        str(tmp_path),
    ]
    started = [
        subprocess.Popen(
            [*command, f"step-{step}"],
            env=os.environ | {"SLURM_JOB_ID": str(os.getpid() % 9000), "SLURM_STEP_ID": str(step)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for step in range(2)
    ]
    said = [process.communicate(timeout=60)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], said


def test_nodes_have_the_ranks_of_the_order_they_are_given_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []
    monkeypatch.setattr(launch.run, "run", asked.append)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # which stay those of the tests
    monkeypatch.setenv(launch.NODES, "node9 node10 node7")
    for name in ("node10", "node9"):
        monkeypatch.setenv("SLURMD_NODENAME", name)
        assert launch.main(["--nnodes=3", "--rdzv-endpoint=node9:1234", "task"]) == 0
    assert [(one.node_rank, one.local_addr) for one in asked] == [(1, "node10"), (0, "node9")]


def test_ctrl_c_while_torch_is_imported_is_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    done = subprocess.run(
        [sys.executable, "-m", "megalite.launch", "true"],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


def test_a_signal_ends_a_launcher_that_waits_for_another_host() -> None:
    """Which torch does in one call, during which Python runs no handler."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--nnodes=2", "--node-rank=0", "--nproc-per-node=1", "--master-addr=127.0.0.1"]
    command = [sys.executable, "-m", "megalite.launch", *options, f"--master-port={port}", "true"]
    with subprocess.Popen(command) as process:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        try:
            assert process.wait(120) == 128 + signal.SIGTERM
        finally:
            process.kill()


def test_ranks_are_found_while_threads_come_and_go() -> None:
    """A signal is passed on whatever torchrun's threads do at that moment."""
    over = threading.Event()

    def start_and_end() -> None:
        while not over.is_set():
            thread = threading.Thread(target=lambda: None)
            thread.start()
            thread.join()

    busy = [threading.Thread(target=start_and_end) for _ in range(2)]
    with subprocess.Popen(["sleep", "60"]) as rank:
        for thread in busy:
            thread.start()
        try:
            assert all(rank.pid in _children() for _ in range(2000))
        finally:
            over.set()
            for thread in busy:
                thread.join()
            rank.kill()


# The signal comes while the launcher waits for the other nodes: before its ranks begin, and after
# they have ended.
SIGNALLED = """
import os, signal, sys
from torch.distributed.elastic.agent.server.api import SimpleElasticAgent
from megalite import launch

options = ["--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=1", "--no-python", "true"]

def signalled(self, *rest):
    os.kill(os.getpid(), signal.SIGUSR1)

meet = SimpleElasticAgent._rendezvous
SimpleElasticAgent._rendezvous = signalled
try:
    launch.main(options)
except SystemExit as left:
    print("left with", left.code)
SimpleElasticAgent._rendezvous, SimpleElasticAgent._exit_barrier = meet, signalled
print("ended with", launch.main(options))
"""


def test_a_signal_that_comes_when_the_ranks_have_ended_changes_nothing() -> None:
    command = [sys.executable, "-c", SIGNALLED]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120
    )
    assert f"left with {128 + signal.SIGUSR1}\n" in done.stdout
    assert done.stdout.endswith("ended with 0\n")
