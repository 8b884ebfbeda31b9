"""Faults other than a killed rank. Each takes a folder of its own, beside which the corpus is, does one thing to a run,
and returns whether it came out as it should and a line that says how."""

from __future__ import annotations

import random
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import torch
from killing import EVERY, STEPS, Aim, config_of, run_once

from megalite.checkpoint.folder import MANIFEST, read_manifest, step_folder
from megalite.checkpoint.resume import find_checkpoint
from megalite.exit_codes import Exit
from megalite.mesh import ALONE, Mesh

Outcome = tuple[bool, str]
FLIPS = 8
"""Of each file."""


def bit_flips(folder: Path) -> Outcome:
    """One bit of one file: the checkpoint is set aside, and the one before taken."""
    config = config_of(folder, "data 2, ZeRO-1")
    start = run_once(config, folder / "start-0")
    if start.status:
        return False, start.log
    root, rng = config.run.folder / "checkpoints", random.Random(0)
    newest, before = step_folder(root, STEPS), step_folder(root, STEPS - EVERY)
    names = [MANIFEST, *sorted(read_manifest(newest) or {})]
    alone = Mesh(ALONE, ALONE, ALONE, ALONE, ALONE, ALONE, torch.device("cpu"))
    missed = []
    for name in names:
        for _ in range(FLIPS):
            copy = folder / "copy"
            shutil.copytree(root, copy)
            path = copy / newest.name / name
            content = bytearray(path.read_bytes())
            bit = rng.randrange(8 * len(content))
            content[bit // 8] ^= 1 << bit % 8
            path.write_bytes(content)
            taken, _ = find_checkpoint(copy, "auto", alone)
            if taken != copy / before.name:
                missed.append(f"{name} bit {bit}")
            shutil.rmtree(copy)
    kinds = ", ".join(names)
    if missed:
        return False, f"not noticed: {', '.join(missed)}"
    return True, f"{FLIPS * len(names)} of {FLIPS * len(names)} noticed, the checkpoint before was taken ({kinds})"


def stopped_rank(folder: Path) -> Outcome:
    """SIGSTOP: the other rank's report names it."""
    config = config_of(
        folder, "data 2, ZeRO-1", health={"hang_timeout_s": 1.5}, train={"steps": 100_000}, checkpoint={"every": 0},
        observe={"eval_every": 0},
    )  # fmt: skip
    start = run_once(config, folder / "start-0", Aim(rank=1, phase=3, signal=signal.SIGSTOP))
    behind = start.log.partition("behind:")[2].partition("waiting for others:")[0]
    named = re.search(r"rank 1 on .*stopped by a signal", behind)
    if start.status != Exit.HUNG or not named or "rank 0" in behind:
        return False, f"exit status {start.status}\n{start.log}"
    seconds = start.ended - (start.killed or start.ended)
    return True, f"{named[0]}; exit status {Exit.HUNG}, {seconds:.1f} s after it, of which the timeout is 1.5"


SCENARIOS: dict[str, Callable[[Path], Outcome]] = {"bit flips": bit_flips, "stopped rank": stopped_rank}
