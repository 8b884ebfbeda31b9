"""torchrun for `slurm/pretrain.sh`: `python -m megalite.launch [torchrun's options] -m megalite
train CONFIG`.

It differs from torchrun in six ways:

- Its exit status is that of the rank that failed first; torchrun's is always 1.
- A signal that asks for a stop is passed on to the ranks, and their end awaited however long the
  checkpoint takes; torchrun kills them after 30 s.
- Once a rank has failed, the others have 5 s to end, not 30.
- It ends with the error of the rank that failed first, which otherwise stands above those of the
  ranks that lost it, and with one line that says what became of this node's ranks.
- If `--rdzv-endpoint` names no port, nodes meet at a port derived from their Slurm step.
- If MEGALITE_NODES names the nodes, ranks are numbered in that order."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import select
import signal
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

if __name__ == "__main__":
    # Importing torch takes seconds, in which Ctrl-C would be a traceback. `main` takes it over.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from torch.distributed import run
from torch.distributed.elastic.multiprocessing import PContext, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.api import RendezvousError

from megalite.comm.meeting import step_port
from megalite.errors import ConfigError, DataError
from megalite.health.signals import SIGNALS
from megalite.runtime import error_file
from megalite.runtime.exit_codes import Exit, describe, end_process, killed_by

NODES = "MEGALITE_NODES"
"""Variable with Slurm's names of a job's nodes, in the order of their ranks."""

LINGER_S = 1.0

FAREWELL_S = 5
"""Seconds for the other ranks of a node to end once one has failed. torchrun gives them 30."""


def main(arguments: Sequence[str]) -> int:
    """Start the ranks of this node with torchrun's `arguments`. Return the exit status when all
    have ended."""
    # Use Slurm's name of this node: it resolves to the node, which the node's own hostname may not.
    name = os.environ.get("SLURMD_NODENAME")
    message = trace = ""
    options = [f"--local-addr={name}"] if name else []
    asked = run.parse_args(["--signals-to-handle=SIGHUP,SIGQUIT", *options, *arguments])
    # Only inside the step is its number known.
    if asked.rdzv_endpoint and ":" not in asked.rdzv_endpoint:
        asked.rdzv_endpoint += f":{step_port()}"
    os.environ[error_file.LAUNCHER] = "1"
    if name and (nodes := os.environ.get(NODES)):
        asked.node_rank = nodes.split().index(name)
    for number in SIGNALS:
        signal.signal(number, _leave_or_pass_on)
    # Silence torchrun's own report of a failed rank: the last line printed here says the same,
    # apart from file and pid.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    try:
        with _leaving_while_waiting():
            run.run(asked)
        status, who = int(Exit.DONE), "all ranks"
    except ChildFailedError as error:
        rank, failure = min(error.failures.items(), key=lambda each: error_file.time_of(each[1]))
        status = failure.exitcode if failure.exitcode > 0 else killed_by(-failure.exitcode)
        who = f"rank {rank}"
        message, trace = error_file.read(failure)
        # The first node's launcher hosts the rendezvous: wait, so that other launchers first see
        # how their ranks end.
        time.sleep(0 if asked.standalone else LINGER_S)
    except RendezvousError:
        status, who = (
            int(Exit.FAILED),
            "the launcher of another node is gone, which held the rendezvous",
        )
    except SignalException as error:
        status, who = killed_by(error.sigval), "the launcher"
    for number in SIGNALS:  # the ranks have ended: only the report is left
        signal.signal(number, signal.SIG_IGN)
    if trace:
        print(f"what {who} said first:\n{trace}", file=sys.stderr, flush=True)
    ended = f"{describe(status)}{message and f': {message}'}"
    # Hosts over ssh have the names they were given, by which a person knows them.
    here = name or (not asked.standalone and asked.local_addr) or os.uname().nodename
    print(f"== {time.strftime('%F %T')} {here}: {who}: {ended}", flush=True)
    if status not in (Exit.DONE, Exit.STOPPED):  # of these the first rank tells
        _tell_webhook(asked, f"failed on {here}: {who}: {ended}")
    return status


def _tell_webhook(asked: argparse.Namespace, text: str) -> None:
    """Tell the webhook of a run that it has died, once for all nodes. `asked` are torchrun's options,
    with the arguments of `megalite train`. Nothing that goes wrong here matters more than the exit
    status."""
    if asked.training_script_args[:1] != ["train"]:
        return
    from megalite.cli import make_parser
    from megalite.config_file import load_config
    from megalite.observe.webhook import address_of, claim, tell
    from megalite.utils.webhooks import NotTold

    try:
        told = make_parser().parse_args(asked.training_script_args)
        config = load_config(told.config, told.overrides)
        # A start without an id of its own is that of one node.
        start = uuid.uuid4().hex if asked.rdzv_id == "none" else asked.rdzv_id
        if config.observe.webhook and claim(config.run.folder, start):
            tell(address_of(config.observe.webhook), f"{config.run.name} {text}")
    except NotTold as error:
        print(f"warning: webhook: {error}", file=sys.stderr, flush=True)
    except (ConfigError, DataError, OSError, SystemExit):  # the ranks have said so
        return


def _close(
    ranks: PContext, death_sig: signal.Signals | None = None, timeout: int = FAREWELL_S
) -> None:
    """Replace `PContext.close`: end the ranks, with at most FAREWELL_S seconds of grace."""
    _torchruns_close(ranks, death_sig, min(timeout, FAREWELL_S))


# A run that has lost a rank cannot save any more, and a stopped rank never leaves by itself.
# torchrun has an option for how long it waits, but ignores it after a failure (2.13).
_torchruns_close = PContext.close
PContext.close = _close  # type: ignore[assignment, method-assign]


def _start(ranks: PContext) -> None:
    """Replace `PContext.start`: start the ranks, then take over the signals again."""
    # torchrun installs signal handlers here that make its agent end the ranks: ours must come
    # after.
    _torchruns_start(ranks)
    for number in SIGNALS:
        signal.signal(number, _pass_on)


_torchruns_start = PContext.start
PContext.start = _start  # type: ignore[assignment, method-assign]


def _leave_or_pass_on(number: int, frame: FrameType | None) -> None:
    """Handle a signal before the ranks run: exit if there are none yet, otherwise pass it on."""
    if not _children():  # still waiting for the other nodes
        sys.exit(killed_by(number))
    _pass_on(number, frame)


@contextlib.contextmanager
def _leaving_while_waiting() -> Iterator[None]:
    """End the process on a signal while there are no ranks, where the main thread does not: it runs
    no handler while torch waits at an address (`--master-addr`) for the other nodes."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)

    def watch() -> None:
        while byte := os.read(read, 1):
            if select.select([read], [], [], FAREWELL_S)[0]:
                continue  # another signal, or the main thread has left by itself
            # From the moment ranks are started, their end is what counts.
            waiting = byte[0] in SIGNALS and signal.getsignal(byte[0]) is _leave_or_pass_on
            if waiting and not _children():
                end_process(killed_by(byte[0]))
        os.close(read)

    threading.Thread(target=watch, name="signals", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(-1)
        os.close(write)


def _pass_on(number: int, frame: FrameType | None) -> None:
    """Pass a signal on to the ranks. If they have ended it does nothing: how they ended counts,
    even while other nodes are awaited."""
    for pid in _children():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _children() -> list[int]:
    """Return the process ids of this process's children, from /proc."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # a thread that ended meanwhile
            found += [int(pid) for pid in (task / "children").read_text().split()]
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
