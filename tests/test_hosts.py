"""`megalite launch` over plain hosts: signals, statuses and logs, with an ssh on the PATH that runs on
this machine what it is told."""

from __future__ import annotations

import io
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megalite.cli import main
from megalite.errors import ConfigError
from megalite.runtime import hosts
from megalite.runtime.hosts import launcher, over_ssh, read_hosts, run_on_hosts
from small_runs import curve_of, make_config

FAKE_SSH = """#!/bin/bash
while [[ $1 == -* ]]; do [[ $1 == -o ]] && shift; shift; done
host=$1; shift
echo "$host $*" >> "$0.called"
[[ $host != gone* ]] || { echo "ssh: no route to $host"; exit 255; }
exec env -i PATH="$PATH" HOST="$host" sh -c "$*"
"""


@pytest.fixture
def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of what it was called with."""
    program = tmp_path / "bin" / "ssh"
    program.parent.mkdir()
    program.write_text(FAKE_SSH)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    return Path(f"{program}.called")


def on(
    names: list[str], script: str, folder: Path, environment: dict[str, str] | None = None
) -> int:
    """Run a shell script on hosts, in a folder."""
    commands = [over_ssh(name, ["sh", "-c", script], folder, ranks=1) for name in names]
    return run_on_hosts(names, commands, environment or {}, folder / "logs")


def logs_in(folder: Path) -> dict[str, str]:
    return {log.stem.split("-", 3)[-1]: log.read_text() for log in folder.glob("logs/*.log")}


def test_each_host_runs_in_the_folder_with_the_environment_and_has_its_log(
    ssh: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "a 'folder'"
    folder.mkdir()
    script = 'echo "$HOST in $PWD: $WANDB_API_KEY, $NCCL_X"; echo "== now $HOST: done"'
    status = on(
        ["me@a", "b"], script, folder, {"WANDB_API_KEY": "a secret", "NCCL_X": "it's $x, 'y'"}
    )
    assert status == 0
    said = {
        name: f"{name} in {folder}: a secret, it's $x, 'y'\n== now {name}: done\n"
        for name in ("me@a", "b")
    }
    assert logs_in(folder) == said
    # The first host is shown, and the last line of each.
    assert capfd.readouterr().out.splitlines() == [
        said["me@a"].splitlines()[0],
        "== now me@a: done",
        "== now b: done",
    ]
    assert "secret" not in ssh.read_text()  # or whoever lists processes would see it


@pytest.mark.parametrize(
    ("script", "status"),
    [
        ("exit 75", 75),
        ("[ $HOST = a ] || exit 76; exit 1", 76),
        ("kill -9 $$", 137),
        ("[ $HOST = a ] || exit 2; exec sleep 60", 2),  # not the status of those told to stop
    ],
)
def test_the_status_is_that_of_the_hosts(
    ssh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, status: int
) -> None:
    monkeypatch.setattr(hosts, "WAIT_S", 0.3)
    assert on(["a", "b"], script, tmp_path) == status


def test_a_host_that_cannot_be_reached_is_named_and_ends_the_others(
    ssh: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(hosts, "WAIT_S", 0.3)
    monkeypatch.setattr(hosts, "PAUSE_S", 0.3)
    deaf = "trap '' TERM; touch here; while :; do sleep 0.1; done"
    assert on(["a", "gone"], deaf, tmp_path) == 1
    out = capfd.readouterr().out
    assert "gone: ssh has no connection: ssh: no route to gone; see " in out
    assert "a: exit status 137 (killed by SIGKILL); see " in out


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGUSR1])
def test_a_signal_reaches_every_host(ssh: Path, tmp_path: Path, sent: signal.Signals) -> None:
    script = """
trap 'echo told; exit 75' TERM USR1
touch "ready-$HOST"
[ ! -e ready-a ] || [ ! -e ready-b ] || kill -SENT PARENT
while :; do sleep 0.05; done
""".replace("SENT", sent.name[3:]).replace("PARENT", str(os.getpid()))
    assert on(["a", "b"], script, tmp_path) == 75
    assert logs_in(tmp_path) == {"a": "told\n", "b": "told\n"}


def test_a_lost_connection_asks_the_ranks_to_save(ssh: Path, tmp_path: Path) -> None:
    script = """
trap 'echo saved > saved; exit 75' TERM
touch here
for i in $(seq 400); do sleep 0.05; done
"""
    command = over_ssh("a", ["sh", "-c", script], tmp_path, ranks=1)
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.write(b".\n")
        process.stdin.flush()
        until((tmp_path / "here").exists)
        process.stdin.close()
        until((tmp_path / "saved").exists)


def until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 120
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_hosts_come_from_a_list_or_a_file(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("# of rack 3\nnode1\n\n  node2   # the second\n")
    assert read_hosts("node1, node2,") == read_hosts(str(tmp_path / "hosts")) == ["node1", "node2"]
    many = [f"node{number:04}" for number in range(600)]  # longer than a path may be
    assert read_hosts(",".join(many)) == many
    command = launcher(["python"], 8, ["me@node1", "node2"], 1, 29500)
    assert {"--node-rank=1", "--master-addr=node1", "--local-addr=node2"} <= set(command)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (",", "no host"),
        ("a,b,a", "a is given twice"),
        ("a,-oProxyCommand=x", "'-oProxyCommand=x' is not the name of a host"),
        ("a,b slots=8", "'b slots=8' is not the name of a host"),
        ("./nodes", "there is no such file"),
        ("/dev", "there is no such file"),
    ],
)
def test_hosts_that_cannot_be(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        read_hosts(text)


def test_a_run_over_two_hosts_is_stopped_and_goes_on_as_one_on_this_machine(
    ssh: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = ("train.steps=100000", "observe.eval_every=0", "checkpoint.every=0")
    over, here = (
        make_config(tmp_path, "llama", f"run.name={name}", *settings) for name in ("over", "here")
    )
    for config in (over, here):
        (tmp_path / f"{config.run.name}.yaml").write_text(config.to_yaml())
    words = [sys.executable, "-m", "megalite", "launch", "--ranks"]
    command = [*words, "1", f"{tmp_path}/over.yaml", "--hosts=127.0.0.1,localhost"]
    with subprocess.Popen([*command, f"--port={port}"]) as process:
        metrics = over.run.folder / "metrics.jsonl"
        try:
            until(lambda: metrics.exists() and metrics.read_text().count('"loss"') > 5)
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 75
    out = capfd.readouterr().out
    for host in ("127.0.0.1: rank 0", "localhost: rank 1"):
        assert f" {host}: exit status 75 (asked to stop" in out
    assert len(list((over.run.folder / "logs").glob("launch-*-localhost.log"))) == 1
    if request.config.getoption("--whole"):
        stopped = len(curve_of(over))
        end = f"train.stop_at={stopped + 5}"
        assert main([*command[3:], f"--port={port}", end]) == 0
        assert (
            subprocess.run([*words, "2", f"{tmp_path}/here.yaml", end], timeout=60).returncode == 0
        )
        assert len(curve_of(over)) == stopped + 5
        assert curve_of(over) == curve_of(here)


def test_a_host_is_read_on_when_nobody_reads_the_console(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of `megalite launch … | head`: the ranks would be held up by a pipe that is full."""

    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    with subprocess.Popen(["printf", r"a\nb\n"], stdout=subprocess.PIPE, text=True) as process:
        host = hosts._Host("a", process, tmp_path / "log", shown=True)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", Broken())
            host.read()
    assert ((tmp_path / "log").read_text(), host.said) == ("a\nb\n", "b")
