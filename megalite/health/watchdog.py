"""Ends a run that hangs, and says why.

A thread of every rank looks after the notes in `activity.NOW`. While they change, there is progress; compiling, loading
or saving, which leave few, have more time. A rank without progress looks at the heartbeats of the others, for a rank
that waits may well have to. The run hangs when none is left that is in good time: each waits for others, or has been at
one thing for too long, or has not even written a heartbeat (its process is stopped, its node dead, its file system
gone). Then every rank that still can writes the stacks of all its threads to RUN/health/hang-TIME/; the first of them
adds a report and prints it; and they exit with `Exit.HUNG`, at which a launcher starts the run again.

The collectives' own timeout is much longer, and tells only that a collective was not answered.
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
from types import FrameType, TracebackType

import torch

from megalite import last_words
from megalite.activity import NOW
from megalite.config import Config
from megalite.exit_codes import Exit, end_process
from megalite.health.heartbeat import Heartbeat, read_all, take, write
from megalite.health.report import describe_hang, first_behind, what, who
from megalite.mesh import Mesh
from megalite.parallel.collectives import start_highest

JUDGES = 16
"""Ranks that read the heartbeats of all as soon as they see no progress. The rest leave it to them, and do it only when
those should all be gone: the file system is not to be asked for thousands of files by each of thousands."""

FAREWELL_S = 10.0
"""For the last heartbeat, which says that the rank has ended. The file system it goes to may be what is stuck."""


class Watchdog:
    """Watches between `with` and its end. Every rank has one; making it is a collective."""

    def __init__(self, config: Config, mesh: Mesh):
        self._health, self._mesh = config.health, mesh
        self._rank, self._world_size = mesh.world.rank, mesh.world.size
        self._run = start_highest(int(time.time()) if self._rank == 0 else 0, mesh)()
        self._folder = config.run.folder / "health"
        began = time.strftime("%Y%m%d-%H%M%S", time.gmtime(self._run))
        self._hang_folder = self._folder / f"hang-of-{began}"
        timeout = self._health.hang_timeout_s
        self._interval = min(10.0, timeout / 20)
        # Longer than file systems shared by nodes take to show each other's news.
        self._silence_s, self._grace_s = 0.4 * timeout, 0.2 * timeout
        self._judges = self._rank % max(1, self._world_size // JUDGES) == 0
        self._beat, self._beats, self._stalled_s, self._looked = 0, NOW.beats, 0.0, time.monotonic()
        self._heard: dict[int, tuple[int, float]] = {}
        """In a stall, of each other rank: its last heartbeat, and how long the stall had lasted when it was seen."""
        self._mute = self._warned = False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        NOW.reset()
        if self._health.hang_timeout_s:
            with contextlib.suppress(OSError):  # a run goes on that cannot write its heartbeats
                self._folder.mkdir(parents=True, exist_ok=True)
            self._write(self._take())
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._thread.ident is not None:
            self._thread.join(FAREWELL_S)

    # --- looking --------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        with contextlib.ExitStack() as stack:
            stacks = None
            with contextlib.suppress(OSError):
                stacks = stack.enter_context(open(self._folder / f"rank-{self._rank:05d}.stacks", "w"))
                stack.callback(faulthandler.cancel_dump_traceback_later)  # before its file is closed
            while not self._over.wait(self._interval):
                self._look()
                if stacks is not None:
                    # This thread cannot run where another one holds the interpreter for good. That one can.
                    faulthandler.dump_traceback_later(self._patience_s + self._interval, file=stacks)
                if self._is_known() or (self._stalled_s > self._wait_before_judging_s and self._hangs()):
                    self._end()
        NOW.phase = "ended"
        self._write(self._take())

    def _look(self) -> None:
        now = time.monotonic()
        # A process that was suspended has not been idle: no look counts for more than two intervals.
        passed, self._looked = min(now - self._looked, 2 * self._interval), now
        self._stalled_s = self._stalled_s + passed if NOW.beats == self._beats else 0.0
        self._beats = NOW.beats
        if not self._stalled_s:
            self._heard.clear()
        self._write(self._take())

    @property
    def _patience_s(self) -> float:
        return self._health.hang_timeout_s if NOW.waits_in else self._health.patience_s(NOW.phase)

    @property
    def _wait_before_judging_s(self) -> float:
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
                said = (
                    f"warning: rank {self._rank} cannot write its heartbeat: {error}; others' silence may be the disk's"
                )
                with contextlib.suppress(OSError):
                    os.write(2, f"{said}\n".encode())
            self._mute = True

    def _is_known(self) -> bool:
        """Whether another rank has found a hang. A disk that is gone for a while says nothing of it."""
        with contextlib.suppress(OSError):
            return self._hang_folder.exists()
        return False

    def _hangs(self) -> bool:
        """Whether no rank is in good time. Asked at every look of a stall, as silence takes several to be noticed."""
        beats = read_all(self._folder, self._world_size, self._run)
        others = [rank for rank in range(self._world_size) if rank != self._rank]
        # All are looked at, also behind one in good time: the silence of each is measured from the first look.
        in_good_time = [
            rank
            for rank in others
            if not self._is_silent(rank, beats.get(rank)) and not (rank in beats and beats[rank].stalled)
        ]
        return not in_good_time

    def _is_silent(self, rank: int, beat: Heartbeat | None) -> bool:
        if self._mute:  # the disk may be to blame for theirs as well
            return False
        number = beat.beat if beat else 0
        last, since = self._heard.setdefault(rank, (number, self._stalled_s))
        if number != last:
            self._heard[rank] = (number, self._stalled_s)
            return False
        return self._stalled_s - since > self._silence_s

    # --- ending ---------------------------------------------------------------------------------------------------

    def _end(self) -> None:
        try:
            mine = self._at_a_hang()
            self._write(mine)
            self._hang_folder.mkdir(parents=True, exist_ok=True)
            with open(self._hang_folder / f"rank-{self._rank:05d}.txt", "w") as file:
                print(f"{who(mine)}: {what(mine)}\n", file=file, flush=True)
                faulthandler.dump_traceback(file)
            self._wait_until(lambda: len(self._dumped()) == self._world_size)
            report = self._hang_folder / "report.txt"
            dumped = self._dumped()
            if dumped[0] == self._rank:
                beats = read_all(self._folder, self._world_size, self._run)
                text = describe_hang(beats, dumped, mine, self._mesh, self._hang_folder)
                last_words.leave(first_behind(text))
                os.write(2, text.encode())  # by no stream whose lock another thread may hold
                temporary = report.with_suffix(".tmp")
                temporary.write_text(text)
                temporary.replace(report)
            else:  # a launcher ends all ranks when the first one leaves
                self._wait_until(report.exists)
        except Exception as error:
            os.write(2, f"rank {self._rank} hangs, and cannot say more: {error}\n".encode())
        finally:
            end_process(Exit.HUNG)

    def _at_a_hang(self) -> Heartbeat:
        """A heartbeat that also says where in the code the main thread is. A wait for other ranks that left no note,
        such as one inside of DeepSpeed, shows there."""
        place, collective = place_of_main_thread()
        beat = replace(self._take(), at=place)
        return replace(beat, waits_in=collective) if collective and not beat.waits_in else beat

    def _wait_until(self, true: Callable[[], bool]) -> None:
        deadline = time.monotonic() + self._grace_s
        while not true() and time.monotonic() < deadline:
            time.sleep(self._interval / 4)

    def _dumped(self) -> list[int]:
        return sorted(int(path.stem.removeprefix("rank-")) for path in self._hang_folder.glob("rank-*.txt"))


def place_of_main_thread() -> tuple[str, str]:
    """("FILE:LINE in FUNCTION" of the innermost frame outside of torch and Python's own library, the function of
    torch.distributed that it is in, if it is in one)."""
    frame: FrameType | None = sys._current_frames().get(threading.main_thread().ident or 0)
    place, collective = "", ""
    while frame is not None:
        file, function = frame.f_code.co_filename, frame.f_code.co_name
        inside = f"{file}:{frame.f_lineno} in {function}"
        if not place and file.endswith("distributed_c10d.py"):
            collective = function
        place = place or inside
        if not file.startswith(_LIBRARIES) or "site-packages" in file.removeprefix(_LIBRARIES[0]):
            return inside, collective
        frame = frame.f_back
    return place, collective


_LIBRARIES = (os.path.dirname(torch.__file__), sysconfig.get_path("stdlib"))
