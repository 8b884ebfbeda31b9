"""Train on this machine, or on several plain hosts over ssh, where there is no Slurm: a rank a GPU, or
as many CPU ranks as the config needs.

Every host has megalite and the data at the same paths, as on a shared file system, and opens to ssh
without a password. The ranks meet at a port of the first host, in the order of the hosts. Ctrl-C,
TERM and USR1 reach all ranks: they save and leave with exit status 75. What the first host says is
shown, and what each says stands in RUN/logs/. The exit status is that of `megalite train`."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path

from megalite.commands.numbers import at_least
from megalite.commands.parser import VerbParser, add_config
from megalite.config_file import load_config
from megalite.errors import ConfigError
from megalite.models import weight_table
from megalite.plan import nodes_that_fit, smallest_world
from megalite.runtime.hosts import forwarded, launcher, over_ssh, read_hosts, run_on_hosts


def add_arguments(parser: VerbParser) -> None:
    """Add the arguments of the verb."""
    add_config(parser, "train.steps=100")
    parser.add_argument(
        "--hosts", metavar="A,B|FILE", help="hosts to run on, or a file with one a line"
    )
    parser.add_argument(
        "--ranks", type=at_least(1), metavar="N",
        help="ranks on each host (default: one for each GPU of this machine, without GPUs what the config needs)",
    )  # fmt: skip
    parser.add_argument(
        "--port", type=at_least(1024, 65535), default=29500, help="(default: %(default)s)"
    )
    parser.add_argument(
        "--python", metavar="COMMAND",
        help="Python on the hosts, such as 'apptainer exec --nv megalite.sif python' (default: this one)",
    )  # fmt: skip
    parser.add_argument(
        "--dry-run", action="store_true", help="print the commands instead of running them"
    )
    parser.set_defaults(verb=_launch)


def _launch(arguments: argparse.Namespace) -> int:
    """Start the ranks, and return the exit status when all have ended."""
    config = load_config(arguments.config, arguments.overrides)
    table = weight_table(config.model, config.lora)
    hosts = read_hosts(arguments.hosts) if arguments.hosts is not None else []
    count = len(hosts) or 1
    # This machine's GPUs stand for those of every host.
    ranks = arguments.ranks or _gpus() or -(-smallest_world(config) // count)
    fit = nodes_that_fit(config, table, count, ranks)
    if fit < count:
        # Told, as idle hosts cost as much: parallel.elastic allows for it.
        print(f"== {fit} of {count} hosts are used: no more fit {arguments.config}")
        hosts = hosts[:fit]
    python = _words(arguments.python or "") or [sys.executable]
    task = ["-m", "megalite", "train", str(arguments.config), *arguments.overrides]
    commands = [
        [*launcher(python, ranks, hosts, number, arguments.port), *task]
        for number in range(len(hosts) or 1)
    ]
    if hosts:
        # Relative paths of the config mean the same on every host.
        here = Path.cwd()
        commands = [
            over_ssh(host, command, here, ranks)
            for host, command in zip(hosts, commands, strict=True)
        ]
    if arguments.dry_run:
        print(*map(shlex.join, commands), sep="\n")
        return 0
    if hosts:
        return run_on_hosts(hosts, commands, forwarded(os.environ), config.run.folder / "logs")
    return _become(commands[0], ranks)


def _words(command: str) -> list[str]:
    try:
        return shlex.split(command)
    except ValueError as error:
        raise ConfigError(f"--python {command}: {str(error).lower()}") from None


def _gpus() -> int:
    """Return how many GPUs this process may use."""
    import torch

    return torch.cuda.device_count()


def _become(command: list[str], ranks: int) -> int:
    """Run a command in place of this process, which leaves its signals and its status to it."""
    cores = len(os.sched_getaffinity(0))
    # Otherwise each rank would start a thread for every core.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(cores // ranks, 1)))
    # What is in the buffer would be gone with this program.
    sys.stdout.flush()
    try:
        os.execvp(command[0], command)
    except OSError as error:
        raise ConfigError(f"--python {command[0]}: {error.strerror}") from None
