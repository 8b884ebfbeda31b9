"""Saves checkpoints while training goes on: the loop waits at most for tensors to be gathered into
host memory, a thread does the rest.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megalite.checkpoint.board import Board
from megalite.checkpoint.folder import (
    Worth,
    best_steps,
    complete_steps,
    read_worth,
    remove_unfinished,
    step_folder,
)
from megalite.checkpoint.writing import PATIENCE_S, Collect, Target, Writing, explain
from megalite.comm.collectives import start_highest, start_sharing
from megalite.comm.mesh import Mesh
from megalite.engine import Engine
from megalite.engine.gather import HostBuffers
from megalite.models.weights import Weight
from megalite.runtime.activity import NOW


class Saver:
    """Writes checkpoints of a run. Every rank has one and calls it at the same steps.

    A failed save does not harm the training: it is reported, and tried again until the next one is
    due. Older checkpoints stay untouched, and no incomplete folder gets the name of a
    checkpoint."""

    def __init__(
        self,
        root: Path,
        keep: int,
        weights: Sequence[Weight],
        mesh: Mesh,
        engine: Engine,
        owners: Mapping[str, int],
        write_extras: Callable[[Path], None],
        stem: str = "model",
        keep_best: int = 0,
        state_row: Callable[[Weight, str], Weight] = lambda weight, kind: weight,
    ):
        """Write below `root`, which no other run uses. A collective.

        `keep` newest and `keep_best` best checkpoints stay. `owners` says which rank writes each of
        `weights`, from the state of `engine`. `write_extras`, called by rank 0, writes everything
        but tensors (config.json, tokenizer) to a folder. Files of weights begin with `stem`.
        `state_row` is that of the optimizer's config."""
        table = {weight.name: weight for weight in weights}

        def row(name: str, kind: str) -> Weight:
            return state_row(table[name], kind)

        self.target = Target(root, keep, row, owners, mesh, write_extras, stem, keep_best)
        self.mesh = mesh
        self.engine = engine
        self.error: str | None = None
        """Why the last save failed, or None. Read it after `wait`."""
        self._best = 0
        self._buffers = HostBuffers()
        self._thread: threading.Thread | None = None
        self._began = 0.0
        self._hurry = threading.Event()
        self._abandoned = threading.Event()
        self._news = deque[
            str
        ]()  # never replaced by another one: the writing thread appends to it meanwhile
        # Unique among all savers that share a store, and counted up with every save.
        self._number = start_highest(time.time_ns() if mesh.world.rank == 0 else 0, mesh)()
        if mesh.world.rank == 0:
            # What cannot be deleted now is deleted at a later start.
            with contextlib.suppress(OSError):
                remove_unfinished(root)

    def save(self, step: int, train_state: dict[str, Any]) -> None:
        """Start to write the checkpoint of `step`, with the state of this moment and `train_state`.

        Waits first for an earlier save to end on all ranks."""
        folder = step_folder(self.target.root, step)
        self._hurry.set()  # an earlier save that keeps failing gives way to the newer one
        if busy := self._wait_for_others():
            so_far = time.monotonic() - self._began
            ranks = ", ".join(map(str, busy[:8]))
            if len(busy) > 8:
                ranks += ", …"
            self._failed(
                folder,
                f"the one before is still being written after {so_far:.0f} s, by rank {ranks}",
            )
            return
        self._hurry.clear()
        self.error = None
        self._began = time.monotonic()
        self._number += 1
        kinds = ("weight", *self.engine.states)
        self._buffers.reuse()
        # The one thing that must happen now, on all ranks: a copy of this moment's state.
        collect = self.engine.gather_later(kinds, self.target.owners, self._buffers)
        if self.mesh.device.type == "cuda":
            # The next step may change the weights only once they are copied.
            torch.cuda.current_stream(self.mesh.device).synchronize()
        self._thread = threading.Thread(
            target=self._write, args=(folder, collect, train_state), name="checkpoint"
        )
        self._thread.start()

    def _wait_for_others(self) -> list[int]:
        """Wait until no rank writes any more, PATIENCE_S at most. Returns the ranks that still do,
        alike on all."""
        while True:
            busy = self._thread is not None and self._thread.is_alive()
            late = self.mesh.world.rank == 0 and time.monotonic() - self._began > PATIENCE_S
            # In short rounds: a rank that waits in one long collective would be taken for hanging.
            # Bit 0: busy; bit 1, rank 0 only: late.
            found = start_sharing(busy + 2 * late, self.mesh)().int().tolist()
            ranks = [rank for rank, state in enumerate(found) if state % 2]
            if not ranks or found[0] >= 2:
                return ranks
            time.sleep(0.1)

    def wait(self, abandon: bool = False, in_a_hurry: Callable[[], bool] = lambda: False) -> None:
        """Wait until the last save has ended on all ranks. With `abandon`, other ranks, which may
        be gone, are not waited for. Once `in_a_hurry` says so, a save that fails is not tried
        again."""
        if abandon:
            self._abandoned.set()
            self._hurry.set()
        if self._thread is not None:
            NOW.do("waiting for the checkpoint to be written")
            while self._thread.is_alive():
                self._thread.join(0.1)
                if in_a_hurry():
                    self._hurry.set()

    def news(self) -> list[str]:
        """Return the messages since the last call, for the console."""
        return [self._news.popleft() for _ in range(len(self._news))]

    def _failed(self, folder: Path, reason: str) -> None:
        self.error = f"{folder} was not saved: {reason}"
        self._news.append(f"warning: {self.error}")

    def _write(self, folder: Path, collect: Collect, train_state: dict[str, Any]) -> None:
        """Write one checkpoint, in the thread."""
        board = Board(self.mesh, self._number, self._abandoned)
        refused = train_state.get("refused")
        worth = None if refused is None else Worth(train_state["step"], refused)
        writing = Writing(
            self.target, folder, collect, train_state, worth, board, self._hurry, self._news.append
        )
        try:
            reason = writing.run()
        except Exception as error:  # no other rank answers any more
            reason = explain(error)
        if reason:
            self._failed(folder, reason)
        elif self.mesh.world.rank == 0:
            took = time.monotonic() - self._began
            self._news.append(f"saved {folder} in {took:.1f} s")
            self.target.prune(worth)
            self._tell_best()

    def _tell_best(self) -> None:
        """Report which checkpoint is the best by validation loss, if it has changed."""
        root = self.target.root
        with contextlib.suppress(OSError):
            steps = complete_steps(root) if self.target.keep_best else []
            for step in best_steps(root, steps, 1):
                if step != self._best:
                    loss = read_worth(step_folder(root, step), step).valid_loss
                    self._news.append(
                        f"best by validation loss so far: {step_folder(root, step)} ({loss:.4f})"
                    )
                self._best = step
