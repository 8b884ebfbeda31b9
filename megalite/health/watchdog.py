"""Ends a run that hangs, and writes a hang report that says why.

A thread of every rank watches the notes in `activity.NOW`. While they change, there is progress;
compiling, loading and saving, which leave few notes, have more time. A rank without progress reads
the heartbeats of the others, because a rank may well have to wait. The run hangs when no rank is in
good time any more: each waits for others, or has been at one thing for too long, or has stopped
writing heartbeats (its process is stopped, its node dead, its file system gone). Then every rank
that still can writes the stacks of all its threads to RUN/health/hang-of-TIME/. The first of them
adds the report and prints it. All exit with `Exit.HUNG`, at which a launcher starts the run again.

The timeout of the collectives themselves is much longer, and tells only that a collective was not
answered.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import sysconfig
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from types import FrameType

import torch

from megalite.comm.collectives import start_highest
from megalite.comm.mesh import Mesh
from megalite.config import Config
from megalite.health.flight import describe_flights, read, record
from megalite.health.flight import write as write_flights
from megalite.health.heartbeat import Heartbeat, read_all, take, write
from megalite.health.node import within
from megalite.health.report import describe_hang, first_behind, what, who
from megalite.runtime import error_file
from megalite.runtime.activity import NOW
from megalite.runtime.exit_codes import Exit, end_process
from megalite.utils.files import replacing

JUDGES = 16
"""About how many ranks read all heartbeats as soon as they see no progress. The others step in only
much later, in case those are all gone: thousands of ranks must not each ask the file system for
thousands of files."""

FLIGHTS_S = 5.0
"""Time limit in seconds of reading the flight recorder."""

FAREWELL_S = 10.0
"""Time limit in seconds of the last heartbeat, which says that the rank has ended. Its disk may be
what hangs."""


class Watchdog:
    """Watches this rank for a hang inside its `with` block. Every rank has one; making it is a
    collective."""

    def __init__(self, config: Config, mesh: Mesh):
        """Take the timeouts from `config.health` and the run folder from `config.run`."""
        self._health = config.health
        self._mesh = mesh
        self._rank = mesh.world.rank
        self._world_size = mesh.world.size
        # All ranks agree on rank 0's clock: it names the folder, and tells heartbeats of this start
        # from older ones.
        started = int(time.time()) if self._rank == 0 else 0
        self._run = start_highest(started, mesh)()
        self._folder = config.run.folder / "health"
        began = time.strftime("%Y%m%d-%H%M%S", time.gmtime(self._run))
        self._hang_folder = self._folder / f"hang-of-{began}"
        timeout = self._health.hang_timeout_s
        self._interval = min(10.0, timeout / 20)
        # Longer than a shared file system takes to show one node's files to another.
        self._silence_s = 0.4 * timeout
        self._grace_s = 0.2 * timeout
        self._judges = self._rank % max(1, self._world_size // JUDGES) == 0
        self._beat = 0  # heartbeats written
        self._beats = NOW.beats  # notes seen at the last look
        self._stalled_s = 0.0
        self._looked = time.monotonic()
        self._heard: dict[int, tuple[int, float]] = {}
        """For each other rank, during a stall: its last heartbeat's number, and how long the stall
        had lasted then."""
        self._mute = self._warned = False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        NOW.reset()
        if self._health.hang_timeout_s:
            # A run that cannot write its heartbeats still trains.
            with contextlib.suppress(OSError):
                self._folder.mkdir(parents=True, exist_ok=True)
            self._write(self._take())
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        if self._thread.ident is not None:
            self._thread.join(FAREWELL_S)

    # --- looking ----------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Run the watchdog's thread: look at every interval, and end the process at a hang."""
        with contextlib.ExitStack() as stack:
            stacks = None
            with contextlib.suppress(OSError):
                path = self._folder / f"rank-{self._rank:05d}.stacks"
                stacks = stack.enter_context(open(path, "w"))
                # Before its file is closed.
                stack.callback(faulthandler.cancel_dump_traceback_later)
            while not self._over.wait(self._interval):
                self._look()
                if stacks is not None:
                    # This thread stops if C code never gives the interpreter's lock back.
                    # faulthandler's own thread needs no lock, and writes the stacks unless the next
                    # look comes in time.
                    faulthandler.dump_traceback_later(
                        self._patience_s + self._interval, file=stacks
                    )
                if self._is_known() or (
                    self._stalled_s > self._wait_before_judging_s and self._hangs()
                ):
                    self._end()
        NOW.phase = "ended"
        self._write(self._take())

    def _look(self) -> None:
        """Add up the time without progress, and write a heartbeat."""
        now = time.monotonic()
        # A suspended process (SIGSTOP, a laptop's lid) has not been idle: no look counts more than
        # two intervals.
        passed, self._looked = min(now - self._looked, 2 * self._interval), now
        self._stalled_s = self._stalled_s + passed if NOW.beats == self._beats else 0.0
        self._beats = NOW.beats
        if not self._stalled_s:
            self._heard.clear()
        self._write(self._take())

    @property
    def _patience_s(self) -> float:
        """Seconds that may pass without progress in what this rank does now."""
        if NOW.waits_in:
            return self._health.hang_timeout_s
        return self._health.patience_s(NOW.phase)

    @property
    def _wait_before_judging_s(self) -> float:
        """Seconds without progress before this rank reads the heartbeats of the others."""
        return self._patience_s if self._judges else self._patience_s + self._health.hang_timeout_s

    def _take(self) -> Heartbeat:
        self._beat += 1
        return take(self._rank, self._run, self._beat, self._stalled_s, self._patience_s)

    def _write(self, beat: Heartbeat) -> None:
        try:
            write(self._folder, beat)
            self._mute = False
        except OSError as error:
            if not self._mute and not self._warned:
                self._warned = True
                what_it_means = "others' silence may be the disk's"
                said = f"warning: rank {self._rank} cannot write its heartbeat: {error}; {what_it_means}"
                with contextlib.suppress(OSError):
                    os.write(2, f"{said}\n".encode())
            self._mute = True

    def _is_known(self) -> bool:
        """Return whether another rank has found a hang already; False while the disk does not
        answer."""
        with contextlib.suppress(OSError):
            return self._hang_folder.exists()
        return False

    def _hangs(self) -> bool:
        """Return whether no other rank is in good time. Call it at every look of a stall: only
        several looks show that a rank is silent."""
        beats = read_all(self._folder, self._world_size, self._run)
        in_good_time = []
        for rank in range(self._world_size):
            if rank == self._rank:
                continue
            # Ask of every rank, even after one in good time was found: silence is measured from the
            # first look at it.
            silent = self._is_silent(rank, beats.get(rank))
            stalled = rank in beats and beats[rank].stalled
            if not silent and not stalled:
                in_good_time.append(rank)
        return not in_good_time

    def _is_silent(self, rank: int, beat: Heartbeat | None) -> bool:
        """Return whether a rank's heartbeat has stayed the same for longer than file systems
        need."""
        if self._mute:  # the disk may be to blame for theirs as well
            return False
        number = beat.beat if beat else 0
        last, since = self._heard.setdefault(rank, (number, self._stalled_s))
        if number != last:
            self._heard[rank] = (number, self._stalled_s)
            return False
        return self._stalled_s - since > self._silence_s

    # --- ending -----------------------------------------------------------------------------------

    def _end(self) -> None:
        """Write this rank's stacks; on the first rank to do so, the report. Then exit with
        `Exit.HUNG`."""
        try:
            mine = self._at_a_hang()
            self._write(mine)
            self._hang_folder.mkdir(parents=True, exist_ok=True)
            self._write_flights()
            with open(self._hang_folder / f"rank-{self._rank:05d}.txt", "w") as file:
                # Flushed, because faulthandler writes to the file's descriptor behind Python's
                # back.
                print(f"{who(mine)}: {what(mine)}\n", file=file, flush=True)
                faulthandler.dump_traceback(file)
            # The report names ranks that cannot write: give those that can time to do so.
            self._wait_until(lambda: len(self._dumped()) == self._world_size)
            report = self._hang_folder / "report.txt"
            dumped = self._dumped()
            if dumped[0] == self._rank:
                beats = read_all(self._folder, self._world_size, self._run)
                flights = describe_flights(
                    {rank: read(self._hang_folder, rank) for rank in dumped}, self._mesh
                )
                text = describe_hang(beats, dumped, mine, self._mesh, self._hang_folder, flights)
                error_file.leave(first_behind(text))
                # Not through sys.stderr, whose lock a hanging thread may hold.
                os.write(2, text.encode())
                with replacing(report) as temporary:
                    temporary.write_text(text)
            else:  # a launcher ends all ranks when the first one leaves
                self._wait_until(report.exists)
        except Exception as error:
            os.write(2, f"rank {self._rank} hangs, and cannot say more: {error}\n".encode())
        finally:
            end_process(Exit.HUNG)

    def _write_flights(self) -> None:
        """Write down this rank's collectives, if the recorder answers in time: it may ask the
        device."""
        with contextlib.suppress(Exception):
            write_flights(
                self._hang_folder, self._rank, within(FLIGHTS_S, lambda: record(self._mesh))
            )

    def _at_a_hang(self) -> Heartbeat:
        """Return a heartbeat with the code position of the main thread.

        The position also shows a wait for other ranks that left no note, such as one inside
        DeepSpeed."""
        place, collective = place_of_main_thread()
        beat = replace(self._take(), at=place)
        if collective and not beat.waits_in:
            beat = replace(beat, waits_in=collective)
        return beat

    def _wait_until(self, true: Callable[[], bool]) -> None:
        """Wait until a condition is true, for the grace period at most."""
        deadline = time.monotonic() + self._grace_s
        while not true() and time.monotonic() < deadline:
            time.sleep(self._interval / 4)

    def _dumped(self) -> list[int]:
        """Return the ranks that have written their stacks, in order."""
        files = self._hang_folder.glob("rank-*.txt")
        return sorted(int(path.stem.removeprefix("rank-")) for path in files)


def place_of_main_thread() -> tuple[str, str]:
    """Return where the main thread is, as ("FILE:LINE in FUNCTION", function of torch.distributed
    or "").

    The place is the innermost frame outside torch and Python's standard library."""
    frame: FrameType | None = sys._current_frames().get(threading.main_thread().ident or 0)
    place, collective = "", ""
    while frame is not None:
        file, function = frame.f_code.co_filename, frame.f_code.co_name
        inside = f"{file}:{frame.f_lineno} in {function}"
        if not place and file.endswith("distributed_c10d.py"):
            collective = function
        place = place or inside  # the innermost frame of all, if none is outside the libraries
        if not file.startswith(_LIBRARIES) or "site-packages" in file.removeprefix(_LIBRARIES[0]):
            return inside, collective
        frame = frame.f_back
    return place, collective


_LIBRARIES = (os.path.dirname(torch.__file__), sysconfig.get_path("stdlib"))
