"""Start a run on plain hosts over ssh, where there is no Slurm: one `megalite.launch` a host.

Each host's shell reads its standard input, which is the ssh connection: first the environment, so
that no key is seen in a list of processes, then names of signals, which it passes on to the
launcher. Where the connection is lost it sends TERM: the ranks save and leave."""

from __future__ import annotations

import contextlib
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from megalite.errors import ConfigError
from megalite.runtime.exit_codes import Exit, describe
from megalite.utils.outside import read_text

SHELL = """\
while IFS= read -r line && [ "$line" != . ]; do export "$line"; done
cd "$1" || exit 2
cores=$(($(nproc) / $2))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > 0 ? cores : 1))}"
shift 2
exec 3<&0
"$@" </dev/null 3<&- &
child=$!
{ while IFS= read -r name; do kill -s "$name" $child; done; kill -s TERM $child; } <&3 >/dev/null 2>&1 &
reader=$!
exec 3<&-
wait $child
status=$?
kill $reader 2>/dev/null
exit $status
"""
"""What a host runs: `sh -c SHELL sh FOLDER RANKS COMMAND...`."""

FORWARDED = (
    "CUBLAS_", "CUDA_", "FI_", "GLOO_", "HF_", "MEGALITE_", "NCCL_", "OMP_", "PYTHONPATH", "PYTORCH_", "TORCH_", "UCX_",
    "WANDB_",
)  # fmt: skip
"""Beginnings of the names of variables that every host gets."""

SIGNALS = {signal.SIGINT: "TERM", signal.SIGTERM: "TERM", signal.SIGUSR1: "USR1"}
"""Signals that are passed on, and as which: processes in a shell's background ignore INT."""

WAIT_S = 20.0
"""Seconds that hosts have to end by themselves once the ranks of one have failed."""

LAST_WORDS, PAUSE_S = ("TERM", "TERM", "KILL"), 5.0
"""Signals for hosts that have not. The second request ends ranks at once; the last one is for a
launcher that still waits for the other hosts."""

CONNECTION_LOST = 255
"""Exit status of ssh itself where it cannot connect, or loses the connection."""


def read_hosts(text: str) -> list[str]:
    """Return the hosts of `--hosts`: names with commas between them, or a file with one a line.

    Raises ConfigError where there are none, or one is given twice."""
    words = text.split(",")
    # Unlike pathlib's, it takes names of many hosts, too long for a path, for no file.
    if os.path.isfile(text):
        lines = read_text(Path(text), ConfigError).splitlines()
        words = [line.partition("#")[0] for line in lines]
    hosts = [word.strip() for word in words if word.strip()]
    if not hosts:
        raise ConfigError(f"--hosts {text}: no host; give names as a,b or a file with one a line")
    for host in hosts:
        if host.startswith("-") or len(host.split()) > 1:
            raise ConfigError(f"--hosts {text}: {host!r} is not the name of a host")
        if "/" in host:
            raise ConfigError(
                f"--hosts {text}: there is no such file, and hosts have no / in names"
            )
        if hosts.count(host) > 1:
            raise ConfigError(f"--hosts {text}: {host} is given twice; --ranks says how many ranks")
    return hosts


def launcher(
    python: Sequence[str], ranks: int, hosts: Sequence[str], host: int, port: int
) -> list[str]:
    """Return the command that starts `ranks` ranks on the host of number `host`, without what they
    run. Without hosts it is for this machine alone.

    Ranks are numbered in the order of the hosts; they meet at `port` of the first."""
    command = [*python, "-m", "megalite.launch", f"--nproc-per-node={ranks}"]
    if not hosts:
        return [*command, "--standalone", "--local-addr=127.0.0.1"]
    addresses = [name.rpartition("@")[2] for name in hosts]
    return [
        *command,
        f"--nnodes={len(hosts)}",
        f"--node-rank={host}",
        f"--master-addr={addresses[0]}",
        f"--master-port={port}",
        f"--local-addr={addresses[host]}",
    ]


def over_ssh(host: str, command: Sequence[str], folder: Path, ranks: int) -> list[str]:
    """Return the command that runs `command` on a host, in `folder`, which is the same there."""
    there = ["sh", "-c", SHELL, "sh", str(folder), str(ranks), *command]
    # No password is asked for: nobody could answer several at once.
    alive = ["-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=8"]
    return ["ssh", "-T", "-o", "BatchMode=yes", *alive, host, shlex.join(there)]


def forwarded(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that every host gets."""
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(FORWARDED) and "\n" not in value
    }


@dataclass
class _Host:
    """A host's connection, and the file of what it says."""

    name: str
    process: subprocess.Popen[str]
    log: Path
    shown: bool
    """Whether what it says is printed, too."""
    last: str = ""
    """Its launcher's last line: what became of its ranks."""
    said: str = ""
    """The last line of all."""
    reader: threading.Thread | None = None

    def tell(self, text: str) -> None:
        """Send a line. A host that is gone already is left alone."""
        assert self.process.stdin is not None
        # A signal may come while another is sent: os.write, as a buffered file refuses that.
        with contextlib.suppress(OSError):
            os.write(self.process.stdin.fileno(), f"{text}\n".encode())

    def read(self) -> None:
        """Write to the log what the host says, until it ends. Runs in a thread."""
        assert self.process.stdout is not None
        with open(self.log, "a", encoding="utf-8") as log:
            for line in self.process.stdout:
                self.said = line.rstrip()
                # Read on, whoever does not take it: a full pipe would hold up the ranks.
                with contextlib.suppress(OSError):
                    log.write(line)
                    log.flush()
                if line.startswith("== "):  # which comes in the summary
                    self.last = self.said
                elif self.shown:
                    with contextlib.suppress(OSError):
                        sys.stdout.write(line)
                        sys.stdout.flush()

    @property
    def summary(self) -> str:
        status = self.process.returncode
        if status == CONNECTION_LOST or not self.last:
            why = describe(status)
            if status == CONNECTION_LOST:
                why = f"ssh has no connection: {self.said}"
            return f"== {time.strftime('%F %T')} {self.name}: {why}; see {self.log}"
        return self.last


def run_on_hosts(
    hosts: Sequence[str],
    commands: Sequence[Sequence[str]],
    environment: Mapping[str, str],
    logs: Path,
) -> int:
    """Run a command on each host, as `over_ssh` gives them; return the largest exit status of
    those that end by themselves, with FAILED for a lost connection.

    The first host's output is printed as well as written to `logs`, a file a host. Signals that ask
    for a stop are passed on to all. Raises ConfigError where there is no ssh."""
    if shutil.which("ssh") is None:
        raise ConfigError("--hosts: there is no ssh on the PATH")
    logs.mkdir(parents=True, exist_ok=True)
    start = time.strftime("%Y%m%d-%H%M%S")
    started: list[_Host] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        for host in started:
            host.tell(SIGNALS[signal.Signals(number)])

    before = {number: signal.signal(number, pass_on) for number in SIGNALS}
    try:
        for name, command in zip(hosts, commands, strict=True):
            log = logs / f"launch-{start}-{name}.log"
            started.append(_Host(name, _connect(command), log, shown=not started))
        for host in started:
            for variable, value in environment.items():
                host.tell(f"{variable}={value}")
            host.tell(".")
            host.reader = threading.Thread(target=host.read, daemon=True)
            host.reader.start()
        left = _await(started)
    finally:
        for host in started:
            host.process.kill()  # of those that have not ended, after an error here
        for number, handler in before.items():
            signal.signal(number, handler)
    for host in started:
        assert host.reader is not None
        host.reader.join(timeout=5)
        print(host.summary, flush=True)
    return max(_status(host.process.returncode) for host in left)


def _connect(command: Sequence[str]) -> subprocess.Popen[str]:
    # In a session of its own: a terminal's Ctrl-C reaches this process alone, which passes it on.
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )


def _await(hosts: Sequence[_Host]) -> list[_Host]:
    """Wait for all hosts; return those that have ended by themselves. Once one has failed the
    others have WAIT_S seconds to, then get a line of LAST_WORDS every PAUSE_S, then are cut off."""
    told, due = 0, math.inf
    left: list[_Host] = []
    while running := [host for host in hosts if host.process.poll() is None]:
        if not told:
            left = [host for host in hosts if host not in running]
        failed = (host.process.returncode not in (Exit.DONE, Exit.STOPPED) for host in left)
        if due == math.inf and any(failed):
            due = time.monotonic() + WAIT_S
        if time.monotonic() > due:
            due = time.monotonic() + PAUSE_S
            for host in running:
                if told < len(LAST_WORDS):
                    host.tell(LAST_WORDS[told])
                else:
                    host.process.kill()
            told += 1
        time.sleep(0.1)
    return left if told else list(hosts)


def _status(status: int) -> int:
    return Exit.FAILED if status == CONNECTION_LOST or status < 0 else status
